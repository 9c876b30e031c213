"""Find a native configuration that builds every layer as it was in its source model, if there is one."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import BUILD_ERRORS, CompatibilityError
from .anatomy import Anatomy, LayerOrigin, Standing, differences, fingerprint
from .build import build_on_meta
from .exceptions import FIRST_STAYS_FIRST
from .follow import Follower
from .stack import decoder_stack, text_config


@dataclasses.dataclass(frozen=True)
class SplicedConfig:
    """The configuration of a transplant."""

    config: PreTrainedConfig
    native: bool  # the recipient's own class builds every layer from it as it was
    reasons: tuple[str, ...] = ()  # if not native, a line for each difference of the best candidate


def splice_config(recipient: Anatomy, origins: Sequence[LayerOrigin], rejected: Sequence[str] = ()) -> SplicedConfig:
    """Find the configuration under which the recipient's class builds these layers."""
    reasons = list(rejected)
    for config in itertools.islice(candidates(recipient, origins), 1 if rejected else 0, None):
        try:
            found = layer_differences(recipient, build_on_meta(recipient.model_class, config), origins)
        except BUILD_ERRORS as error:
            found = [build_failure(recipient, error)]
        if not found:
            return SplicedConfig(config, True)
        reasons = reasons or found
    reasons = reasons or [f"{type(recipient.config).__name__} refuses {len(origins)} layers of these kinds"]
    return SplicedConfig(Follower(recipient, origins).running_config(), False, tuple(reasons))


def candidates(recipient: Anatomy, origins: Sequence[LayerOrigin]) -> Iterator[PreTrainedConfig]:
    """Yield configurations that may build these layers, the most likely first; see `layer_differences`."""
    _refuse_second_first(recipient, origins)
    yield from Follower(recipient, origins).candidates()


def build_failure(recipient: Anatomy, error: Exception) -> str:
    """Say why a configuration is not a candidate: its class cannot be built from it."""
    return f"{recipient.model_class.__name__} cannot be built: {type(error).__name__}: {error}"


def layer_differences(recipient: Anatomy, model: PreTrainedModel, origins: Sequence[LayerOrigin]) -> list[str]:
    """List how the layers of a model differ from those that it should have."""
    try:
        layers = decoder_stack(model, recipient.stack_path)
    except (AssertionError, AttributeError) as error:
        return [build_failure(recipient, error)]
    _refuse_tables(recipient, model)
    if len(layers) != len(origins):
        return [f"{len(layers)} layers would be built, not {len(origins)}"]
    lines: list[str] = []
    places: dict[int, dict[int, set[int]]] = {}
    for number, origin in enumerate(origins):
        places.setdefault(id(origin.anatomy), {}).setdefault(origin.index, set()).add(number)
    for number, (layer, origin) in enumerate(zip(layers, origins, strict=True)):
        was = Standing(origin.anatomy.fingerprints[origin.index], origin.index, origin.anatomy.num_layers)
        became = Standing(fingerprint(layer), number, len(layers))
        lines += [f"layer {number}: {line}" for line in differences(was, became, places[id(origin.anatomy)])]
    return lines


def _refuse_tables(recipient: Anatomy, candidate: PreTrainedModel) -> None:
    """Refuse a model with a table outside its layers that has an entry for each layer: a donor has no entry."""
    inside = f"{recipient.stack_path}."
    before = {name: tuple(p.shape) for name, p in recipient.model.named_parameters() if not name.startswith(inside)}
    for name, parameter in candidate.named_parameters():
        if name in before and tuple(parameter.shape) != before[name]:
            raise CompatibilityError(
                f"{recipient.what}: {recipient.config.model_type} keeps a table with a part for each layer outside its "
                f"layers, {name}, {list(before[name])} for {recipient.num_layers} layers. A donor has no entry in it."
            )


def _refuse_second_first(recipient: Anatomy, origins: Sequence[LayerOrigin]) -> None:
    reason = FIRST_STAYS_FIRST.get(text_config(recipient.config).model_type)
    for number, origin in enumerate(origins):
        if reason is not None and (number == 0) != (origin.index == 0):
            raise CompatibilityError(
                f"{recipient.what}: layer {origin.index} of {origin.anatomy.what} cannot run as layer {number}: "
                f"{reason}. Use a position of at least 1, and a donor without layer 0."
            )
