"""An independent reference: the plain recipient, with a donor's own layers called inside its forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from transplant_hf.architecture import decoder_stack, find_stack

Call = tuple[tuple[Any, ...], dict[str, Any]]
Stream = tuple[Any, ...]

# Layers that hand more than the hidden state to the next layer: the names of what they take, and of what they give.
_ALSO_CARRIED: dict[str, tuple[str, str | int]] = {
    "ReformerLayer": ("prev_attn_output", "attn_output"),
    "ZayaDecoderLayer": ("prev_router_hidden_states", 1),
}


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """Return the decoder layers of a model."""
    return decoder_stack(model, find_stack(model))


@torch.no_grad()
def reference_logits(
    recipient: PreTrainedModel,
    donor: PreTrainedModel,
    ids: torch.Tensor,
    *,
    layers: Sequence[int],
    position: int,
    replace: bool = False,
) -> torch.Tensor:
    """Run a recipient with layers of another model in between.

    The donor's layers get the masks and position embeddings that the recipient gives to its own layers of the same
    number, so that each is called as in its source model.

    Args:
        recipient: The untouched recipient.
        donor: The model the layers are from, of the same configuration.
        ids: `[batch, seq]`.
        layers: The donor's layers, by their numbers.
        position: How many recipient layers run before them.
        replace: Whether they replace as many recipient layers.

    Returns:
        Logits, `[batch, seq, vocab]`.
    """
    calls = _calls(recipient, ids)
    own, others = layers_of(recipient), layers_of(donor)

    def through_donor(stream: Stream) -> Stream:
        for number in layers:
            # A layer the recipient passes over (cross-attention without images) is passed over here too.
            if number in calls:
                args, kwargs = _into(others[number], *calls[number], stream)
                stream = _out_of(others[number], others[number](*args, **kwargs))
        return stream

    replaced = range(position, position + len(layers)) if replace else range(0)
    following = [number for number in range(position, len(own)) if number in calls]
    with ExitStack() as patches:
        if not following:
            last = max(calls)
            patches.enter_context(_patched(own[last], _after(own[last], through_donor)))
        elif following[0] not in replaced:
            patches.enter_context(_patched(own[following[0]], _before(own[following[0]], through_donor)))
        for number in (number for number in replaced if number in calls):
            change = through_donor if number == following[0] else lambda stream: stream
            patches.enter_context(_patched(own[number], _instead(own[number], change)))
        return recipient(ids, use_cache=False).logits


def _calls(model: PreTrainedModel, ids: torch.Tensor) -> dict[int, Call]:
    calls: dict[int, Call] = {}
    with ExitStack() as patches:
        for number, layer in enumerate(layers_of(model)):

            def record(run: Any, args: Any, kwargs: Any, number: int = number) -> Any:
                calls[number] = (args, kwargs)
                return run(*args, **kwargs)

            patches.enter_context(_patched(layer, record))
        model(ids, use_cache=False)
    return calls


@contextmanager
def _patched(layer: nn.Module, around: Callable[..., Any]) -> Iterator[None]:
    original = layer.forward
    layer.forward = lambda *args, **kwargs: around(original, args, kwargs)
    try:
        yield
    finally:
        del layer.forward


def _before(layer: nn.Module, change: Callable[[Stream], Stream]) -> Any:
    def around(run: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = _into(layer, args, kwargs, change(_entering(layer, args, kwargs)))
        return run(*args, **kwargs)

    return around


def _after(layer: nn.Module, change: Callable[[Stream], Stream]) -> Any:
    def around(run: Any, args: Any, kwargs: Any) -> Any:
        output = run(*args, **kwargs)
        return _with_stream(layer, output, change(_out_of(layer, output)))

    return around


def _instead(layer: nn.Module, change: Callable[[Stream], Stream]) -> Any:
    def around(run: Any, args: Any, kwargs: Any) -> Any:
        # The layer itself runs for the structure of its output only.
        return _with_stream(layer, run(*args, **kwargs), change(_entering(layer, args, kwargs)))

    return around


def _carried(layer: nn.Module) -> tuple[str, str | int] | None:
    return _ALSO_CARRIED.get(type(layer).__name__)


def _entering(layer: nn.Module, args: Any, kwargs: Any) -> Stream:
    stream = (args[0] if args else kwargs["hidden_states"],)
    also = _carried(layer)
    if also is not None:
        stream += (kwargs[also[0]] if also[0] in kwargs else args[1],)
    return stream


def _into(layer: nn.Module, args: Any, kwargs: Any, stream: Stream) -> Call:
    if not args:
        kwargs = {**kwargs, "hidden_states": stream[0]}
    also = _carried(layer)
    if also is not None and also[0] in kwargs:
        kwargs = {**kwargs, also[0]: stream[1]}
        return (stream[0], *args[1:]) if args else (), kwargs
    return (*stream, *args[len(stream) :]) if args else (), kwargs


def _out_of(layer: nn.Module, output: Any) -> Stream:
    also = _carried(layer)
    if also is None:
        return (output[0] if isinstance(output, tuple | list) else output,)
    if isinstance(also[1], str):
        return (output.hidden_states, getattr(output, also[1]))
    return (output[0], output[also[1]])


def _with_stream(layer: nn.Module, output: Any, stream: Stream) -> Any:
    also = _carried(layer)
    if also is not None and isinstance(also[1], str):
        return output._replace(**{"hidden_states": stream[0], also[1]: stream[1]})
    if isinstance(output, tuple | list):
        return type(output)([*stream, *output[len(stream) :]])
    return stream[0]
