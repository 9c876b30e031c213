"""The files that travel with a model so that `pipeline` needs one name: tokenizer, processor, generation."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import CONFIG_MAPPING, TOKENIZER_MAPPING
from transformers.utils import logging

from ..sources import HubOptions, Source, locate, points_to_folder
from ..storage import read_json
from .entry import CODE_FILE, read_entry

logger = logging.get_logger(__name__)

NAMED_TEMPLATES = "additional_chat_templates"
_TEMPLATE = "chat_template.jinja"
_CUSTOM_GENERATE = "custom_generate"
COMPANION_FOLDERS = (NAMED_TEMPLATES, _CUSTOM_GENERATE)
# Any of these files is a tokenizer; a tokenizer's configuration alone is not. Whole names, because other files have the
# same endings; only those that Transformers numbers are patterns.
_TOKENIZERS = (
    *("tokenizer.json", "tokenizer.[0-9]*.json", "tokenizer.model", "tokenizer.model.v[0-9]"),
    *("tokenizer.model.v[0-9]m[0-9]", "byte_maps.json", "entity_vocab.json", "ice_text.model", "prophetnet.tokenizer"),
    *("qwen.tiktoken", "sentencepiece.bpe.model", "sentencepiece.model", "source.spm", "spiece.model", "spm.model"),
    *("spm_char.model", "target.spm", "target_vocab.json", "tekken.json", "tiktoken.model", "vocab-src.json"),
    *("vocab-tgt.json", "vocab.bpe", "vocab.json", "vocab.txt"),
)
# A closed list: a folder may hold any other file, which must not be published with a donor. The files of one group
# belong together and are taken from one place.
_GROUPS = {
    "tokenizer": (
        *_TOKENIZERS,
        *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt", "bpe.codes"),
        *("dict.txt", "emoji.json", "normalizer.json", "word_pronunciation.json", "word_shape.json"),
        *(_TEMPLATE, "chat_template.json", f"{NAMED_TEMPLATES}/*.jinja"),
    ),
    "processor": (
        *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
        "audio_tokenizer_config.json",
    ),
    _CUSTOM_GENERATE: (f"{_CUSTOM_GENERATE}/*.py", f"{_CUSTOM_GENERATE}/requirements.txt"),
    "generation": ("generation_config.json",),
}
_PATTERNS = tuple(pattern for patterns in _GROUPS.values() for pattern in patterns)
# `auto_map` in these files names the code of a tokenizer or processor that Transformers has no class for.
_CODE_NAMED_IN = ("tokenizer_config.json", "*processor_config.json")
_CLASS = re.compile(r'"(\w+)\.\w+"')  # not one of another repository, "user/model--module.Class"
_IMPORTED = re.compile(r"^\s*from\s+\.(\w+)\s+import", re.MULTILINE)
_MAX_BYTES = 1 << 28  # the largest tokenizers have about 40 MB
# At least one of these is in the cache if any file of a model is.
_COMMON_FILES = ("config.json", "tokenizer_config.json", "tokenizer.json", "README.md")

_Groups = dict[str, dict[str, Path]]


def is_companion(name: str) -> bool:
    """Whether a file belongs to tokenizer, processor or generation, by its path; code has any name: `code_named_in`."""
    return _group_of(name) is not None


def companions_in(folder: Path) -> set[str]:
    """Return the paths, in a folder, of all files of the tokenizer, the processor and generation, code included."""
    return {name for files in _groups_in(folder).values() for name in files}


def copy_companions(
    sources: Sequence[tuple[str, str | None]], staging: Path, target: Path, cache_dir: str | None = None
) -> None:
    """Copy tokenizer, processor and generation files that are on this machine; nothing is downloaded.

    Files that the user put into the target are kept, then those of the first source, and so on. The files of a
    tokenizer or processor are all taken from one place.
    """
    folders = [folder for name, revision in sources if name and (folder := at_hand(name, revision, cache_dir))]
    places = [_users_groups(target, cache_dir), *map(_groups_in, folders)]
    for group in _GROUPS:
        files: dict[str, Path] = {}
        for place in places:
            if not _is_whole(group, files):
                files = {**place.get(group, {}), **files}
        if group == "tokenizer" and folders:
            files = _without_stale_templates(files, places[-1].get(group, {}), target)
        for name, path in files.items():
            copy = staging / name
            if not copy.exists():
                copy.parent.mkdir(exist_ok=True, parents=True)
                shutil.copyfile(path, copy)


def kept_in_repository(folder: Path, names: Sequence[str], fetch: Callable[[str], Path]) -> set[str]:
    """Return the files of a folder that a push must not send, because the repository has its own tokenizer."""
    kept: set[str] = set()
    for group in ("tokenizer", "processor"):
        files = [name for name in names if _group_of(name) == group]
        before = _recipient_named_in(fetch("config.json"), None, None) if files and "config.json" in names else None
        # Copies of the recipient's files came with an earlier push.
        if files and (before is None or not _are_copies({name: fetch(name) for name in files}, before)):
            kept |= set(_groups_in(folder).get(group, {})) if _is_whole(group, files) else set(files)
    return kept


def locate_with_companions(
    reference: str,
    *,
    files: Sequence[str] = ("config.json",),
    revision: str | None = None,
    subfolder: str | None = None,
    hub: HubOptions | None = None,
) -> Source:
    """Find a model as `locate` does, and download its tokenizer, processor and generation files too."""
    source = locate(reference, files=(*files, *_PATTERNS), revision=revision, subfolder=subfolder, hub=hub)
    asked: set[str] = set()
    # What the code imports is known once the code is downloaded.
    while source.from_hub and (
        missing := code_named_in(source.folder) - asked - {path.name for path in source.folder.iterdir()}
    ):
        asked |= missing
        needed = (*files[:1], *sorted(missing))
        locate(reference, files=needed, revision=source.revision, subfolder=subfolder, hub=hub)
    return source


def at_hand(recipient: str, revision: str | None, cache_dir: str | None = None) -> Path | None:
    """Return the folder that holds a recipient's files on this machine, maybe not all of them."""
    folder = Path(recipient).expanduser()
    # With a revision, a name is a Hub id; only an absolute path is a folder, that of a snapshot.
    if folder.is_dir() and (revision is None or folder.is_absolute()):
        return folder
    # Not `snapshot_download`: it refuses a snapshot that it knows to be incomplete.
    for name in _COMMON_FILES:
        try:
            path = try_to_load_from_cache(recipient, name, cache_dir=cache_dir, revision=revision)
        except HFValidationError:
            return None
        if isinstance(path, str):
            return Path(path).parent
    return None


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer."""
    return folder.is_dir() and _is_whole("tokenizer", [path.name for path in folder.iterdir()])


def tokenizer_class(model_type: str, folder: Path) -> str | None:
    """Return the tokenizer's class that a transplant must name, because only the recipient's model type tells it."""
    path = folder / "tokenizer_config.json"
    if path.exists() and read_json(path, "the tokenizer's configuration").get("tokenizer_class"):
        return None
    if model_type not in CONFIG_MAPPING or not (path.exists() or has_tokenizer(folder)):
        return None
    return getattr(TOKENIZER_MAPPING.get(CONFIG_MAPPING[model_type], None), "__name__", None)


def _group_of(name: str) -> str | None:
    if any(part.startswith(".") for part in name.split("/")):
        return None
    return next((group for group, patterns in _GROUPS.items() if _matches(name, patterns)), None)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _is_whole(group: str, names: Any) -> bool:
    """Whether no file of a group is needed from another place."""
    return any(_matches(name, _TOKENIZERS) for name in names) if group == "tokenizer" else bool(names)


def _groups_in(folder: Path) -> _Groups:
    groups: _Groups = {}
    inner = (path for name in COMPANION_FOLDERS for path in (folder / name).rglob("*"))
    for path in sorted([*folder.iterdir(), *inner]) if folder.is_dir() else ():
        name = path.relative_to(folder).as_posix()
        group = _group_of(name)
        if group is None or not path.is_file():
            continue
        if path.stat().st_size > _MAX_BYTES:
            logger.warning(f"{path} is not copied: {path.stat().st_size:,} bytes are too many for a tokenizer's file.")
            continue
        groups.setdefault(group, {})[name] = path
    for group, files in groups.items():
        configs = [path for name, path in files.items() if _matches(name, _CODE_NAMED_IN)]
        code = {name: folder / name for name in sorted(code_named_in(folder, configs)) if (folder / name).is_file()}
        groups[group] = {**files, **code}
    return groups


def code_named_in(folder: Path, configs: Sequence[Path] | None = None) -> set[str]:
    """Return the code files that configurations of tokenizers and processors name, and the files that these import.

    The code runs only with `trust_remote_code=True`, as in the recipient.
    """
    if configs is None:
        configs = [path for path in folder.iterdir() if _matches(path.name, _CODE_NAMED_IN)]
    named: set[str] = set()
    for path in configs:
        auto_map = read_json(path, "the configuration of a tokenizer or processor").get("auto_map")
        named |= set(_CLASS.findall(json.dumps(auto_map, ensure_ascii=False)))
    found: set[str] = set()
    while named:
        files = {f"{name}.py" for name in named} - found - {CODE_FILE}
        found |= files
        there = [folder / name for name in files if (folder / name).is_file()]
        named = {name for path in there for name in _IMPORTED.findall(path.read_text("utf-8", errors="replace"))}
    return found


def _users_groups(target: Path, cache_dir: str | None) -> _Groups:
    """The files in a folder that are not copies of the earlier recipient's, made by an earlier save."""
    found, path = _groups_in(target), target / "config.json"
    before = _recipient_named_in(path, target, cache_dir) if found and path.exists() else None
    return {group: files for group, files in found.items() if before is None or not _are_copies(files, before)}


def _recipient_named_in(config: Path, folder: Path | None, cache_dir: str | None) -> Path | None:
    """The folder of the recipient that an old `config.json` names; one in a repository can only name a Hub id."""
    fields = read_entry(config.parent) or {}
    name, revision = fields.get("recipient"), fields.get("recipient_revision")
    if not isinstance(name, str) or not name or "\0" in name:
        return None
    if revision is None and folder is not None:
        there = points_to_folder(name, Source(str(folder), folder))
        return at_hand(name, None, cache_dir) if there is None else there
    return at_hand(name, revision, cache_dir) if isinstance(revision, str) else None


def _are_copies(files: Mapping[str, Path], folder: Path) -> bool:
    return all(_equal(path, folder / name) for name, path in files.items())


def _equal(one: Path, other: Path) -> bool:
    return other.is_file() and one.stat().st_size == other.stat().st_size and one.read_bytes() == other.read_bytes()


def _without_stale_templates(files: dict[str, Path], recipients: Mapping[str, Path], target: Path) -> dict[str, Path]:
    """Leave out the recipient's named chat templates if the main template is not the recipient's.

    An earlier save put them there, and a tokenizer that is saved to the folder does not remove them.
    """
    if not {_TEMPLATE} <= files.keys() & recipients.keys() or _equal(files[_TEMPLATE], recipients[_TEMPLATE]):
        return files
    named = [name for name in files if name.startswith(f"{NAMED_TEMPLATES}/") and name in recipients]
    if stale := [name for name in named if _equal(files[name], recipients[name])]:
        logger.warning(
            f"{target} has its own chat template, so the recipient's named templates are not copied: "
            f"{', '.join(stale)}. Copy them there if you need them."
        )
    return {name: path for name, path in files.items() if name not in stale}
