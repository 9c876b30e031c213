"""What keys, values and states take, found by running a model on the meta device and looking at its cache."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import Cache, EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..architecture import Anatomy
from ..architecture.build import BUILD_ERRORS, build_on_meta
from ..layer_map import Slot

__all__ = ["CacheLayer", "LayerCaches", "measure_caches", "running_caches"]


@dataclasses.dataclass(frozen=True)
class CacheLayer:
    """What one layer keeps of one sequence.

    Args:
        kind: Such as "full attention", "sliding attention, window 128" or "recurrent".
        per_token: Bytes that each token adds while it grows; 0 for a state of constant size.
        total: Bytes at the planned context.
        heads: Key-value heads that it is kept for; `None` where it has none.
    """

    kind: str
    per_token: int
    total: int
    heads: int | None = None

    @property
    def constant(self) -> bool:
        """Whether no token adds to it."""
        return self.per_token == 0


@dataclasses.dataclass(frozen=True)
class LayerCaches:
    """What every layer of a model keeps of one sequence.

    Args:
        layers: In order; empty when it could not be found out.
        reason: Why not.
    """

    layers: tuple[CacheLayer, ...]
    reason: str | None = None


def measure_caches(anatomies: Mapping[str, Anatomy], context: int) -> dict[str, LayerCaches]:
    """Find what every layer of some models keeps of one sequence.

    Args:
        anatomies: The models by name; one that has several names is run once.
        context: Tokens.

    Returns:
        By name, a layer of cache for each layer; none and the reason where a model does not run on the meta device.
    """
    once = {id(anatomy): anatomy for anatomy in anatomies.values()}
    known = {key: _measured(anatomy, context) for key, anatomy in once.items()}
    return {name: known[id(anatomy)] for name, anatomy in anatomies.items()}


def running_caches(slots: Sequence[Slot], measured: Mapping[str, LayerCaches]) -> LayerCaches:
    """Put together what the layers that run keep of one sequence.

    Args:
        slots: Where each running layer is from.
        measured: What the layers of their source models keep.
    """
    reasons = (measured[slot.source].reason for slot in slots)
    reason = next((reason for reason in reasons if reason is not None), None)
    if reason is not None:
        return LayerCaches((), reason)
    return LayerCaches(tuple(measured[slot.source].layers[slot.index] for slot in slots))


def _measured(anatomy: Anatomy, context: int) -> LayerCaches:
    model = _runnable(anatomy)
    try:
        runs = [_run(model, length) for length in (1, 2)]
        if any(run is None for run in runs):
            return LayerCaches((), f"{type(model).__name__} keeps its state in an object of its own")
        one, two = (run.layers for run in runs if run is not None)
        if len(one) != anatomy.num_layers:
            return LayerCaches((), f"{type(model).__name__} keeps {len(one)} for {anatomy.num_layers} layers")
        growth = [_size(longer) - _size(shorter) for shorter, longer in zip(one, two, strict=True)]
        long = _at_length(model, two, growth, context)
    except BUILD_ERRORS as error:
        sentence = str(error).strip().partition("\n")[0]
        return LayerCaches((), f"{type(model).__name__} does not run on the meta device: {sentence}")
    return LayerCaches(
        tuple(
            CacheLayer(_kind(layer, grows, _size(layer)), grows, _size(layer), _heads(layer))
            for layer, grows in zip(long, growth, strict=True)
        )
    )


# Layers whose next tokens can be put in by hand: they keep keys and values as they are, all or the last ones.
_PLAIN = (DynamicLayer.update, DynamicSlidingWindowLayer.update)


def _at_length(model: PreTrainedModel, layers: Sequence[Any], growth: Sequence[int], context: int) -> Sequence[Any]:
    """The layers of a cache after so many tokens, given those after two."""
    growing = [layer for layer, grows in zip(layers, growth, strict=True) if grows]
    if context <= 2 or not all(_is_plain(layer, grows) for layer, grows in zip(layers, growth, strict=True) if grows):
        found = _run(model, context)
        assert found is not None
        return found.layers
    # A recurrence may take a step of Python for each token, so the model does not run over all of them.
    for layer in growing:
        more = [part.new_empty((*part.shape[:2], context - 2, part.shape[3])) for part in (layer.keys, layer.values)]
        layer.update(*more)
    return layers


def _is_plain(layer: Any, growth: int) -> bool:
    """Whether keys and values are all that grows, and every token adds the same."""
    return type(layer).update in _PLAIN and 2 * growth == layer.keys.nbytes + layer.values.nbytes


def _size(layer: Any) -> int:
    return sum(tensor.nbytes for tensor in _tensors(vars(layer)))


def _runnable(anatomy: Anatomy) -> PreTrainedModel:
    """The model built so that no decision hangs on values, which tensors on the meta device have not."""
    config = copy.deepcopy(anatomy.config)
    config._experts_implementation = "batched_mm"  # others sort tokens by expert, or have kernels of their own
    model = build_on_meta(anatomy.model_class, config).eval()
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            setattr(module, "warn_if_padding_and_no_attention_mask", _nothing_to_warn_of)  # noqa: B010
    return model


def _nothing_to_warn_of(*_: Any) -> None:
    """In place of a search of the tokens for padding."""


def _run(model: PreTrainedModel, length: int) -> Cache | None:
    ids = torch.zeros(1, length, dtype=torch.long, device="meta")
    with torch.no_grad():
        output = model(input_ids=ids, use_cache=True)
    found = getattr(output, "past_key_values", None) or getattr(output, "cache_params", None)
    if isinstance(found, EncoderDecoderCache):
        found = found.self_attention_cache
    return found if isinstance(found, Cache) else None


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if value.dim() > 1:  # a window's width and the like are no state
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _kind(layer: Any, growth: int, total: int) -> str:
    window = getattr(layer, "sliding_window", None)
    state = any(name.endswith("_states") and any(True for _ in _tensors(value)) for name, value in vars(layer).items())
    if not total:
        return "nothing kept"
    if not growth and window is None:
        return "recurrent"
    attention = f"sliding attention, window {window}" if window is not None else "full attention"
    return f"{attention}, and recurrent" if state else attention


def _heads(layer: Any) -> int | None:
    keys = getattr(layer, "keys", None)
    return int(keys.shape[1]) if isinstance(keys, torch.Tensor) and keys.dim() == 4 else None
