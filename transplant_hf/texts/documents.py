"""Documents from a file, a folder of files, or a dataset on the Hub.

Files are opened by their exact names. The library `datasets`, which reads the Hub, would take `a[1].jsonl` as a
pattern.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import DataError, HubError
from ..sources import LOG_IN, at_revision, hub_errors

__all__ = ["TextSource", "as_source", "check_texts", "documents", "row_documents"]

# The format of each kind of file; "text" is read whole, the others are tables.
_FORMATS = {".txt": "text", ".md": "text", ".json": "json", ".jsonl": "jsonl", ".parquet": "parquet", ".csv": "csv"}
# A file belongs to the split that a word in its path names, and else to "train".
_SPLIT_OF_WORD = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_SPECIFICATION = re.compile(r"(?:(?P<name>[^/\\=:]+)=)?(?P<data>.+?)(?::(?P<split>\w[\w.+-]*(?:\[[^\]]*\])?))?")


@dataclasses.dataclass(frozen=True)
class TextSource:
    """A text: a file, a folder of files, or a dataset on the Hub, and which part of it to read.

    In a folder, a file belongs to the split that a word of its path names, such as `test` in `wikitext-test.txt`, and
    else to "train". A single file is read whole, whatever its name.

    Args:
        data: A .txt, .md, .json, .jsonl, .parquet or .csv file, a folder of those, or the Hub id of a dataset.
        split: The split to read. For a dataset on the Hub also a slice, such as "train[:10%]".
        column: The column with the text. Default: "text", or else the only column of strings.
        config: The configuration of a dataset on the Hub.
        revision: The branch, tag or commit of a dataset on the Hub.
        streaming: Read a dataset on the Hub while it is downloaded, and stop the download when there is enough text.
        name: The name of the text in results. Default: the last part of `data` without its suffix.

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
            last = Path(self.data.rstrip("/\\"))
            object.__setattr__(self, "name", (last.stem if last.suffix in _FORMATS else last.name) or self.data)

    @classmethod
    def parse(cls, text: str, **fields: Any) -> TextSource:
        """Parse `[NAME=]DATA[:SPLIT]`, the form that the command line uses.

        Args:
            text: The specification. The path of an existing file or folder is taken as it is.
            **fields: Further fields of the source.

        Raises:
            DataError: The specification is empty.

        Example:
            >>> TextSource.parse("law=user/cases:test[:1000]")
            TextSource(data='user/cases', split='test[:1000]', ..., name='law')
            >>> TextSource.parse("./a=b/notes.txt").data
            './a=b/notes.txt'
        """
        match = _SPECIFICATION.fullmatch(text)
        if text and Path(text).exists():
            return cls(text, **fields)
        if match is None:
            raise DataError(f"{text!r} is not a text. Write DATA, NAME=DATA, DATA:SPLIT or NAME=DATA:SPLIT.")
        name, data, split = match["name"], match["data"], match["split"]
        if split is not None and Path(f"{data}:{split}").exists():
            data, split = f"{data}:{split}", None
        parsed = {key: value for key, value in (("name", name), ("split", split)) if value is not None}
        return cls(data, **{**fields, **parsed})

    @property
    def unused(self) -> list[str]:
        """The fields that are given although the text is a file or folder that they say nothing about."""
        path = Path(self.data).expanduser()
        in_tables = () if path.is_dir() or _FORMATS.get(path.suffix) != "text" else ("column",)
        names = ("config", "revision", *in_tables) if path.exists() else ()
        return [name for name in names if getattr(self, name) is not None]


def documents(source: TextSource, token: str | bool | None = None) -> Iterator[str]:
    r"""Read the documents of a text lazily.

    A text file is one document, with its line breaks; in a table, each row is one. Empty documents are skipped.

    Args:
        source: The text.
        token: As in `from_pretrained`, for a dataset on the Hub.

    Returns:
        An iterator over the documents.

    Raises:
        DataError: The file or split does not exist, has no column of text, or is not text.
        HubError: The dataset cannot be found or reached.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "poem.txt")
        >>> _ = path.write_text("Tiger, tiger,\nburning bright")
        >>> list(documents(TextSource(path)))
        ['Tiger, tiger,\nburning bright']
    """
    found = _local_documents(source)
    return _hub_documents(source, token) if found is None else found


def _local_documents(source: TextSource) -> Iterator[str] | None:
    """Return the documents of files; `None` for a dataset on the Hub."""
    path = Path(source.data).expanduser()
    if path.exists():
        if source.unused:
            raise DataError(
                f"{path} is not a {'table' if source.unused == ['column'] else 'dataset on the Hub'}: leave out "
                f"{', '.join(source.unused)}."
            )
        return _file_documents(_files_of_split(path, source.split), source.column)
    is_path = path.is_absolute() or source.data.startswith((".", "~")) or source.data.count("/") > 1
    if is_path or path.suffix in _FORMATS:
        raise DataError(f"there is no file or folder {source.data!r}. Check the path.")
    return None


def as_source(data: Any) -> Any:
    """Return the `TextSource` that a string or path names; anything else is returned unchanged."""
    return TextSource.parse(os.fspath(data)) if isinstance(data, str | os.PathLike) else data


def check_texts(*texts: Any) -> None:
    """Refuse files of text that are missing, unreadable or empty, before a model is loaded.

    What is not a file is checked when it is read; `{name: text}` stands for its texts.
    """
    for text in texts:
        source = as_source(text)
        if isinstance(source, Mapping):
            check_texts(*source.values())
        elif isinstance(source, TextSource):
            found = _local_documents(source)
            if found is not None and next(found, None) is None:
                raise DataError(f"{source.data} is empty: it has no text.")


def row_documents(rows: Iterable[Mapping[str, Any]], column: str | None, where: str) -> Iterator[str]:
    """Yield the text of each row, without the empty ones."""
    text_column = column
    for number, row in enumerate(rows):
        text_column = text_column or _text_column(row, where)
        if number == 0 and text_column not in row:
            raise DataError(f"{where} has no column {text_column!r}; its columns are {', '.join(row)}.")
        text = row.get(text_column)
        if text is not None and not isinstance(text, str):
            raise DataError(f"row {number} of {where}: column {text_column!r} is not text but {type(text).__name__}.")
        if text:
            yield text


def _text_column(row: Mapping[str, Any], where: str) -> str:
    if "text" in row:
        return "text"
    # An empty cell says nothing about its column: there may be text further down.
    columns = [
        name for name, value in row.items() if value is None or (isinstance(value, str) and not _is_number(value))
    ]
    if len(columns) != 1:
        problem = "several columns of text" if columns else "no column of text"
        raise DataError(
            f"{where} has {problem}; its columns are {', '.join(row)}. Choose one with column= (--column), such as "
            f"{next(iter(row))!r}."
        )
    return columns[0]


def _is_number(text: str) -> bool:
    try:  # CSV has no types: its numbers are text too
        float(text)
    except ValueError:
        return False
    return True


def _files_of_split(path: Path, split: str) -> list[Path]:
    """The text files of a split, sorted."""
    suffixes = ", ".join(_FORMATS)
    if path.is_file():
        if path.suffix not in _FORMATS:
            raise DataError(f"{path} cannot be read as text: its name must end in one of {suffixes}.")
        if split != "train":
            raise DataError(f"{path} is a single file and has no split {split!r}. Leave the split out.")
        return [path]
    files = {
        file: _split_of(file.relative_to(path))
        for file in sorted(path.rglob("*"))
        if file.suffix in _FORMATS and file.is_file()
        if not any(part.startswith(".") for part in file.relative_to(path).parts)
    }
    if not files:
        raise DataError(f"{path} contains no text: no file name ends in one of {suffixes}.")
    chosen = [file for file, file_split in files.items() if file_split == _SPLIT_OF_WORD.get(split, split)]
    if not chosen:
        raise DataError(f"{path} has no split {split!r}, only {', '.join(sorted({*files.values()}))}.")
    return chosen


def _split_of(path: Path) -> str:
    words = re.split(r"[^a-z]+", str(path).lower())
    return next((_SPLIT_OF_WORD[word] for word in reversed(words) if word in _SPLIT_OF_WORD), "train")


def _file_documents(files: Sequence[Path], column: str | None) -> Iterator[str]:
    for file in files:
        if _FORMATS[file.suffix] == "text":
            yield from filter(None, [_read_text(file)])
            continue
        rows = _table_rows(file)
        first = next(rows, None)
        if first is not None:
            column = column or _text_column(first, str(file))  # the same one in all files
            yield from row_documents(itertools.chain([first], rows), column, str(file))


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text in UTF-8 ({error}). Convert it first.") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}.") from error


def _table_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """Read a table row by row."""
    try:
        yield from _ROW_READERS[_FORMATS[path.suffix]](path)
    except (ValueError, OSError, RecursionError, csv.Error) as error:
        raise DataError(f"cannot read {path} as a table of text: {error}") from error


def _jsonl_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.isspace():
                yield _json_object(json.loads(line), f"line {number} of {path}")


def _json_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        content = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":  # otherwise one object in each line, which some write with this suffix
            raise
        yield from _jsonl_rows(path)
        return
    for number, row in enumerate(content if isinstance(content, list) else [content]):
        yield _json_object(row, f"row {number} of {path}")


def _json_object(row: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(row, Mapping):
        raise DataError(f"{where} is not an object with columns, but a {type(row).__name__}.")
    return row


def _csv_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        for row in reader:
            if None in row:
                raise DataError(
                    f"line {reader.line_num} of {path} has more cells than columns. Put text with commas in quotes."
                )
            yield row


def _parquet_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    from pyarrow.parquet import ParquetFile

    for batch in ParquetFile(path).iter_batches():
        yield from batch.to_pylist()


_ROW_READERS = {"json": _json_rows, "jsonl": _jsonl_rows, "csv": _csv_rows, "parquet": _parquet_rows}


def _hub_documents(source: TextSource, token: str | bool | None) -> Iterator[str]:
    import datasets

    where = at_revision(source.data, source.revision)
    try:
        with hub_errors(source.data, source.revision):
            rows = datasets.load_dataset(
                source.data,
                source.config,
                split=source.split,
                revision=source.revision,
                streaming=source.streaming,
                token=token,
            )
            yield from row_documents(rows, source.column, where)
    except datasets.exceptions.DataFilesNotFoundError as error:
        raise DataError(f"{where} contains no data files: {error}") from error
    except FileNotFoundError as error:
        raise HubError(
            f"{where} is neither a local file or folder nor a dataset on the Hub that can be read: it is missing, "
            f"private or gated. Check the name, or {LOG_IN}. {error}"
        ) from error
    except (ValueError, TypeError, OSError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"cannot read split {source.split!r} of {where}: {error}") from error
