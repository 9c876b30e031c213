"""The layers of a donor run only on the rows of a batch that use the donor.

Rows that do not use it pass through a layer as they are, and its cache does not hold them. A donor that no row uses
does not run. This only saves work: the hooks of `strength` leave out what was not chosen. So wherever a layer's
arguments, its output or its cache are of another kind than those known here, the layer runs on all rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import Cache
from transformers.utils.output_capturing import _active_collector

from .calls import arguments_by_name
from .choice import Rows
from .output_form import OutputForm
from .rows_cache import hold_rows
from .using import CallChoices

_ROWS = "_transplant_rows"
_NATIVE = "_transplant_native"  # of a class that runs by row: the class that it was made of
# Arguments of layers with the batch in their first dimension, or 1 for all rows, and how many dimensions they have.
_BATCH_FIRST = {"hidden_states": (3,), "attention_mask": (2, 4), "position_ids": (2,), "position_embeddings": (3,)}
_SAME_FOR_ALL_ROWS = ("cache_position",)


class DonorRows:
    """What the layers of a donor need to know about rows.

    Args:
        name: The donor's name.
        choices: The donors that calls choose.
        form: How the layers of the model return their hidden state.
    """

    def __init__(self, name: str, choices: CallChoices, form: OutputForm) -> None:
        self.name, self.choices, self.form = name, choices, form

    def forward(self, layer: nn.Module, native: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        """Run a layer on the rows that use the donor."""
        if _traced() or layer.training or _records(kwargs):
            return native(layer, *args, **kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        choice = self.choices.of_layer(hidden)
        rows = choice.rows(self.name, hidden) if choice is not None else None
        if rows is None or not self.form.known:
            output = native(layer, *args, **kwargs)
            self.form.learn(output)
            return output
        given = arguments_by_name(layer, args, kwargs)
        if any(is_another_stream(value, hidden) for value in given.values()):
            return native(layer, *args, **kwargs)
        narrowed = given if rows.none else _of_rows(layer, given, rows)
        if narrowed is None or not _narrow_cache(layer, given, rows, hidden):
            return native(layer, *args, **kwargs)
        if rows.none:
            return self.form.wrap(hidden)
        output = native(layer, **narrowed)
        left = output if isinstance(output, torch.Tensor) else output[0]
        return self.form.wrap(hidden.to(left.dtype).index_copy(0, rows.numbers, left))


def _traced() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]


def _records(kwargs: Mapping[str, Any]) -> bool:
    """Whether the call records what happens inside layers, so that a row or layer that is left out would be missing."""
    recorded = {name for name in _active_collector.get() or () if not name.startswith("_")}
    recorded |= {name.removeprefix("output_") for name, value in kwargs.items() if name.startswith("output_") and value}
    return not recorded <= {"hidden_states"}  # these have a place for layers that do not run


def _of_rows(layer: nn.Module, given: Mapping[str, Any], rows: Rows) -> dict[str, Any] | None:
    """The arguments of some rows; `None` if there is one that may not be known to be by row."""
    # Hooks that change what enters a part of the layer may count its rows, as PEFT's for one adapter by row.
    if any(part._forward_pre_hooks for part in layer.modules() if part is not layer):
        return None
    try:
        return {name: _argument_of_rows(name, value, rows) for name, value in given.items()}
    except _UnknownArgument:
        return None


class _UnknownArgument(Exception):  # noqa: N818 - never leaves this module
    pass


def _argument_of_rows(name: str, value: Any, rows: Rows) -> Any:
    if value is None or name in _SAME_FOR_ALL_ROWS or isinstance(value, bool | int | float | str | Cache):
        return value
    if name == "position_embeddings" and isinstance(value, tuple | list):
        return type(value)(_argument_of_rows(name, part, rows) for part in value)
    if isinstance(value, torch.Tensor) and value.dim() in _BATCH_FIRST.get(name, ()):
        if value.shape[0] == 1:
            return value
        if value.shape[0] == len(rows.held):
            return value.index_select(0, rows.numbers.to(value.device))
    raise _UnknownArgument(name)


def is_another_stream(value: Any, hidden: torch.Tensor) -> bool:
    """Whether an argument or output of a layer is a second hidden state, as in the generation of xlnet."""
    alike = isinstance(value, torch.Tensor) and value.dim() == hidden.dim() and value.shape[-1] == hidden.shape[-1]
    return alike and value is not hidden and value.is_floating_point()


def _narrow_cache(layer: nn.Module, given: Mapping[str, Any], rows: Rows, hidden: torch.Tensor) -> bool:
    """Let the cache of a call hold only these rows for a layer; returns whether it can."""
    caches = [value for value in given.values() if isinstance(value, Cache)]
    if not caches:
        return True
    numbers = {*_numbers_of(layer)}  # longcat_flash has two attentions in a layer, each with its own part of the cache
    held = hold_rows(caches[0], numbers.pop(), rows.held) if len(numbers) == len(caches) == 1 else None
    if held is not None and rows.none:
        held.pass_tokens(hidden)
    return held is not None


def _numbers_of(layer: nn.Module) -> Iterator[Any]:
    return (part.layer_idx for part in layer.modules() if isinstance(getattr(part, "layer_idx", None), int))


def run_by_row(layer: Any, rows: DonorRows) -> None:
    """Let a layer of a donor run only on the rows that use it."""
    kind: Any = type(layer)
    if not hasattr(kind, _NATIVE):
        layer.__class__ = _by_row(kind)
    setattr(layer, _ROWS, rows)


def run_on_all_rows(layer: Any) -> None:
    """Undo `run_by_row`. A class that others made of the layer's stays, as a parametrization's, and runs all rows."""
    if hasattr(layer, _ROWS):
        delattr(layer, _ROWS)
        layer.__class__ = vars(type(layer)).get(_NATIVE, type(layer))


@functools.cache
def _by_row(kind: Any) -> Any:
    """A subclass of a layer class: an attribute `forward` of the layer would belong to its copies and replicas too."""
    native = kind.forward

    @functools.wraps(native)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        rows: DonorRows | None = getattr(self, _ROWS, None)
        return rows.forward(self, native, args, kwargs) if rows else native(self, *args, **kwargs)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        return _new, (kind,), *kind.__reduce_ex__(self, protocol)[2:]

    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, _NATIVE: kind}
    return type(kind.__name__, (kind,), {**names, "forward": forward, "__reduce_ex__": reduce})


def _new(kind: Any) -> Any:
    made = _by_row(kind)
    return made.__new__(made)
