"""Decide by looking whether a native configuration can build every layer as it was in its source model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from transformers import PreTrainedConfig

from ..errors import CompatibilityError
from .anatomy import Anatomy
from .build import BUILD_ERRORS, build_on_meta
from .exceptions import SURGERY_ONLY
from .fingerprint import differences, fingerprint
from .follow import ConfigOrigin, Follower
from .stack import decoder_stack, text_config

__all__ = ["LayerOrigin", "SplicedConfig", "splice_config"]


@dataclasses.dataclass(frozen=True)
class LayerOrigin:
    """Where one running layer was built: its source model, looked at, and its number there."""

    anatomy: Anatomy
    index: int


@dataclasses.dataclass(frozen=True)
class SplicedConfig:
    """The configuration of a transplant.

    Args:
        config: What the model runs with: counts and per-layer fields of the layers that run.
        native: Whether the recipient's own class builds every layer from it as it was.
        reasons: Why not, if not: one line for each difference of the best candidate.
    """

    config: PreTrainedConfig
    native: bool
    reasons: tuple[str, ...] = ()


def splice_config(recipient: Anatomy, origins: Sequence[LayerOrigin]) -> SplicedConfig:
    """Find the configuration under which the recipient's class builds these layers.

    Args:
        recipient: The untouched recipient, looked at.
        origins: For each layer that runs, where it was built.

    Returns:
        The native configuration, or one to run inserted layers with and the reasons.
    """
    follower = Follower(
        recipient.config,
        recipient.num_layers,
        [ConfigOrigin(o.anatomy.config, o.index, o.anatomy.num_layers) for o in origins],
    )
    model_type = text_config(recipient.config).config.model_type
    if model_type in SURGERY_ONLY:
        return SplicedConfig(follower.running_config(), False, (SURGERY_ONLY[model_type],))
    reasons: list[str] = []
    kinds = [origin.anatomy.kind(origin.index) for origin in origins]
    for config in follower.candidates(kinds):
        found = _how_layers_differ(recipient, config, origins)
        if not found:
            return SplicedConfig(config, True)
        reasons = reasons or found
    reasons = reasons or [f"{type(recipient.config).__name__} refuses {len(origins)} layers of these kinds"]
    return SplicedConfig(follower.running_config(), False, tuple(reasons))


def _how_layers_differ(
    recipient: Anatomy, config: PreTrainedConfig, origins: Sequence[LayerOrigin]
) -> list[str]:
    try:
        model = build_on_meta(recipient.model_class, config)
        layers = decoder_stack(model, recipient.stack_path)
    except (*BUILD_ERRORS, CompatibilityError) as error:
        return [f"{recipient.model_class.__name__} cannot be built: {type(error).__name__}: {error}"]
    if len(layers) != len(origins):
        return [f"{len(layers)} layers would be built, not {len(origins)}"]
    lines: list[str] = []
    for number, (layer, origin) in enumerate(zip(layers, origins, strict=True)):
        was = origin.anatomy.fingerprints[origin.index]
        lines += [f"layer {number}: {line}" for line in differences(was, fingerprint(layer), origin.index, number)]
    return lines
