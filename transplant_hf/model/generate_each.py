"""`generate_each`: one prompt for several choices of donors; the layers before the donors run once."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache

from ..architecture import decoder_stack
from ..errors import ConfigurationError
from ..layer_map import RECIPIENT
from .active_donors import state_of
from .calls import CACHE_ARGUMENTS, arguments_by_name, parameters_of
from .using import generation_setting

# Arguments of layers that the rows of one prompt can share, with 1 in their first dimension.
_SHARED = {"attention_mask": 4, "position_ids": 2, "position_embeddings": 3}
# What makes `generate` read the prompt itself.
_NOT_SHARED = (
    "cache_implementation",
    "prompt_lookup_num_tokens",
    "assistant_model",
    "prefill_chunk_size",
    "output_hidden_states",
    "output_attentions",
)


class _CannotShare(Exception):  # noqa: N818 - not an error
    """Ends a pass in which layers get arguments that rows may not be able to share."""


def generate_each(model: Any, inputs: Any, donors: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """Generate for each of several choices; see `TransplantMixin.generate_each`."""
    given = {"input_ids": inputs} if isinstance(inputs, torch.Tensor) else dict(inputs)
    # Arguments with a row for each prompt, such as attention_mask, belong to the prompt wherever they are passed.
    tensors = {name: one for name, one in kwargs.items() if isinstance(one, torch.Tensor) and one.dim() > 1}
    kwargs = {name: one for name, one in kwargs.items() if name not in tensors or name in given}
    given = tensors | given
    ids = given.get("input_ids")
    rows_of = {name: len(one) for name, one in given.items() if isinstance(one, torch.Tensor) and one.dim()}
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or {*rows_of.values()} != {1} or not ids.shape[1]:
        found = f"rows {rows_of}" if isinstance(ids, torch.Tensor) else type(ids).__name__
        raise ConfigurationError(
            f"generate_each answers one prompt, input_ids [1, tokens] with at least one token; got {found}. For "
            "several prompts call generate inside using(rows=[...])."
        )
    if taken := sorted({*given, *kwargs} & {*CACHE_ARGUMENTS, "inputs_embeds"}):
        raise ConfigurationError(f"generate_each makes the cache from the prompt: leave out {', '.join(taken)}.")
    with model.using(rows=donors):
        rows = {name: value.repeat_interleave(len(donors), 0) for name, value in given.items()}
        cache = _shared_prompt(model, given, len(donors)) if _is_plain(model, kwargs) else {}
        return model.generate(**rows, **kwargs, **cache)


def _is_plain(model: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether each row is one sequence, which a dynamic cache serves, and nothing is recorded of the prompt."""
    setting = functools.partial(generation_setting, model, kwargs)
    several = any(setting(name) not in (None, 1) for name in ("num_beams", "num_return_sequences"))
    return not (several or any(map(setting, _NOT_SHARED)) or setting("use_cache") is False or model.training)


def _shared_prompt(model: Any, given: Mapping[str, Any], count: int) -> dict[str, Cache]:
    """Return the argument with a cache of all prompt tokens but the last, for `count` rows; empty if not shared."""
    tokens = given["input_ids"].shape[1] - 1
    padded = "attention_mask" in given and not bool(given["attention_mask"].all())
    name = next((name for name in CACHE_ARGUMENTS[:2] if name in parameters_of(type(model).forward)), None)
    cache: Any = DynamicCache(config=model.config)
    recurrent = any(hasattr(layer, "update_recurrent_state") for layer in cache.layers)  # cannot be repeated
    if not tokens or padded or name is None or recurrent or not {*given} <= {"input_ids", "attention_mask"}:
        return {}
    with torch.no_grad(), suppress(_CannotShare), _expanded(model, count) as first:
        model(**{one: value[:, :tokens] for one, value in given.items()}, **{name: cache}, use_cache=True)
        for layer in cache.layers[:first]:
            layer.batch_repeat_interleave(count)
        return {name: cache}
    return {}


@contextmanager
def _expanded(model: Any, count: int) -> Iterator[int]:
    """Make one row several where it enters the first donor, in calls of this thread; yields that layer's number."""
    state, me = state_of(model), threading.get_ident()
    running = state.blueprint.running(state.disabled)
    first = next((n for n, stage in enumerate(running) if stage.slot.source != RECIPIENT), None)
    if first is None:
        raise ConfigurationError("generate_each needs a donor that is not switched off.")

    def expand(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if threading.get_ident() != me:
            return None
        arguments = arguments_by_name(layer, args, kwargs)
        hidden = arguments.pop("hidden_states")
        if not all(_is_shared(name, value) for name, value in arguments.items()):
            raise _CannotShare
        hidden = hidden.repeat_interleave(count, 0)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    layer = decoder_stack(model, state.blueprint.recipient.stack_path)[first]
    hook = layer.register_forward_pre_hook(expand, with_kwargs=True, prepend=True)
    try:
        yield first
    finally:
        hook.remove()


def _is_shared(name: str, value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return name == "cache_position" or (value.dim() == _SHARED.get(name) and value.shape[0] == 1)
    if isinstance(value, tuple | list):
        return all(_is_shared(name, part) for part in value)
    return value is None or isinstance(value, bool | int | float | str | Cache)
