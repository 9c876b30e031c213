"""The files that travel with a donor so that `pipeline` needs one name: the tokenizer and the generation config."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from ..storage import read_json

__all__ = ["COMPANION_FILES", "at_hand", "copy_companions", "has_tokenizer", "tokenizer_class"]

COMPANION_FILES = (
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "spiece.model",
    "sentencepiece*",
    "generation_config.json",
)
# One of them is in the cache when anything of a model is.
_ALWAYS_THERE = ("config.json", "tokenizer_config.json", "tokenizer.json", "README.md")
# Any of them is a tokenizer; its configuration alone is none.
_TOKENIZERS = ("tokenizer.*", "vocab.*", "spiece.model", "sentencepiece*")


def copy_companions(recipient: str, revision: str | None, folder: Path, cache_dir: str | None = None) -> None:
    """Copy the recipient's tokenizer and generation config, when they are at hand; nothing is downloaded."""
    source = at_hand(recipient, revision, cache_dir)
    for path in _matching(source, COMPANION_FILES) if source else ():
        if not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)


def at_hand(recipient: str, revision: str | None, cache_dir: str | None = None) -> Path | None:
    """Return the folder in which a recipient's files are, as far as they are on this machine."""
    source = Path(recipient).expanduser()
    if source.is_dir():
        return source
    # Not a snapshot as a whole: the client refuses one of which it knows that files are missing.
    for name in _ALWAYS_THERE:
        try:
            found = try_to_load_from_cache(recipient, name, cache_dir=cache_dir, revision=revision)
        except HFValidationError:
            return None
        if isinstance(found, str):
            return Path(found).parent
    return None


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer."""
    return bool(_matching(folder, _TOKENIZERS))


def tokenizer_class(model_type: str, folder: Path) -> str | None:
    """Return the tokenizer's class where only the recipient's model type tells it, as for the original GPT-2.

    A transplant has a model type of its own, so its `config.json` must say it.
    """
    path = folder / "tokenizer_config.json"
    if path.exists() and read_json(path, "the tokenizer's configuration").get("tokenizer_class"):
        return None
    return TOKENIZER_MAPPING_NAMES.get(model_type) if _matching(folder, COMPANION_FILES[:2]) else None


def _matching(folder: Path, patterns: Iterable[str]) -> list[Path]:
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
