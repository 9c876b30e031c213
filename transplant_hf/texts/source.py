"""Where text is: a file, a folder of files, or a dataset on the Hub; read one document after the other."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import DataError
from .tables import hub_documents, table_documents

__all__ = ["TextSource", "documents"]

# How a file is read: whole, or as a table of that kind.
_WHOLE = "whole"
_KINDS = {".txt": _WHOLE, ".md": _WHOLE, ".json": "json", ".jsonl": "jsonl", ".parquet": "parquet", ".csv": "csv"}
# Words in the path of a file that say which split of its folder it belongs to.
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_SPECIFICATION = re.compile(r"(?:(?P<name>[^/\\=:]+)=)?(?P<data>.+?)(?::(?P<split>\w[\w.+-]*(?:\[[^\]]*\])?))?")


@dataclasses.dataclass(frozen=True)
class TextSource:
    """Where text is, and which part of it is meant.

    In a folder, a file belongs to the split that a word of its path names, such as `test` in `wikitext-test.txt`, and
    else to "train". A single file is read whole, whatever its name.

    Args:
        data: A .txt, .md, .json, .jsonl, .parquet or .csv file, a folder of those, or the Hub id of a dataset.
        split: Which split of it; of a dataset on the Hub also a slice, such as "train[:10%]".
        column: The column that holds the text; by default "text", or else the only one that holds strings.
        config: The configuration of a dataset on the Hub.
        revision: Its branch, tag or commit.
        streaming: Read a dataset on the Hub while it is downloaded, and no further than needed.
        name: What to call it; by default the last part of `data` without its suffix.

    Example:
        >>> TextSource("corpora/law.jsonl", column="body").name
        'law'
    """

    data: str
    split: str = "train"
    column: str | None = None
    config: str | None = None
    revision: str | None = None
    streaming: bool = False
    name: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", os.fspath(self.data))
        if self.name is None:
            last = Path(self.data.rstrip("/\\")).name
            known = Path(last).suffix in _KINDS
            object.__setattr__(self, "name", (Path(last).stem if known else last) or self.data)

    @classmethod
    def parse(cls, text: str, **fields: Any) -> TextSource:
        """Read what a command line says: `name=data:split`, of which name and split may be left out.

        Args:
            text: The words; a path that exists is taken as it is, whatever signs are in it.
            **fields: Further fields.

        Raises:
            DataError: Nothing is said.

        Example:
            >>> TextSource.parse("law=user/cases:test[:1000]")
            TextSource(data='user/cases', split='test[:1000]', ..., name='law')
            >>> TextSource.parse("./a=b/notes.txt").data
            './a=b/notes.txt'
        """
        found = _SPECIFICATION.fullmatch(text)
        if text and Path(text).exists():
            return cls(text, **fields)
        if found is None:
            raise DataError(f"{text!r} names no text. Write DATA, NAME=DATA, DATA:SPLIT or NAME=DATA:SPLIT.")
        name, data, split = found["name"], found["data"], found["split"]
        if split is not None and Path(f"{data}:{split}").exists():
            data, split = f"{data}:{split}", None
        named = {key: value for key, value in (("name", name), ("split", split)) if value is not None}
        return cls(data, **{**fields, **named})

    def __str__(self) -> str:
        parts = [self.data, *([f"config {self.config}"] if self.config else []), f"split {self.split}"]
        return ", ".join(parts) + (f" @{self.revision}" if self.revision else "")


def documents(source: TextSource, token: str | bool | None = None) -> Iterator[str]:
    r"""Read the documents of a source, one after the other.

    A text file is one document, its line breaks kept; a table has one in each row. Empty ones are left out.

    Args:
        source: Where they are.
        token: As in `from_pretrained`.

    Returns:
        The documents, read when they are asked for.

    Raises:
        DataError: No such file or split, no column of text, or bytes that are no text.
        ConfigurationError: The library `datasets` is needed and missing.
        HubError: The dataset is missing, gated or out of reach.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "poem.txt")
        >>> _ = path.write_text("Tiger, tiger,\nburning bright")
        >>> list(documents(TextSource(path)))
        ['Tiger, tiger,\nburning bright']
    """
    path = Path(source.data).expanduser()
    if path.exists():
        return _of_files(_files(path, source.split), source)
    looks_local = path.is_absolute() or source.data.startswith((".", "~")) or source.data.count("/") > 1
    if looks_local or path.suffix in _KINDS:
        raise DataError(f"there is no file or folder {source.data!r}. Check the path.")
    return hub_documents(
        source.data,
        split=source.split,
        column=source.column,
        config=source.config,
        revision=source.revision,
        streaming=source.streaming,
        token=token,
    )


def _files(path: Path, split: str) -> list[Path]:
    """The files of a split, sorted."""
    known = ", ".join(_KINDS)
    if path.is_file():
        if path.suffix not in _KINDS:
            raise DataError(f"{path} is of a kind that is not read as text; known are {known}.")
        if split != "train":
            raise DataError(f"{path} is one file and has no split {split!r}. Leave the split out.")
        return [path]
    parts = [(file, file.relative_to(path)) for file in path.rglob("*") if file.suffix in _KINDS and file.is_file()]
    found = {file: _split_of(inside) for file, inside in sorted(parts) if not _hidden(inside)}
    if not found:
        raise DataError(f"there is no text in {path}: no file ends in {known}.")
    files = [file for file, belongs in found.items() if belongs == _SPLITS.get(split, split)]
    if not files:
        raise DataError(f"{path} has no split {split!r}, only {', '.join(sorted({*found.values()}))}.")
    return files


def _split_of(path: Path) -> str:
    words = re.split(r"[^a-z]+", str(path).lower())
    return next((_SPLITS[word] for word in reversed(words) if word in _SPLITS), "train")


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _of_files(files: list[Path], source: TextSource) -> Iterator[str]:
    for kind, group in itertools.groupby(files, key=lambda file: _KINDS[file.suffix]):
        if kind == _WHOLE:
            yield from filter(None, map(_read, group))
        else:
            yield from table_documents(kind, list(group), source.column)


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text in UTF-8 ({error}). Convert it first.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
