"""Build models on the meta device, to look at them: structure without weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import logging

__all__ = ["BUILD_ERRORS", "build_on_meta"]

# What model and configuration classes raise for a configuration they cannot build. Their own code decides, so the
# list is wide; a failure is never swallowed, it becomes the reason why a candidate was rejected.
BUILD_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)


def build_on_meta(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """Build a model without memory for its weights.

    Args:
        model_class: The class to build.
        config: Its configuration; copied, not changed.

    Returns:
        The model on the meta device.
    """
    with _quiet(), torch.device("meta"), no_init_weights(), _NoDrawing():
        return model_class._from_config(copy.deepcopy(config))


class _NoDrawing(TorchFunctionMode):
    """Skip random initialisation, which on the meta device takes most of the time and changes nothing."""

    _DRAWS = frozenset(
        f"{name}_" for name in ("normal", "uniform", "trunc_normal", "xavier_normal", "xavier_uniform", "orthogonal")
    ) | {"kaiming_normal_", "kaiming_uniform_"}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in self._DRAWS:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep a trial build from saying what the real one will say again."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
