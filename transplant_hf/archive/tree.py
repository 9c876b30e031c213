"""What a `.pt` file holds, flattened: every tensor and every plain value under a dotted name."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from ..errors import CheckpointError
from .unpickle import Inert, TensorRef

__all__ = ["Content", "flatten"]

_DEEPEST = 64
_MOST_ENTRIES = 1_000_000


@dataclasses.dataclass(frozen=True)
class Content:
    """A flattened file.

    Args:
        tensors: Descriptions of tensors, by dotted name.
        values: Numbers, texts, and lists of them, by dotted name.
        classes: The classes of other objects, which were not made.
    """

    tensors: dict[str, TensorRef]
    values: dict[str, Any]
    classes: set[str]


def flatten(content: Any, what: str) -> Content:
    """Walk through dictionaries, lists and pickled modules.

    Args:
        content: What `inert_load` returned.
        what: The file, for messages.

    Raises:
        CheckpointError: Nested too deeply or without end, or two tensors of one name.
    """
    flat = Content({}, {}, set())
    for count, (path, value) in enumerate(_walk(content, ())):
        if len(path) > _DEEPEST or count > _MOST_ENTRIES:
            raise CheckpointError(f"{what} is nested without end or holds over {_MOST_ENTRIES} entries; no donor is.")
        name = ".".join(path)
        if isinstance(value, TensorRef):
            if flat.tensors.get(name, value) != value:
                raise CheckpointError(f"{what} holds two tensors named {name!r}.")
            flat.tensors[name] = value
        elif isinstance(value, Inert):
            flat.classes.add(value.made_of)
        else:
            flat.values[name] = value
    return flat


def _walk(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if len(path) > _DEEPEST + 1:
        yield path, None
        return
    if _is_plain_list(value):
        yield path, list(value)
        return
    children = _children(value)
    if children is None:
        yield path, value
        return
    if isinstance(value, Inert):
        yield path, value
    for key, child in children:
        yield from _walk(child, (*path, *key.split(".")))


def _is_plain_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, int | float | str | None) for item in value)


def _children(value: Any) -> list[tuple[str, Any]] | None:
    if isinstance(value, dict):
        return [(str(key), child) for key, child in value.items() if isinstance(key, str | int)]
    if isinstance(value, list | tuple):
        return [(str(number), child) for number, child in enumerate(value)]
    if isinstance(value, Inert):
        return _module_children(value.state)
    return None


def _module_children(state: Any) -> list[tuple[str, Any]]:
    """What `nn.Module.state_dict` would hold: parameters, buffers that are saved, and sub-modules."""
    if not isinstance(state, dict) or not isinstance(state.get("_modules"), dict):
        return []
    unsaved = state.get("_non_persistent_buffers_set") or ()
    children: list[tuple[str, Any]] = []
    for part in ("_parameters", "_buffers", "_modules"):
        held = state.get(part)
        if isinstance(held, dict):
            children += [
                (str(key), child)
                for key, child in held.items()
                if child is not None and not (part == "_buffers" and key in unsaved)
            ]
    return children
