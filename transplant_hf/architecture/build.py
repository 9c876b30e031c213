"""Build models on the meta device, to look at them: structure without weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from huggingface_hub.errors import StrictDataclassError
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
    with _quiet(), torch.device("meta"), no_init_weights():
        return model_class._from_config(copy.deepcopy(config))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep a trial build from saying what the real one will say again."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
