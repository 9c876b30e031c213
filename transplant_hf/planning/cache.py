"""The cache of a model, layer by layer, from a run of two tokens on the meta device."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import Cache, EncoderDecoderCache, PreTrainedModel

from ..architecture import Anatomy
from ..architecture.build import build_on_meta
from ..errors import BUILD_ERRORS

__all__ = ["LayerCache", "layer_caches", "prepare_to_run"]


@dataclasses.dataclass(frozen=True)
class LayerCache:
    """The cache of one layer for one sequence, in bytes."""

    kind: str  # such as "full attention", "sliding attention, window 128" or "recurrent"
    per_token: int  # what each token adds until a window is full; 0 for a state of constant size
    total: int  # at the planned context
    next_token: int  # what one more token adds at the planned context


def layer_caches(anatomy: Anatomy, context: int) -> tuple[LayerCache, ...] | str:
    """Return the cache of every layer for one sequence, or the reason why it is not known."""
    name = anatomy.model_class.__name__
    try:
        model = build_on_meta(anatomy.model_class, anatomy.config)
        prepare_to_run(model)
        one, two = _run(model, 1), _run(model, 2)
        if one is None or two is None:
            return f"{name} keeps its state in a class of its own"
        if len(one.layers) != anatomy.num_layers:
            return f"the cache of {name} has {len(one.layers)} layers, the model {anatomy.num_layers}"
        known = all(type(layer).__module__ == Cache.__module__ for layer in two.layers)
        # A class from elsewhere may compress what it stores: only the run at full length shows its size.
        full = two if known else _run(model, context)
        assert full is not None
        layers = zip(one.layers, two.layers, full.layers, strict=True)
        return tuple(_layer_cache(*each, context=context, extrapolate=known) for each in layers)
    except BUILD_ERRORS as error:
        return f"{name} does not run on the meta device: {str(error).strip().partition(chr(10))[0]}"


def _layer_cache(one: Any, two: Any, full: Any, *, context: int, extrapolate: bool) -> LayerCache:
    per_token = _size(two) - _size(one)
    window = getattr(two, "sliding_window", None)
    stored = context if window is None else min(context, window - 1)  # a window holds the tokens before the next one
    total = _size(one) + (stored - 1) * per_token if extrapolate else _size(full)
    growing = window is None or context < window - 1
    return LayerCache(_kind(two, per_token, total), per_token, total, per_token if growing else 0)


def prepare_to_run(model: PreTrainedModel) -> None:
    """Let nothing depend on values of tensors, which the meta device does not have."""
    model.eval()
    if model.get_experts_implementation()[""] is not None:
        model.set_experts_implementation("batched_mm")  # others sort tokens by expert, or have kernels of their own
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config.pad_token_id = None  # otherwise the tokens are searched for padding


def _run(model: PreTrainedModel, length: int) -> Cache | None:
    ids = torch.zeros(1, length, dtype=torch.long, device="meta")
    with torch.no_grad():
        output = model(input_ids=ids, use_cache=True)
    cache = next((value for value in output.values() if isinstance(value, Cache)), None)
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    return cache


def _size(layer: Any) -> int:
    return sum(tensor.nbytes for tensor in _tensors(vars(layer)))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if value.dim() > 1:  # others are counters, such as the width of a window
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _kind(layer: Any, per_token: int, total: int) -> str:
    window = getattr(layer, "sliding_window", None)
    if not total:
        return "no cache"
    if not per_token and window is None:
        return "recurrent"
    attention = f"sliding attention, window {window}" if window is not None else "full attention"
    states = (value for name, value in vars(layer).items() if name.endswith("_states"))
    return f"{attention}, and recurrent" if any(True for _ in _tensors(list(states))) else attention
