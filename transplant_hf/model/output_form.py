"""How the layers of a model return their hidden state."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


class OutputForm:
    """How the layers of a model return their hidden state; known after one of them has run."""

    def __init__(self) -> None:
        self._wrap: Callable[[torch.Tensor], Any] | None = None

    def learn(self, output: Any) -> None:
        """Learn it from an output; nothing where layers return more than a hidden state."""
        if isinstance(output, torch.Tensor):
            self._wrap = _alone
        elif type(output) in (tuple, list) and output and all(one is None for one in output[1:]):
            self._wrap = functools.partial(_first, type(output), len(output) - 1)

    @property
    def known(self) -> bool:
        """Whether a layer has run."""
        return self._wrap is not None

    def wrap(self, hidden: torch.Tensor) -> Any:
        """Return a hidden state as a layer does."""
        assert self._wrap is not None
        return self._wrap(hidden)


def _alone(hidden: torch.Tensor) -> torch.Tensor:
    return hidden


def _first(kind: Any, others: int, hidden: torch.Tensor) -> Any:
    return kind([hidden, *[None] * others])
