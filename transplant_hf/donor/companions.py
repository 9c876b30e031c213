"""The files that travel with a donor so that `pipeline` needs one name: the tokenizer and the generation config."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from ..storage import read_json

__all__ = ["COMPANION_FILES", "copy_companions", "tokenizer_class"]

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


def copy_companions(recipient: str, revision: str | None, folder: Path, cache_dir: str | None = None) -> None:
    """Copy the recipient's tokenizer and generation config, when they are at hand; nothing is downloaded."""
    source = Path(recipient).expanduser()
    if not source.is_dir():
        try:
            source = Path(snapshot_download(recipient, revision=revision, cache_dir=cache_dir, local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError):
            return
    for path in _matching(source, COMPANION_FILES):
        if not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)


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
