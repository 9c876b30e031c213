"""Whether a donor fits a recipient: all mismatches, from headers and configurations only."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig

from .architecture import Anatomy, LayerNames, text_config
from .architecture.exceptions import REFUSALS
from .architecture.follow import copy_runtime, is_rule
from .display import position_text
from .donor import Donor
from .donor.tensors import layer_of
from .errors import BUILD_ERRORS, CompatibilityError
from .layer_map import LayerMap, Position
from .numeric import is_whole, shown

_SAME_SHAPE = "A donor needs a recipient with layers of the same shape."
_MAX_TENSORS = 8  # further tensors are counted
# Fields that do not change what a decoder layer computes: embeddings and heads, training, bookkeeping.
_OUTSIDE_LAYERS = re.compile(
    r"vocab|_token_id|^_|dropout|pdrop|^drop|initializer|init_std|^tie_|use_cache|dtype|name_or_path|architectures|"
    r"transformers_version|^output_|return_dict|label|problem_type|aux_loss|z_loss|pretraining_tp|^is_|summary_|"
    r"task_specific|finetuning|quantization|checkpointing|pruned|chunk_size_feed|nextn|mtp|auto_map|tokenizer_class|"
    r"^prefix$|max_position_embeddings|n_positions|n_ctx|max_seq|seq_len|^num_layers$|^n_layers?$|_layers$|"
    r"layerdrop|jitter|^bos|^eos|^pad|_coef$|scale_embedding|type_vocab|max_window_layers|cross_attention|"
    r"logit_scale|logits_scaling|final_logit|embedding_multiplier|use_kernels|format_version"
)

# Those of them that layers use in training only: the recipient's are used.
_TRAINING = re.compile(
    r"dropout|pdrop|^drop|layerdrop|jitter|initializer|init_std|aux_loss|z_loss|^output_|^use_cache$"
)
_FLOAT32 = 2.0**-23
# Configurations of encoders. If a layer reads one, as GIT's layers read the number of image tokens, it must be the
# recipient's, whose encoder runs.
_ENCODERS = re.compile(r"^(vision|image|video|audio|speech)_")


@dataclasses.dataclass(frozen=True)
class CompatibilityReport:
    """Whether a donor fits a recipient at a position, and why not.

    Args:
        recipient: The recipient, with its commit if it has one.
        donor: The donor, with its commit if it has one.
        position: The position.
        mismatches: Every mismatch, both values in each line; empty when it fits.
        native: Whether the recipient's own class can be configured for these layers; `None` when it does not fit.
        notes: If only transplant_hf can load the result, the reasons.
        layer_map: The layers that would run.
    """

    recipient: str
    donor: str
    position: Position
    mismatches: tuple[str, ...] = ()
    native: bool | None = None
    notes: tuple[str, ...] = ()
    layer_map: LayerMap = dataclasses.field(default_factory=LayerMap)

    @property
    def compatible(self) -> bool:
        """Whether it fits."""
        return not self.mismatches

    def __bool__(self) -> bool:
        return self.compatible

    def __str__(self) -> str:
        head = f"donor {self.donor} {{}} recipient {self.recipient} at {position_text(self.position)}"
        if self.mismatches:
            return "\n".join([f"{head.format('does not fit')}:", *(f"  - {line}" for line in self.mismatches)])
        kind = "as a native model" if self.native else "with layers only transplant_hf can load"
        return "\n".join([f"{head.format('fits')}, {kind}.", *(f"  - {line}" for line in self.notes)])

    def raise_for_mismatches(self) -> None:
        """Raise a `CompatibilityError` with every mismatch if the donor does not fit."""
        if self.mismatches:
            raise CompatibilityError(f"{self}\n{_SAME_SHAPE}", self.mismatches)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON."""
        return {**dataclasses.asdict(self), "layer_map": list(self.layer_map), "compatible": self.compatible}


def refuse_unsupported(recipient: Anatomy) -> None:
    """Refuse a recipient whose layers cannot be used in another model."""
    fields = text_config(recipient.config).to_dict()
    model_type = fields.get("model_type")
    for applies, reason in REFUSALS:
        if applies(fields):
            raise CompatibilityError(f"{recipient.what}: {model_type} is not supported: {reason}.")
    _ = recipient.stack_path  # raises if there is not exactly one stack of layers


def donor_anatomy(donor: Donor, recipient: Anatomy) -> Anatomy:
    """Build the donor's source model without memory, as the recipient's class."""
    fields = dict(donor.record.source_config)
    if recipient.config.model_type != donor.model_type:
        # The text part of a composite model has the same layers as the text model alone.
        parts = [part for part in fields.values() if isinstance(part, dict)]
        fields = next((part for part in parts if part.get("model_type") == recipient.config.model_type), fields)
    if fields.get("model_type", donor.model_type) != recipient.config.model_type:
        line = f"model_type: donor {donor.model_type!r}, recipient {text_config(recipient.config).model_type!r}"
        raise CompatibilityError(f"donor {donor} does not fit {recipient.what}:\n  - {line}\n{_SAME_SHAPE}", [line])
    try:
        config = type(recipient.config).from_dict(fields)
    except BUILD_ERRORS as error:
        raise CompatibilityError(f"donor {donor}: its source_config is not valid: {error}") from error
    copy_runtime(recipient.config, config)
    take_recipient_fields(config, recipient.config)
    if _builds_the_same(config, recipient.config):
        return recipient
    return Anatomy(recipient.model_class, config, f"donor {donor}")


def _builds_the_same(one: PreTrainedConfig, other: PreTrainedConfig) -> bool:
    ignored = {"name_or_path", "transformers_version", "architectures", "dtype", "use_cache"}
    first, second = one.to_dict(), other.to_dict()
    return all(first.get(name) == second.get(name) for name in {*first, *second} if name.lstrip("_") not in ignored)


def mismatches(donor: Donor, theirs: Anatomy, recipient: Anatomy) -> list[str]:
    """Return all mismatches of a donor with a recipient, one line each."""
    lines: list[str] = []
    if theirs is not recipient:
        # Each field that differs and changes what a layer computes.
        config = text_config(recipient.config)
        ours = config.to_dict()
        known = {name: ours[name] for name in _class_fields(config, ours)}
        lines += _differences(text_config(theirs.config).to_dict(), known)
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


def take_recipient_fields(donor: PreTrainedConfig, recipient: PreTrainedConfig) -> None:
    """Set in a donor's source configuration what the recipient determines: settings for training, and its encoders."""
    theirs = donor.to_dict()
    for name, value in recipient.to_dict().items():
        if name not in theirs or theirs[name] == value:
            continue
        old, new = getattr(donor, name, None), getattr(recipient, name, None)
        if isinstance(old, PreTrainedConfig) and isinstance(new, PreTrainedConfig):
            if _ENCODERS.search(name):
                setattr(donor, name, copy.deepcopy(new))
            else:
                take_recipient_fields(old, new)
        elif _TRAINING.search(name) or _same(theirs[name], value):
            setattr(donor, name, value)


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, new in ours.items():
        old = theirs.get(name)
        if _OUTSIDE_LAYERS.search(name) or (is_rule(name) and _is_count(old) and _is_count(new)):
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping) and "model_type" in new:
            # A nested configuration; all fields of other mappings, such as RoPE's, are compared.
            yield from _differences(old, new, f"{prefix}{name}.")
        elif not _same(old, new) and not (_per_layer(old) or _per_layer(new)):
            yield f"{prefix}{name}: donor {shown(old)}, recipient {shown(new)}"


def _same(old: Any, new: Any) -> bool:
    """Whether two values are equal, or differ only by rounding to float32, as in GGUF files."""
    if isinstance(old, float) and isinstance(new, float):
        return old == new or math.isclose(old, new, rel_tol=_FLOAT32)
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return old.keys() == new.keys() and all(_same(old[key], new[key]) for key in old)
    return bool(old == new)


def _class_fields(config: PreTrainedConfig, fields: dict[str, Any]) -> list[str]:
    """The fields that the configuration's class has; a `config.json` may have others, which are never read."""
    try:
        known = type(config)().to_dict()
    except BUILD_ERRORS:
        return list(fields)
    return [name for name in fields if name in known]


def _is_count(value: Any) -> bool:
    # A rule about layers is a small number; names of rotary bases also end in "freq".
    return value is None or (is_whole(value) and value < 1000)


def _per_layer(value: Any) -> bool:
    # Whether a list with an entry for each layer fits is checked when the layers are built.
    by_number = isinstance(value, dict) and bool(value) and all(str(key).isdigit() for key in value)
    return by_number or (isinstance(value, Sequence) and not isinstance(value, str))
