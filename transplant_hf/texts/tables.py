"""Documents in the rows of tables: files with columns, and datasets on the Hub, read by the library `datasets`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError, DataError, HubError
from ..sources import hub_errors

__all__ = ["hub_documents", "row_documents", "table_documents"]

_PREFERRED = "text"


def table_documents(kind: str, files: Sequence[Path], column: str | None) -> Iterator[str]:
    """Read files of one kind.

    Args:
        kind: "json", "parquet" or "csv".
        files: The files.
        column: The column with the text; `None` to look for it.

    Raises:
        DataError: No column of text, or a file that is not of its kind.
        ConfigurationError: The library `datasets` is missing.
    """
    where = str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
    library = _library(where)
    yield from row_documents(
        _reading(functools.partial(_streamed, library, kind, files), where, library), column, where
    )


def _streamed(library: Any, kind: str, files: Sequence[Path]) -> Any:
    # Streaming: else every file would first be copied into the cache of that library.
    return library.load_dataset(kind, data_files=[str(file) for file in files], split="train", streaming=True)


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
    strings = [name for name, value in row.items() if value is None or isinstance(value, str)]
    if len(strings) != 1:
        found = "several columns of text" if strings else "no column of text"
        raise DataError(
            f"{where} has {found}; its columns are {', '.join(row)}. Say which one to read: column={next(iter(row))!r} "
            "or another."
        )
    return strings[0]


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
            f"reading {where} needs the library datasets: pip install 'transplant_hf[train]'. Plain .txt and .md files "
            "need nothing."
        ) from error
    return datasets
