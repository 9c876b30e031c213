"""The texts that every Python installation carries: language reference, docstrings and source code."""

from __future__ import annotations

import ast
import hashlib
import importlib
import os
import re
import tokenize
from dataclasses import dataclass
from pathlib import Path

from ..errors import TransplantError

__all__ = ["PARAGRAPH", "Document", "english_documents", "source_documents"]

PARAGRAPH = re.compile(r"\n[ \t]*\n")
# Tests, installed packages, generated tables and what newer Pythons have dropped: these vary most.
_SKIPPED_FOLDERS = frozenset(
    [
        *(
            "__pycache__",
            "distutils",
            "encodings",
            "ensurepip",
            "idlelib",
            "lib-dynload",
            "lib2to3",
            "msilib",
        ),
        *("pydoc_data", "site-packages", "dist-packages", "test", "tests", "tkinter", "turtledemo"),
    ]
)
_SKIPPED_PREFIXES = ("_sysconfigdata", "__phello__", "antigravity", "this")
_SHORTEST_DOCSTRING = 80


@dataclass(frozen=True)
class Document:
    """One text with the name that decides on its place.

    Args:
        name: Unique name, for example `topics/while`.
        text: The text itself.
    """

    name: str
    text: str


def english_documents() -> list[Document]:
    """Topics of the language reference, and docstrings of three quarters of the standard library's files.

    Returns:
        The documents in a fixed order that mixes both.

    Raises:
        TransplantError: The installation has no language reference or no standard library source.
    """
    topics = _topics()
    docstrings = [_docstrings(name, path) for name, path in _library_files() if not _is_source(name)]
    return _in_digest_order(topics + docstrings)


def source_documents() -> list[Document]:
    """Source code of the files whose docstrings are no English text: no docstring belongs to both domains.

    Returns:
        The documents in a fixed order.

    Raises:
        TransplantError: The installation has no standard library source.
    """
    files = [(name, path) for name, path in _library_files() if _is_source(name)]
    return _in_digest_order([Document(f"source/{name}", _read(path)) for name, path in files])


def _in_digest_order(documents: list[Document]) -> list[Document]:
    """Shuffle by name, so that the order depends neither on a seed nor on what else is installed."""
    return sorted(documents, key=lambda document: hashlib.sha256(document.name.encode()).digest())


def _is_source(name: str) -> bool:
    """Whether a file of the standard library is source (or gives its docstrings to the English text)."""
    return hashlib.sha256(b"role:" + name.encode()).digest()[0] % 4 == 0


def _topics() -> list[Document]:
    """CPython's language reference, one document per topic."""
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except (ImportError, AttributeError) as error:
        raise TransplantError(
            "The demo trains on the language reference that comes with Python (module pydoc_data.topics), "
            "which this installation lacks. Install the complete standard library or use another Python."
        ) from error
    return [Document(f"topics/{name}", text) for name, text in sorted(topics.items())]


def _library_files() -> list[tuple[str, Path]]:
    """Python files of the standard library as (name with forward slashes, path), sorted by name."""
    library = Path(os.path.dirname(os.__file__))
    found = []
    for root, folders, names in os.walk(library):
        folders[:] = sorted(f for f in folders if f not in _SKIPPED_FOLDERS and not f.startswith("config-"))
        for name in sorted(names):
            if name.endswith(".py") and not name.startswith(_SKIPPED_PREFIXES):
                path = Path(root, name)
                found.append((path.relative_to(library).as_posix(), path))
    if not found:
        raise TransplantError(
            f"The demo trains on the standard library's source, but {library} has no Python files. "
            "Use a Python installation that includes them."
        )
    return found


def _read(path: Path) -> str:
    """Text of a Python file in its declared encoding; empty where it cannot be decoded."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError):
        return ""


def _docstrings(name: str, path: Path) -> Document:
    """Longer docstrings of a file, without examples of interactive sessions."""
    try:
        tree = ast.parse(_read(path))
    except (SyntaxError, ValueError):
        return Document(f"docstrings/{name}", "")
    kept = []
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        docstring = ast.get_docstring(node)
        if docstring and len(docstring) >= _SHORTEST_DOCSTRING:
            kept += [paragraph for paragraph in PARAGRAPH.split(docstring) if ">>>" not in paragraph]
    return Document(f"docstrings/{name}", "\n\n".join(kept))
