"""A donor's strength: how much of what it adds to the hidden state is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

__all__ = ["scale_donor"]


class _Scale:
    """Two hooks around a donor: h becomes h + strength * (donor(h) - h)."""

    def __init__(self, strength: float) -> None:
        self.strength = strength
        self._entered: torch.Tensor | None = None

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the hidden state that enters the donor's first layer."""
        self._entered = args[0] if args else kwargs["hidden_states"]

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Scale what the donor added, after its last layer."""
        several = isinstance(output, tuple | list)
        left = output[0] if several else output
        assert self._entered is not None
        entered = self._entered.to(left.device)
        # Not a product with zero: at strength 0 the donor's values must not matter at all, overflow included.
        scaled = entered if self.strength == 0 else entered + self.strength * (left - entered)
        return type(output)([scaled, *output[1:]]) if several else scaled


def scale_donor(layers: Sequence[nn.Module], strength: float) -> None:
    """Scale what a donor's layers add to the hidden state; at strength 1 nothing is done, and it costs nothing.

    Args:
        layers: The donor's layers in order.
        strength: 0 is exactly the recipient.
    """
    if strength == 1.0:
        return
    scale = _Scale(strength)
    layers[0].register_forward_pre_hook(scale.before, with_kwargs=True)
    layers[-1].register_forward_hook(scale.after)
