"""Whether the layers before a donor stay in their files while it is trained."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers.utils import logging

from ..architecture import decoder_stack
from ..display import bytes_text
from ..errors import ConfigurationError
from ..layer_map import RECIPIENT, Position
from ..model.load_weights import HeldBack
from ..partial.streaming import reason_against_streaming
from ..splice import Blueprint

__all__ = ["free_memory", "held_back_layers"]

logger = logging.get_logger(__name__)

_COPIES = 4  # of a donor: weights, gradients and two numbers of Adam
_CGROUP = Path("/sys/fs/cgroup")


def held_back_layers(
    model: Any, args: Any, model_kwargs: Mapping[str, Any], position_in: Callable[[int], Position]
) -> HeldBack | None:
    """Return how many layers of a named recipient stay in their files, as a function of its blueprint.

    `position_in` returns the donor's position or positions for the number of the recipient's layers.
    """
    if args.stream_prefix is False:
        return None
    reason = _reason_against(model, args, model_kwargs)
    if reason is not None:
        if args.stream_prefix:
            raise ConfigurationError(f"stream_prefix=True (--stream-prefix) is not possible: {reason}.")
        return None

    def count(blueprint: Blueprint) -> int:
        position = position_in(blueprint.splice.num_layers)
        position = min(position) if isinstance(position, tuple) else position
        slots = (tuple(stage.slot) for stage in blueprint.built)
        before = len(list(itertools.takewhile(lambda slot: slot != (RECIPIENT, position), slots)))
        reason = None
        if before == 0:
            reason = f"no layer runs before position {position}, so that there is nothing to stream"
        elif any(part.spec.mode == "replace" for part in blueprint.parts):
            reason = "the recipient has donors that replace layers"
        if args.stream_prefix and reason is not None:
            raise ConfigurationError(f"stream_prefix=True (--stream-prefix) is not possible: {reason}.")
        if reason is not None or not (args.stream_prefix or _is_too_large(blueprint, args, model_kwargs)):
            return 0
        return before

    return count


def _reason_against(model: Any, args: Any, model_kwargs: Mapping[str, Any]) -> str | None:
    if args.method == "standalone":
        return (
            'method="standalone" (--method) runs the donor between the embeddings and the head, without the layers '
            "before it"
        )
    if args.cache_prefix == "off":
        return 'cache_prefix="off" (--cache-prefix) runs the layers before the donor in every step'
    return reason_against_streaming(model, model_kwargs)


def _is_too_large(blueprint: Blueprint, args: Any, model_kwargs: Mapping[str, Any]) -> bool:
    """Whether a recipient with a donor in training does not fit into free memory; says so."""
    recipient = blueprint.recipient
    if model_kwargs.get("quantization_config") or getattr(recipient.config, "quantization_config", None):
        return False  # only its library knows its size
    dtype = model_kwargs.get("dtype") or model_kwargs.get("torch_dtype") or "auto"
    dtype = recipient.config.dtype or torch.get_default_dtype() if dtype == "auto" else dtype
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    layers = decoder_stack(recipient.model, recipient.stack_path)
    donor = args.donor_layers * max(sum(parameter.numel() for parameter in layer.parameters()) for layer in layers)
    needed = (sum(parameter.numel() for parameter in recipient.model.parameters()) + _COPIES * donor) * dtype.itemsize
    free = free_memory(args.device)
    if needed <= free:
        return False
    logger.warning(
        f"{blueprint.config.recipient} and a donor in training take {bytes_text(needed)}, and {bytes_text(free)} are "
        "free: the layers before the donor stay in their files (stream_prefix)."
    )
    return True


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    try:
        limit, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:  # no container
        return free
    return free if limit == "max" else min(free, int(limit) - int(used))
