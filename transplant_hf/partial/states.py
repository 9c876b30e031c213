"""Hidden states between layers, computed no further than they are asked for."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from ..errors import ConfigurationError
from .running import hidden_argument, stack_of

__all__ = ["hidden_states"]


class _Reached(Exception):  # noqa: N818 - no error: what was asked for is there
    """Ends a forward pass."""


@torch.no_grad()
def hidden_states(
    model: Any, input_ids: torch.Tensor, positions: Collection[int], **inputs: Any
) -> dict[int, torch.Tensor]:
    """Return the hidden states between a model's layers, running it no further than needed.

    Args:
        model: Any decoder-only model; its training mode is not changed.
        input_ids: `[batch, tokens]`.
        positions: Each is a count of layers that ran before, 0..L; L means after the last layer, before the norm.
        **inputs: What else the model is called with, such as `attention_mask`.

    Returns:
        `{position: hidden state [batch, tokens, hidden]}`.

    Raises:
        ConfigurationError: A position outside 0..L.
    """
    stack = stack_of(model)
    wanted = sorted(set(positions))
    if not wanted or wanted[0] < 0 or wanted[-1] > len(stack):
        raise ConfigurationError(
            f"positions {wanted} are not all in 0..{len(stack)}: the model runs {len(stack)} layers."
        )
    found: dict[int, torch.Tensor] = {}

    def keep(position: int, states: torch.Tensor) -> None:
        found[position] = states
        if position == wanted[-1]:
            raise _Reached

    def before(position: int) -> Any:
        return lambda module, args, kwargs: keep(position, hidden_argument(args, kwargs)[0])

    def after(module: nn.Module, args: Any, output: Any) -> None:
        keep(len(stack), output if isinstance(output, torch.Tensor) else output[0])

    hooks = [
        stack[position].register_forward_pre_hook(before(position), with_kwargs=True, prepend=True)
        for position in wanted
        if position < len(stack)
    ]
    if wanted[-1] == len(stack):
        hooks.append(stack[-1].register_forward_hook(after))
    try:
        model(input_ids=input_ids, use_cache=False, **inputs)
    except _Reached:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return found
