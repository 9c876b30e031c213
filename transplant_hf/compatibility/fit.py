"""Compare a donor with a recipient, from headers and configurations only."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import PreTrainedConfig

from ..architecture import Anatomy, LayerNames, text_config
from ..architecture.build import BUILD_ERRORS
from ..architecture.exceptions import REFUSALS
from ..donor import Donor
from ..donor.tensors import layer_of
from ..errors import CompatibilityError
from .fields import field_mismatches, take_recipient_fields

__all__ = ["donor_anatomy", "mismatches", "refuse_unsupported"]

_MAX_TENSORS = 8  # further tensors are counted


def refuse_unsupported(recipient: Anatomy) -> None:
    """Refuse a recipient whose layers cannot be used in another model."""
    fields = text_config(recipient.config).config.to_dict()
    model_type = fields.get("model_type")
    for applies, reason in REFUSALS:
        if applies(fields):
            raise CompatibilityError(f"{recipient.what}: {model_type} is not supported: {reason}.")
    _ = recipient.stack_path  # raises if there is not exactly one stack of layers


def donor_anatomy(donor: Donor, recipient: Anatomy) -> Anatomy:
    """Build the donor's source model without memory, as the recipient's class."""
    ours = text_config(recipient.config).config
    fields = dict(donor.record.source_config)
    if recipient.config.model_type != donor.model_type:
        # The text part of a composite model has the same layers as the text model alone.
        fields = next((part for part in fields.values() if _is_config_of(part, recipient.config)), fields)
    if fields.get("model_type", donor.model_type) != recipient.config.model_type:
        raise CompatibilityError(
            f"donor {donor} does not fit {recipient.what}:\n  - model_type: donor {donor.model_type!r}, recipient "
            f"{ours.model_type!r}\nA donor needs a recipient with layers of the same shape.",
            [f"model_type: donor {donor.model_type!r}, recipient {ours.model_type!r}"],
        )
    try:
        config = type(recipient.config).from_dict(fields)
    except BUILD_ERRORS as error:
        raise CompatibilityError(f"donor {donor}: its source_config is not valid: {error}") from error
    config._attn_implementation = recipient.config._attn_implementation
    config.dtype = recipient.config.dtype
    take_recipient_fields(config, recipient.config)
    if _builds_the_same(config, recipient.config):
        return recipient
    return Anatomy(recipient.model_class, config, f"donor {donor}")


def _is_config_of(part: object, config: PreTrainedConfig) -> bool:
    return isinstance(part, dict) and part.get("model_type") == config.model_type


def _builds_the_same(one: PreTrainedConfig, other: PreTrainedConfig) -> bool:
    ignored = {"name_or_path", "transformers_version", "architectures", "dtype", "use_cache"}
    first, second = one.to_dict(), other.to_dict()
    names = {name for name in {*first, *second} if name.lstrip("_") not in ignored}
    return all(first.get(name) == second.get(name) for name in names)


def mismatches(donor: Donor, theirs: Anatomy, recipient: Anatomy) -> list[str]:
    """Return all mismatches of a donor with a recipient, one line each."""
    lines: list[str] = []
    if theirs is not recipient:
        lines += field_mismatches(text_config(theirs.config).config, text_config(recipient.config).config)
    if donor.layer_indices[-1] >= theirs.num_layers:
        lines.append(f"layer_indices: donor {donor.layer_indices}, its source model has {theirs.num_layers} layers")
    else:
        shared = sorted(theirs.sharing_layers & set(donor.layer_indices))
        if shared:
            lines.append(
                f"layer_indices: layers {shared} share weights with other layers, so they cannot be used alone"
            )
        lines += _tensor_mismatches(donor, theirs)
    return lines


def _tensor_mismatches(donor: Donor, theirs: Anatomy) -> Iterator[str]:
    names = LayerNames(theirs.model, theirs.stack_path)
    prefix = theirs.stack_path
    wrong: list[str] = []
    found: dict[int, set[str]] = {number: set() for number in range(donor.num_layers)}
    shapes = [
        {name: tuple(tensor.shape) for name, tensor in theirs.layers[index].state_dict().items()}
        for index in donor.layer_indices
    ]
    for name, info in donor.infos().items():
        number, rest = layer_of(name)
        inside = names.inside_layer(f"{prefix}.{donor.layer_indices[number]}.{rest}") or rest
        found[number].add(inside)
        if inside not in shapes[number]:
            if not names.is_ignored(f"{prefix}.{number}.{rest}"):
                wrong.append(f"{name}: unexpected, its layer has no {inside}")
        elif names.is_one_to_one(f"{prefix}.{number}.{rest}") and info.shape != shapes[number][inside]:
            wrong.append(f"{name}: donor {list(info.shape)}, its layer needs {list(shapes[number][inside])}")
    for number, wanted in enumerate(shapes):
        missing = sorted(name for name in set(wanted) - found[number] if not names.may_be_converted(name))
        wrong += [f"layers.{number}.{name}: missing" for name in missing]
    yield from wrong[:_MAX_TENSORS]
    if len(wrong) > _MAX_TENSORS:
        yield f"... and {len(wrong) - _MAX_TENSORS} more tensors"
