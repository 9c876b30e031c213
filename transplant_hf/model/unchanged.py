"""Is the recipient in a transplanted model still the one it refers to?"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from ..architecture import is_quantized, was_gguf
from ..architecture.adapters import is_adapted
from ..errors import ConfigurationError
from ..layer_map import RECIPIENT
from ..sources import HubOptions, for_transformers, hub_errors
from ..splice import Blueprint

__all__ = ["check_unchanged"]


def check_unchanged(model: PreTrainedModel, state: Any, current: dict[str, torch.Tensor]) -> None:
    """Compare the recipient's weights with the pinned recipient's, read anew.

    Args:
        model: The transplanted model.
        state: Its transplant.
        current: The recipient's weights in it.

    Raises:
        ConfigurationError: Some differ or are missing; the first is named, the rest counted. Or an adapter is
            attached, or weights are offloaded.
    """
    adapters = [name for name in current if is_adapted(name)]
    if adapters:
        raise ConfigurationError(
            f"a thin save holds donors alone, but an adapter is attached ({adapters[0]}). Take it off first (unload); "
            "it is saved by itself, or merge it (merge_and_unload) and save in full."
        )
    away = [name for name, tensor in current.items() if tensor.is_meta]
    if away:
        raise ConfigurationError(
            f"a thin save compares the recipient's weights with the pinned recipient's, but {away[0]}"
            f"{f' and {len(away) - 1} more' if len(away) > 1 else ''} are offloaded. Load the model without offload to "
            "save it thin, or save in full."
        )
    recipient, config = _pinned_recipient(model, state), state.blueprint.config
    pinned = recipient.state_dict()
    where = f"{config.recipient}@{config.recipient_revision}" if config.recipient_revision else config.recipient
    missing = [name for name in _expected(model, recipient, state.blueprint, current) if name not in current]
    if missing:
        rest = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ConfigurationError(
            f"a thin save would not keep what the model computes: it lacks recipient weights that {where} has, "
            f"{missing[0]}{rest}, and a reload would bring them back. Put the modules that hold them back."
        )
    changed = [
        name
        for name, tensor in current.items()
        if name not in pinned or not _equal(tensor, pinned[name])
    ]  # fmt: skip
    if changed:
        rest = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise ConfigurationError(
            f"a thin save would lose changed recipient weights: {changed[0]}{rest} differ from {where}. Save in full "
            "(save_pretrained(folder)), or train donor layers only."
        )


def _expected(
    model: PreTrainedModel, pinned: PreTrainedModel, blueprint: Blueprint, current: Mapping[str, Any]
) -> Iterator[str]:
    """The names of the recipient's weights that a model holds, without layers that donors removed."""
    path = f"{blueprint.recipient.stack_path}."
    kept = {str(stage.slot.index) for stage in blueprint.built if stage.slot.source == RECIPIENT}
    # Weights that a state dict which was passed may hold under one of their names.
    pairs = [pair for pair in pinned.all_tied_weights_keys.items() if not current.keys().isdisjoint(pair)]
    tied = {name for pair in pairs for name in pair} & {
        name for name, _ in model.named_parameters(remove_duplicate=False)
    }
    for name in pinned.state_dict():
        removed = name.startswith(path) and name.removeprefix(path).partition(".")[0] not in kept
        if not removed and name not in tied:
            yield name


def _equal(tensor: torch.Tensor, pinned: torch.Tensor) -> bool:
    if tensor.shape != pinned.shape:
        return False
    wider = torch.promote_types(tensor.dtype, pinned.dtype)  # rounding would hide a small change
    return torch.equal(tensor.detach().to("cpu", wider), pinned.to(wider))


def _pinned_recipient(model: PreTrainedModel, state: Any) -> PreTrainedModel:
    from .surface import transplant_class  # which imports this module; its classes load for this thread alone

    recipient, config = state.blueprint.recipient, state.blueprint.config
    if was_gguf(model):
        raise ConfigurationError(
            f"a thin save names its recipient, and cannot name the GGUF file that the weights of {config.recipient} "
            "were read from. Save in full (save_pretrained(folder)); or write the recipient as a plain folder once, "
            "remove_transplants(model).save_pretrained(folder), and load it from there with its donors."
        )
    if is_quantized(model):
        raise ConfigurationError(
            "a thin save compares the recipient's weights with the pinned recipient's, which is not possible for a "
            "quantised model. Load it without quantization to save it."
        )
    hub = HubOptions(cache_dir=state.cache_dir, local_files_only=state.local_only)
    with hub_errors(config.recipient, config.recipient_revision):
        loaded: Any = transplant_class(recipient.model_class).from_pretrained(
            for_transformers(config.recipient, config.recipient_revision, hub, weights=True),
            revision=config.recipient_revision or "main",
            config=copy.deepcopy(recipient.config),
            dtype=model.dtype,
            cache_dir=state.cache_dir,
            local_files_only=state.local_only,
            output_loading_info=True,
        )
    pinned, info = loaded
    for name in info["missing_keys"]:
        # Not in the recipient's files, so made up anew just now: whatever the model holds would be lost.
        pinned.get_parameter_or_buffer(name).data.fill_(torch.nan)
    return pinned
