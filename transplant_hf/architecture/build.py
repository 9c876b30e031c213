"""Build models without changes to the process.

While Transformers builds a model, it changes settings of the whole process: torch's default dtype, the functions of
`torch.nn.init`, the tying of weights. Two threads that build at once may leave them changed. The modes here have the
same effect on one thread only.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedModel

# The dtype of the model that this context builds; unset outside.
_dtype: ContextVar[torch.dtype] = ContextVar("transplant_hf_dtype")


def build_on_meta(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """Build a model without memory for its weights."""
    config = copy.deepcopy(config)
    for part in _inside(config, deeper=False):
        part.dtype = config.dtype
    with construction(config.dtype), inner_models(config):
        model = model_class(config)
        settle(model)
    return model


def build_random(model_class: Any, config: PreTrainedConfig, **kwargs: Any) -> Any:
    """Build a model with random weights, as `from_config` does."""
    dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None) or config.dtype
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    with construction(dtype, on_meta=False):
        model = model_class._from_config(config, dtype=None, **kwargs)  # a dtype would be set for the whole process
    for part in (model.config, *_inside(model.config, deeper=False)):
        part.dtype = dtype
    if model.device.type != "meta":
        model.initialize_weights()
    model.tie_weights(recompute_mapping=False)
    return model


def initialize(model: PreTrainedModel, model_class: type[PreTrainedModel]) -> None:
    """Initialize the tensors of a model that were not loaded."""
    # Without its decorators, one of which replaces the functions of torch.nn.init for the whole process.
    function: Any = inspect.unwrap(model_class.initialize_weights)
    with torch.no_grad(), _KeepInitialized():
        function(model)


def thread_contexts(contexts: Sequence[Any], dtype: torch.dtype) -> list[Any]:
    """Return the contexts in which Transformers builds a model, with this thread's `construction` for global ones."""
    if not any(isinstance(context, torch.device) for context in contexts):
        return list(contexts)
    kept = [context for context in contexts if not isinstance(context, torch.device)]
    kept = [context for context in kept if getattr(context, "func", construction).__name__ not in _PROCESS_WIDE]
    return [*kept, construction(dtype)]


_PROCESS_WIDE = frozenset({"local_torch_dtype", "no_tie_weights", "meta_device_safe_creation_ops"})


@contextmanager
def construction(dtype: torch.dtype | str | None, on_meta: bool = True) -> Iterator[None]:
    """Let this thread build models in a dtype."""
    chosen = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.get_default_dtype()
    if not chosen.is_floating_point:
        raise ValueError(f"a model cannot be built in {chosen}, which is not a floating-point dtype")
    token = _dtype.set(chosen)
    try:
        with torch.device("meta") if on_meta else nullcontext(), _Construction(chosen):
            yield
    finally:
        _dtype.reset(token)


@contextmanager
def inner_models(config: PreTrainedConfig) -> Iterator[None]:
    """Build the models inside a model in its dtype; their own dtypes would be set for the whole process.

    Has no effect outside a `construction`.
    """
    dtypes = [(part, part.dtype) for part in _inside(config)] if _dtype.get(None) is not None else []
    for part, _ in dtypes:
        part.dtype = None
    try:
        yield
    finally:
        for part, dtype in dtypes:
            part.dtype = dtype


def settle(model: PreTrainedModel) -> None:
    """Finish a model that was built in a `construction`; has no effect outside."""
    dtype = _dtype.get(None)
    if dtype is None:
        return
    for name in model.all_tied_weights_keys:
        parent, _, last = name.rpartition(".")
        module = model.get_submodule(parent)
        tied = getattr(module, last)
        if not tied.is_meta:
            continue
        own = torch.empty_like(tied)
        setattr(module, last, nn.Parameter(own, tied.requires_grad) if isinstance(tied, nn.Parameter) else own)
    for module in model.modules():
        if _asks_for_default_dtype(type(module)):  # type: ignore[arg-type]
            module._apply(lambda tensor: tensor.to(dtype) if tensor.dtype == torch.get_default_dtype() else tensor)


def _inside(config: PreTrainedConfig, deeper: bool = True) -> Iterator[PreTrainedConfig]:
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            yield part
            if deeper:
                yield from _inside(part)


@functools.cache
def _asks_for_default_dtype(module_class: type[nn.Module]) -> bool:
    """Whether a class reads torch's default dtype, which no mode can change."""
    functions = (getattr(member, "__func__", member) for member in vars(module_class).values())
    return any(
        "get_default_dtype" in function.__code__.co_names for function in functions if hasattr(function, "__code__")
    )


# Functions that return a tensor of torch's default dtype for any arguments.
_DEFAULT = frozenset({torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn, torch.eye, torch.linspace})
# Functions whose name or kind sets the dtype of the result.
_NAMED = frozenset({torch.Tensor.float, torch.Tensor.double, torch.Tensor.type, torch.from_numpy, torch.frombuffer})
_DRAWS = frozenset(
    f"{name}_" for name in ("normal", "uniform", "trunc_normal", "xavier_normal", "xavier_uniform", "orthogonal")
) | {"kaiming_normal_", "kaiming_uniform_"}


class _Construction(TorchFunctionMode):
    """The settings that Transformers changes while it builds a model, for one thread.

    Random initialization is skipped: on the meta device it takes most of the time and has no effect.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _DRAWS:
            drawn = args[0] if args else kwargs["tensor"]
            if drawn.is_meta:
                return drawn
        if func is torch.tensor and args == ([],) and not kwargs:
            # Transformers asks where a model is built. For the meta device, it does not replace the functions of
            # torch.nn.init for the whole process.
            return torch.empty(0, device="meta")
        if func is torch.linspace and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "cpu"}  # older models read the numbers
        if func in _DEFAULT and kwargs.get("dtype") is None and kwargs.get("out") is None:
            return func(*args, **{**kwargs, "dtype": self._dtype})
        result = func(*args, **kwargs)
        if (
            isinstance(result, torch.Tensor)
            and result.dtype == torch.get_default_dtype() != self._dtype
            and func not in _NAMED
            and not any(map(_says_dtype, (*args, *kwargs.values())))
        ):
            return result.to(self._dtype)
        return result


def _says_dtype(argument: Any) -> bool:
    """Whether an argument sets the dtype of the result, which is then not the default."""
    if isinstance(argument, torch.Tensor):
        return argument.is_floating_point() or argument.is_complex()
    if isinstance(argument, list | tuple):
        return any(isinstance(item, torch.Tensor) and _says_dtype(item) for item in argument)
    return isinstance(argument, torch.dtype) or hasattr(argument, "dtype")


class _KeepInitialized(TorchFunctionMode):
    """Skip initialization of tensors that were loaded, and of their views, for one thread."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__setitem__" or (name.endswith("_") and not name.endswith("__") and name != "requires_grad_"):
            written = args[0] if args else kwargs.get("tensor")
            if isinstance(written, torch.Tensor) and (_is_initialized(written) or _is_initialized(written._base)):
                return written
        return func(*args, **kwargs)


def _is_initialized(tensor: torch.Tensor | None) -> bool:
    return getattr(tensor, "_is_hf_initialized", False)
