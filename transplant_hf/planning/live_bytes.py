"""The largest memory of a computation, from running it on the meta device."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["LiveBytes", "OrdinaryText"]


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that were allocated inside a `with` block and are still in use.

    What kernels allocate for themselves is not counted.
    """

    def __init__(self, known: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._held = [tensor.untyped_storage() for tensor in known]
        self._sizes = dict.fromkeys(map(id, self._held), 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count its outputs."""
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return output

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._release, key)

    def _release(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


class OrdinaryText(TorchFunctionMode):
    """Runs a model on the meta device as it runs on text without padding.

    Conditions on values hold, such as that all tokens are of one text. Attention keeps what a fused kernel keeps, not
    the whole matrix of scores; with dropout it keeps that, as on a CPU.
    """

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace conditions and attention."""
        kwargs = kwargs or {}
        if func is torch.Tensor.__bool__ and args[0].is_meta:
            return True
        if func is F.scaled_dot_product_attention and not kwargs.get("dropout_p", 0.0):
            return _Fused.apply(*(*args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :]))[:3])
        return func(*args, **kwargs)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])
