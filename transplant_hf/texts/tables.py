"""Documents in the rows of tables: files with columns, and datasets on the Hub.

JSON and CSV are read by the standard library; Parquet and the Hub need the library `datasets`.
"""

from __future__ import annotations

import csv
import functools
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError, DataError, HubError
from ..sources import hub_errors

__all__ = ["hub_documents", "row_documents", "table_documents"]

_PREFERRED = "text"


def table_documents(kind: str, files: Sequence[Path], column: str | None) -> Iterator[str]:
    """Read files of one kind.

    Args:
        kind: "json", "jsonl", "csv" or "parquet".
        files: The files.
        column: The column with the text; `None` to look for it.

    Raises:
        DataError: No column of text, or a file that is not of its kind.
        ConfigurationError: The library `datasets` is needed and missing.
    """
    where = str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
    if kind == "parquet":
        library = _library(where)
        rows = _reading(functools.partial(_streamed, library, files), where, library)
    else:
        rows = itertools.chain.from_iterable(map(_ROWS[kind], files))
    yield from row_documents(rows, column, where)


def _streamed(library: Any, files: Sequence[Path]) -> Any:
    # Streaming: else every file would first be copied into the cache of that library.
    return library.load_dataset("parquet", data_files=[str(file) for file in files], split="train", streaming=True)


def _json_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    with _table(path):
        try:
            content = json.loads(path.read_bytes())
        except json.JSONDecodeError as error:
            if error.msg != "Extra data":  # else one object in each line, under this ending too
                raise
            content = None
    if content is None:
        yield from _jsonl_rows(path)
        return
    for number, row in enumerate(content if isinstance(content, list) else [content]):
        yield _object(row, f"row {number} of {path}")


def _jsonl_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    with _table(path), path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.isspace():
                yield _object(json.loads(line), f"line {number} of {path}")


def _csv_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    with _table(path), path.open(encoding="utf-8-sig", newline="") as file:
        yield from csv.DictReader(file, restkey="", strict=True)


_ROWS = {"json": _json_rows, "jsonl": _jsonl_rows, "csv": _csv_rows}


def _object(row: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(row, Mapping):
        raise DataError(f"{where} is no JSON object with columns, but a {type(row).__name__}.")
    return row


@contextmanager
def _table(path: Path) -> Iterator[None]:
    """Turn what reading a file may raise into one sentence."""
    try:
        yield
    except csv.Error as error:
        raise DataError(f"{path} cannot be read as CSV: {error}. Write it as .jsonl, or mend it.") from error
    except (ValueError, OSError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as a table of text: {error}") from error


def hub_documents(
    name: str,
    *,
    split: str,
    column: str | None,
    config: str | None,
    revision: str | None,
    streaming: bool,
    token: str | bool | None,
) -> Iterator[str]:
    """Read a dataset on the Hub.

    Args:
        name: Its id.
        split: Which split, or a slice of it.
        column: The column with the text; `None` to look for it.
        config: Which configuration.
        revision: Branch, tag or commit.
        streaming: Do not wait for the whole of it.
        token: As in `from_pretrained`.

    Raises:
        DataError: No such split, configuration or column.
        HubError: It is missing, gated or out of reach.
        ConfigurationError: The library `datasets` is missing.
    """
    where = f"{name}@{revision}" if revision else name
    library = _library(where)
    try:
        with hub_errors(name, revision):
            rows = library.load_dataset(name, config, split=split, revision=revision, streaming=streaming, token=token)
    except library.exceptions.DataFilesNotFoundError as error:
        raise DataError(f"{where} holds no data that can be read: {error}") from error
    except FileNotFoundError as error:
        raise HubError(
            f"{where} is neither a file or folder here nor a dataset on the Hub that can be read: it is missing, "
            f"private or gated. Check the name, or log in with `hf auth login` or pass token=. {error}"
        ) from error
    except (ValueError, library.exceptions.DatasetsError) as error:
        raise DataError(f"split {split!r} of {where} cannot be read: {error}") from error
    yield from row_documents(_reading(lambda: rows, where, library), column, where)


def row_documents(rows: Iterable[Mapping[str, Any]], column: str | None, where: str) -> Iterator[str]:
    """Take the text out of rows; those without any are left out.

    Args:
        rows: Each has its columns by name.
        column: The column with the text; `None` to look for it.
        where: What to call the rows in messages.

    Raises:
        DataError: No column of text, listing those there are.
    """
    chosen = column
    for number, row in enumerate(rows):
        if number == 0:
            chosen = _chosen_column(row, column, where)
        text = row.get(chosen or "")
        if text is not None and not isinstance(text, str):
            raise DataError(f"row {number} of {where} has no text in column {chosen!r}, but a {type(text).__name__}.")
        if text:
            yield text


def _chosen_column(row: Mapping[str, Any], column: str | None, where: str) -> str:
    if column is None and _PREFERRED in row:
        return _PREFERRED
    if column is not None:
        if column not in row:
            raise DataError(f"{where} has no column {column!r}; its columns are {', '.join(row)}.")
        return column
    # An empty place says nothing of its column: it may hold text further on.
    strings = [name for name, value in row.items() if value is None or (isinstance(value, str) and not _number(value))]
    if len(strings) != 1:
        found = "several columns of text" if strings else "no column of text"
        raise DataError(
            f"{where} has {found}; its columns are {', '.join(row)}. Say which one to read: column={next(iter(row))!r} "
            "or another."
        )
    return strings[0]


def _number(text: str) -> bool:
    try:  # a table without types, such as CSV, has numbers as text
        float(text)
    except ValueError:
        return False
    return True


def _reading(opened: Callable[[], Iterable[Any]], where: str, library: Any) -> Iterator[Any]:
    """Turn what reading may raise into one sentence."""
    try:
        with hub_errors(where):
            yield from opened()
    except (ValueError, OSError, library.exceptions.DatasetsError) as error:
        raise DataError(f"{where} cannot be read as a table of text: {error}") from error


def _library(where: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ConfigurationError(
            f"reading {where} needs the library datasets: pip install datasets. Files that end in .txt, .md, .json, "
            ".jsonl or .csv need nothing."
        ) from error
    return datasets
