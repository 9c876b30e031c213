"""Fields of the recipient's configuration that a transplant changes: set at load, and kept in a thin save."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from ..architecture import Anatomy, apply_overrides
from ..architecture.overrides import NOT_SETTABLE
from ..errors import CompatibilityError, ConfigurationError
from ..sources import HubOptions, locate
from ..splice import Blueprint, draw_blueprint

__all__ = ["kept_overrides", "live_recipient_config"]

# How a model is run, and what Transformers notes: the same recipient without them.
_RUNTIME = re.compile(
    r"dtype|torch_dtype|architectures|transformers_version|tokenizer_class|use_cache|output_\w+|\w*return_dict\w*|"
    r"\w*attn_implementation|\w*experts_implementation|use_kernels|torchscript|gradient_checkpointing|"
    + NOT_SETTABLE.pattern
)


def kept_overrides(model: Any, blueprint: Blueprint, hub: HubOptions) -> dict[str, Any]:
    """Return what the recipient's configuration in a model says otherwise than the pinned recipient's.

    Args:
        model: The transplanted model, all donors on.
        blueprint: What runs in it.
        hub: How to reach the recipient.

    Returns:
        The fields, as JSON; of a nested configuration, the fields in it.

    Raises:
        ConfigurationError: A change with which the recipient's weights or the donors could not be loaded.
    """
    live = _live_changes(model, blueprint)
    if live:
        _refuse_other_shapes(blueprint, _changed(blueprint.recipient.config, live), live)
    pinned, path = _pinned(blueprint, hub)
    overrides = _merged(_differences(pinned, blueprint.recipient.config), live)
    apply_overrides(copy.deepcopy(pinned), overrides, {})  # what a reload would refuse
    for name in reversed(path):
        overrides = {name: overrides} if overrides else {}
    return overrides


def live_recipient_config(model: Any, blueprint: Blueprint) -> PreTrainedConfig:
    """Return the recipient's configuration with what was set on the model's after loading.

    Raises:
        ConfigurationError: A field was changed that says of each running layer what it is.
    """
    return _changed(blueprint.recipient.config, _live_changes(model, blueprint))


def _changed(config: PreTrainedConfig, changes: Mapping[str, Any]) -> PreTrainedConfig:
    changed = copy.deepcopy(config)
    apply_overrides(changed, changes, {})
    return changed


def _live_changes(model: Any, blueprint: Blueprint) -> dict[str, Any]:
    recipient, running = blueprint.recipient.config, blueprint.state(model._transplant.disabled).config
    changes = _differences(running, model.config)
    spliced = _shared(changes, _differences(recipient, running))
    if spliced:
        raise ConfigurationError(
            f"model.config.{spliced} was changed after loading. It describes the layers that run, donors among them, "
            "so that nothing can be said of the recipient alone. Set it back, or save in full."
        )
    return changes


def _differences(before: PreTrainedConfig, after: PreTrainedConfig) -> dict[str, Any]:
    old, new = before.to_dict(), after.to_dict()
    found: dict[str, Any] = {}
    for name, value in new.items():
        if _RUNTIME.fullmatch(name):
            continue
        one, other = getattr(before, name, None), getattr(after, name, None)
        if isinstance(one, PreTrainedConfig) and isinstance(other, PreTrainedConfig):
            inner = _differences(one, other)
            if inner:
                found[name] = inner
        elif name not in old or old[name] != value:
            found[name] = value
    return found


def _shared(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    for name in one.keys() & other.keys():
        mine, theirs = one[name], other[name]
        if not (isinstance(mine, dict) and isinstance(theirs, dict)):
            return name
        inner = _shared(mine, theirs)
        if inner is not None:
            return f"{name}.{inner}"
    return None


def _merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    return dict(one) | {
        name: _merged(one[name], value) if isinstance(value, dict) and isinstance(one.get(name), dict) else value
        for name, value in other.items()
    }


def _pinned(blueprint: Blueprint, hub: HubOptions) -> tuple[PreTrainedConfig, tuple[str, ...]]:
    """Read the pinned recipient's configuration, and say where in its file the one of this model's class is."""
    config, mine = blueprint.config, blueprint.recipient.config
    source = locate(config.recipient, files=("config.json",), revision=config.recipient_revision, hub=hub)
    if not (source.folder / "config.json").exists():  # its configuration is in a file of another kind
        return mine, ()
    kind = type(mine)
    fields, _ = kind.get_config_dict(source.folder)  # which also decodes infinite numbers
    if fields.get("model_type") == kind.model_type:
        return kind.from_dict(fields), ()
    for name, part in fields.items():
        if isinstance(part, dict) and part.get("model_type", kind.base_config_key) in (kind.model_type, name):
            return kind.from_dict(part), (name,)
    raise ConfigurationError(f"{source} is now a model of type {fields.get('model_type')!r}, not {kind.model_type!r}.")


def _refuse_other_shapes(blueprint: Blueprint, config: PreTrainedConfig, changes: Mapping[str, Any]) -> None:
    names = ", ".join(sorted(changes))
    recipient = blueprint.recipient
    donors = [(dataclasses.replace(part.spec, layers=None), part.donor) for part in blueprint.parts]
    try:
        built = Anatomy(recipient.model_class, config, recipient.what).model
        draw_blueprint(recipient.model_class, config, donors, blueprint.config, blueprint.keep_replaced)
    except CompatibilityError as error:
        raise ConfigurationError(
            f"model.config was changed after loading ({names}), and with that a thin save could not be loaded: {error}"
        ) from error
    wanted = {name: tensor.shape for name, tensor in recipient.model.state_dict().items()}
    found = {name: tensor.shape for name, tensor in built.state_dict().items()}
    wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if wrong:
        raise ConfigurationError(
            f"model.config was changed after loading ({names}), and with that {wrong[0]} would have another shape "
            f"({found.get(wrong[0])}) than in the recipient ({wanted.get(wrong[0])}). Set it back, or save in full."
        )
