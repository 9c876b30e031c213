"""The demo's texts, from the running Python installation: English documentation and Python source code."""

from __future__ import annotations

import ast
import hashlib
import importlib
import json
import os
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

from ..errors import DataError

# These folders hold tests, installed packages, generated tables, or what newer versions of Python have removed.
_SKIPPED_FOLDERS = frozenset(
    "__pycache__ distutils encodings ensurepip idlelib lib-dynload lib2to3 msilib pydoc_data site-packages "  # noqa: SIM905
    "dist-packages test tests tkinter turtledemo".split()
)
_PARAGRAPH = re.compile(r"\n[ \t]*\n")
_MIN_DOCSTRING = 80  # characters
_MIN_COMPARED = 40  # characters: shorter paragraphs ("return self", "Examples:") recur everywhere


def write_texts(folder: Path, train_size: int, test_size: int) -> dict[str, Path]:
    """Write English and Python source code as .jsonl files, for training and for testing.

    English is the language reference and the docstrings of three quarters of the standard library; source is the code
    of the last quarter. No paragraph of a test text occurs in a training text.
    """
    texts = {"english": {**_reference_topics(), **_library(source=False)}, "source": _library(source=True)}
    split = {name: _hold_out(documents, test_size) for name, documents in texts.items()}
    seen = {key for test, _ in split.values() for text in test for key in _paragraph_keys(text)}
    parts = {f"{name}-train": _without_repeats(others, seen, train_size) for name, (_, others) in split.items()}
    parts |= {f"{name}-test": test for name, (test, _) in split.items()}
    for name, documents in parts.items():
        if not documents:
            raise DataError(f"this Python installation has too little {name.partition('-')[0]} text for the demo.")
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name}.jsonl" for name in parts}
    for name, path in files.items():
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in parts[name]), encoding="utf-8")
    return files


def _reference_topics() -> dict[str, str]:
    """The language reference that `help()` shows, one document for each topic."""
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except (ImportError, AttributeError) as error:
        raise DataError(
            "the demo needs Python's language reference (module pydoc_data.topics), which this installation lacks. "
            "Install the complete standard library, or use another Python."
        ) from error
    return {f"topics/{name}": text for name, text in topics.items()}


def _library(source: bool) -> dict[str, str]:
    """Source code, or docstrings, of the standard library; each file gives only one of the two."""
    library = Path(os.path.dirname(os.__file__))
    files = {}
    for root, folders, names in os.walk(library):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS and not name.startswith("config-")]
        for name in names:
            if name.endswith(".py") and not name.startswith(("_sysconfigdata", "__phello__", "antigravity", "this")):
                files[Path(root, name).relative_to(library).as_posix()] = Path(root, name)
    if not files:
        raise DataError(
            f"the demo needs the source of the standard library, but {library} has no Python files. Use a Python "
            "installation that includes them."
        )
    chosen = {name: path for name, path in files.items() if (_digest(f"role:{name}")[0] % 4 == 0) == source}
    return {f"library/{name}": _read(path) if source else _docstrings(path) for name, path in chosen.items()}


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _read(path: Path) -> str:
    """The text of a Python file in its declared encoding; empty if it cannot be decoded."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError):
        return ""


def _docstrings(path: Path) -> str:
    """The longer docstrings of a file, without interactive examples."""
    try:
        nodes = list(ast.walk(ast.parse(_read(path))))
    except (SyntaxError, ValueError):
        return ""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = [ast.get_docstring(node) or "" for node in nodes if isinstance(node, documented)]
    paragraphs = [part for text in docstrings if len(text) >= _MIN_DOCSTRING for part in _PARAGRAPH.split(text)]
    return "\n\n".join(part for part in paragraphs if ">>>" not in part)


def _hold_out(documents: dict[str, str], size: int) -> tuple[list[str], list[str]]:
    """Split documents into held-out and remaining ones, in an order that depends on their names alone."""
    # Neither one long document nor many nearly empty ones should make up the held-out text.
    shortest, longest = min(500, size), max(size // 4, 4000)
    held_out: list[str] = []
    remaining: list[str] = []
    for name in sorted(documents, key=_digest):
        text = documents[name]
        wanted = sum(map(len, held_out)) < size and shortest <= len(text) <= longest
        (held_out if wanted else remaining).append(text)
    return held_out, remaining


def _paragraph_keys(text: str) -> Iterator[str]:
    """The longer paragraphs of a text, with white space joined, for comparison."""
    for paragraph in _PARAGRAPH.split(text):
        key = " ".join(paragraph.split())
        if len(key) >= _MIN_COMPARED:
            yield key


def _without_repeats(documents: list[str], held_out: set[str], size: int) -> list[str]:
    """Drop paragraphs that are held out or occurred before, up to a number of characters."""
    seen = set(held_out)
    kept_documents: list[str] = []
    remaining = size
    for text in documents:
        kept = []
        for paragraph in _PARAGRAPH.split(text):
            keys = set(_paragraph_keys(paragraph))
            if seen.isdisjoint(keys):
                seen |= keys
                kept.append(paragraph)
        document = "\n\n".join(kept)[:remaining]
        if document.strip():
            kept_documents.append(document)
            remaining -= len(document)
        if remaining <= 0:
            break
    return kept_documents
