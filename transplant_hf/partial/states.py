"""Hidden states between layers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch

from ..errors import CheckpointError, ConfigurationError
from ..numeric import is_finite
from .running import PREFIX_STATES, hidden_argument, stack_of

__all__ = ["block_ids", "block_states", "hidden_states", "recorded_states", "refuse_not_finite"]


class _LastPositionReached(Exception):  # noqa: N818 - not an error
    """Ends a forward pass once the last hidden state is recorded."""


@torch.no_grad()
def hidden_states(
    model: Any, input_ids: torch.Tensor, positions: Collection[int], **inputs: Any
) -> dict[int, torch.Tensor]:
    """Return the hidden states between a model's layers; layers after the last position do not run.

    Args:
        model: Any decoder-only model; its training mode is not changed.
        input_ids: `[batch, tokens]`.
        positions: Each is a number of layers that ran before, 0..L; L means after the last layer, before the norm.
        **inputs: Further inputs of the model, such as `attention_mask`.

    Returns:
        `{position: hidden state [batch, tokens, hidden]}`.

    Raises:
        ConfigurationError: A position outside 0..L.
    """
    with recorded_states(model, positions, stop=True) as states, suppress(_LastPositionReached):
        model(input_ids=input_ids, use_cache=False, **inputs)
    return states


@contextmanager
def recorded_states(model: Any, positions: Collection[int], stop: bool = False) -> Iterator[dict[int, torch.Tensor]]:
    """Record hidden states of the forward passes inside a `with` block."""
    stack = stack_of(model)
    last = max(positions, default=-1)
    if min(positions, default=-1) < 0 or last > len(stack):
        raise ConfigurationError(
            f"positions {sorted(positions)} are not all in 0..{len(stack)}: the model runs {len(stack)} layers."
        )
    states: dict[int, torch.Tensor] = {}

    def record(position: int, state: torch.Tensor) -> None:
        states[position] = state
        if stop and position == last:
            raise _LastPositionReached

    def before(position: int) -> Any:
        return lambda layer, args, kwargs: record(position, hidden_argument(args, kwargs)[0])

    def after(layer: Any, args: Any, output: Any) -> None:
        record(len(stack), output if isinstance(output, torch.Tensor) else output[0])

    hooks = [
        stack[position].register_forward_pre_hook(before(position), with_kwargs=True, prepend=True)
        for position in set(positions) - {len(stack)}
    ]
    if len(stack) in positions:
        hooks.append(stack[-1].register_forward_hook(after))
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def block_ids(model: Any, blocks: Any, numbers: Sequence[int]) -> torch.Tensor:
    """Return blocks of text as input of a model, `[blocks, tokens]`."""
    return torch.stack([blocks[number]["input_ids"] for number in numbers]).to(model.device)


def block_states(
    model: Any, ids: torch.Tensor, count: int, autocast: Any = nullcontext, entering: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the hidden state after `count` layers on the CPU; `entering` goes into the first layer that runs."""
    prefix = {} if entering is None else {PREFIX_STATES: entering}
    with autocast():
        return hidden_states(model, ids, [count], **prefix)[count].cpu()


def refuse_not_finite(states: torch.Tensor, where: str, blocks: Sequence[int]) -> None:
    """Refuse hidden states of some blocks of text that contain NaN or infinity; `where` says which states."""
    if not is_finite(states):
        raise CheckpointError(
            f"the hidden state {where} is not finite for blocks {blocks[0]}..{blocks[-1]}: the recipient's weights "
            "contain NaN or infinity, or its dtype is too small. Try dtype=float32 (--dtype float32)."
        )
