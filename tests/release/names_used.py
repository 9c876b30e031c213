"""Which names of Transformers that nobody promises the package uses, found by reading its source."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

__all__ = ["names_used", "private_names_of"]

_PRIVATE = re.compile(r"_[A-Za-z]\w*")
# Documented, although it is reached through a submodule.
_PUBLIC = {("transformers.utils", "logging")}


def names_used(package: Path, theirs: Iterable[str] = ()) -> dict[str, list[str]]:
    """Return what a package uses of Transformers beyond its public names, and where.

    That is: what it imports from anywhere but `transformers` itself; attributes with a leading underscore that it does
    not define itself, read from an object or named in a string as for `getattr`; and those that it defines, where
    Transformers has one of that name, which may then be overridden.

    Args:
        package: The package's folder.
        theirs: The private names that classes of Transformers have.

    Returns:
        `{name: files}`.
    """
    defined: set[str] = set()
    found: dict[str, set[str]] = defaultdict(set)
    private: dict[str, set[str]] = defaultdict(set)
    for path in sorted(package.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        file = path.relative_to(package).as_posix()
        for name in _imported(tree):
            found[name].add(file)
        for name in _defined(tree):
            defined.add(name)
            if name in theirs:
                private[name].add(file)
        for name in _read(tree):
            private[name].add(file)
    found.update({name: files for name, files in private.items() if name not in defined or name in theirs})
    return {name: sorted(files) for name, files in sorted(found.items())}


def private_names_of(classes: Iterable[Any]) -> set[str]:
    """Return the names with one leading underscore that classes have."""
    return {name for owner in classes for name in dir(owner) if _PRIVATE.fullmatch(name)}


def _imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("transformers."))
        elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith("transformers."):
            yield from (alias.name for alias in node.names if (node.module, alias.name) not in _PUBLIC)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module == "transformers":
            yield from (alias.name for alias in node.names if _PRIVATE.fullmatch(alias.name))


def _defined(tree: ast.AST) -> Iterator[str]:
    """Private names of functions, classes, variables, and attributes that are set on `self`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            name = node.id
        elif _is_set_on_self(node):
            name = node.attr  # type: ignore[attr-defined]
        else:
            continue
        if _PRIVATE.fullmatch(name):
            yield name


def _read(tree: ast.AST) -> Iterator[str]:
    """Private names of attributes, and strings that could be such names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not _is_set_on_self(node):
            name = node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            name = node.value
        else:
            continue
        if _PRIVATE.fullmatch(name):
            yield name


def _is_set_on_self(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    )
