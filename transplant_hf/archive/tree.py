"""What a `.pt` file holds, flattened: every tensor and every plain value under a dotted name."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from ..errors import CheckpointError
from .descriptions import Inert, TensorRef

__all__ = ["Content", "flatten"]

_DEEPEST = 64
_MOST_STEPS = 1 << 22
_LONGEST_NAME = 4096
_MOST_BITS = 4096


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
    walk = _Walk(what)
    walk.enter(content, "", 0)
    return walk.flat


class _Walk:
    """Goes through a tree that may hold the same part any number of times, itself included."""

    def __init__(self, what: str) -> None:
        self.flat = Content({}, {}, set())
        self._what = what
        self._left = _MOST_STEPS

    def enter(self, value: Any, name: str, depth: int) -> None:
        self._spend(1 + len(name) // 16)
        if depth > _DEEPEST or len(name) > _LONGEST_NAME:
            raise CheckpointError(
                f"{self._what} is nested without end: {name[:80]!r}... is {depth} deep and its name {len(name)} long; "
                "no donor is. Save the layers' state dicts alone."
            )
        if isinstance(value, TensorRef):
            self._keep(name, value)
        elif isinstance(value, Inert):
            self.flat.classes.add(value.made_of)
            self._enter_all(self._module_children(value.state), name, depth)
        elif isinstance(value, dict):
            self._spend(len(value))
            self._enter_all(((key, child) for key, child in value.items() if isinstance(key, str | int)), name, depth)
        elif isinstance(value, list | tuple):
            self._spend(len(value))
            if all(isinstance(item, int | float | str | None) for item in value):
                self._keep_values(name, list(value), value)
            else:
                self._enter_all(enumerate(value), name, depth)
        else:
            self._keep_values(name, value, (value,))

    def _enter_all(self, children: Iterable[tuple[str | int, Any]], name: str, depth: int) -> None:
        for key, child in children:
            self.enter(child, f"{name}.{key}" if depth else str(key), depth + 1)

    def _module_children(self, state: Any) -> list[tuple[str | int, Any]]:
        """What `nn.Module.state_dict` would hold: parameters, buffers that are saved, and sub-modules."""
        if not isinstance(state, dict) or not isinstance(state.get("_modules"), dict):
            return []
        unsaved = state.get("_non_persistent_buffers_set")
        unsaved = unsaved if isinstance(unsaved, set | frozenset) else ()
        children: list[tuple[str | int, Any]] = []
        for part in ("_parameters", "_buffers", "_modules"):
            held = state.get(part)
            if isinstance(held, dict):
                self._spend(len(held))
                children += [
                    (key, child)
                    for key, child in held.items()
                    if isinstance(key, str) and child is not None and not (part == "_buffers" and key in unsaved)
                ]
        return children

    def _keep_values(self, name: str, kept: Any, values: Iterable[Any]) -> None:
        bits = max((value.bit_length() for value in values if isinstance(value, int)), default=0)
        if bits > _MOST_BITS:  # Python refuses to print it
            raise CheckpointError(f"{self._what} holds a number of {bits} bits, named {name[:80]!r}; no donor does.")
        self.flat.values[name] = kept

    def _keep(self, name: str, tensor: TensorRef) -> None:
        if not name.isprintable():
            raise CheckpointError(f"{self._what}: a tensor's name {name[:80]!r} has characters that cannot be printed.")
        if self.flat.tensors.setdefault(name, tensor) != tensor:
            raise CheckpointError(f"{self._what} holds two tensors named {name!r}; save the file again with one.")

    def _spend(self, steps: int) -> None:
        self._left -= steps
        if self._left < 0:
            raise CheckpointError(
                f"{self._what} is nested without end or takes over {_MOST_STEPS} steps to go through; no donor does. "
                "Save the layers' state dicts alone."
            )
