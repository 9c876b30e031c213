"""Compare the configuration fields that decoder layers use, between a donor's source model and a recipient."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig

from ..architecture.build import BUILD_ERRORS
from ..architecture.follow import is_rule
from ..numeric import is_whole

__all__ = ["field_mismatches", "take_recipient_fields"]

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


def field_mismatches(donor: PreTrainedConfig, recipient: PreTrainedConfig) -> Iterator[str]:
    """Yield a line for each field that differs and changes what a layer computes."""
    ours = recipient.to_dict()
    yield from _differences(donor.to_dict(), {name: ours[name] for name in _class_fields(recipient, ours)})


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, new in ours.items():
        old = theirs.get(name)
        if _OUTSIDE_LAYERS.search(name) or (is_rule(name) and _is_count(old) and _is_count(new)):
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping) and "model_type" in new:
            # A nested configuration; all fields of other mappings, such as RoPE's, are compared.
            yield from _differences(old, new, f"{prefix}{name}.")
        elif not _same(old, new) and not (_per_layer(old) or _per_layer(new)):
            yield f"{prefix}{name}: donor {_short(old)}, recipient {_short(new)}"


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


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 160 else f"{text[:157]}..."
