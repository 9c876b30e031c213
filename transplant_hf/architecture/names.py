"""The names of decoder layers' tensors in checkpoints, which may differ from the names in the model.

Checkpoints may lack a prefix (GPT-2 without `transformer.`), use older names, or hold one tensor for each expert;
Transformers renames and fuses them at load. The same rules are applied here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedModel, WeightConverter
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import rename_source_key

from ..errors import CompatibilityError


class LayerTensorName(NamedTuple):
    """A checkpoint's name of a layer's tensor: `prefix.number.rest`."""

    prefix: str
    number: int
    rest: str

    def at(self, number: int) -> str:
        """The name of the same tensor of another layer."""
        return f"{self.prefix}.{number}.{self.rest}"


class LayerNames:
    """Reads checkpoint names of one architecture."""

    def __init__(self, model: PreTrainedModel, stack_path: str, transforms: Sequence[Any] | None = None) -> None:
        if transforms is None:
            transforms = get_model_conversion_mapping(model)
        self._converters = [rule for rule in transforms if isinstance(rule, WeightConverter)]
        self._renamings: list[Any] = [rule for rule in transforms if not isinstance(rule, WeightConverter)]
        base = f"{model.base_model_prefix}."
        inner = stack_path.removeprefix(base)
        self._target = re.compile(rf"(?:{re.escape(base)})?{re.escape(inner)}\.(\d{{1,9}})\.(.+)")
        self._number_part: dict[tuple[str, ...], int | None] = {}
        ignored = model._keys_to_ignore_on_load_unexpected or ()
        self._ignored = [re.compile(pattern) for pattern in ignored] + [re.compile(r"rotary_emb\.inv_freq")]

    def split(self, name: str) -> LayerTensorName | None:
        """Split a checkpoint's name at the layer's number; `None` when it names no decoder layer's tensor."""
        parts = name.split(".")
        shape = tuple("#" if part.isdecimal() and len(part) < 10 else part for part in parts)
        if shape not in self._number_part:
            self._number_part[shape] = self._find_number(shape, name)
        at = self._number_part[shape]
        if at is None:
            return None
        return LayerTensorName(".".join(parts[:at]), int(parts[at]), ".".join(parts[at + 1 :]))

    def inside_layer(self, name: str) -> str | None:
        """Return the name a checkpoint's tensor gets inside its layer, after all renaming."""
        match = self._target.fullmatch(self._renamed(name))
        return match[2] if match else None

    def is_one_to_one(self, name: str) -> bool:
        """Whether a checkpoint's tensor is loaded unchanged, neither fused nor split."""
        return rename_source_key(name, self._renamings, self._converters)[1] is None

    def is_ignored(self, name: str) -> bool:
        """Whether Transformers skips a tensor of older checkpoints, such as a causal mask."""
        return any(pattern.search(name) for pattern in self._ignored)

    def may_be_converted(self, inside: str) -> bool:
        """Whether a layer's tensor may be made from several of a checkpoint, or be one part of one."""
        targets = [target for rule in self._converters for target in rule.target_patterns]
        return any(re.search(target, inside) for target in targets)

    def _renamed(self, name: str) -> str:
        return rename_source_key(name, self._renamings, self._converters)[0]

    def _find_number(self, shape: tuple[str, ...], name: str) -> int | None:
        # Every number gets a unique value, so that the one that becomes the layer's number is known.
        marks = {at: str(101 + at) for at, part in enumerate(shape) if part == "#"}
        marked = ".".join(marks.get(at, part) for at, part in enumerate(shape))
        match = self._target.fullmatch(self._renamed(marked))
        if match is None:
            return None
        for at, mark in marks.items():
            if match[1] == mark:
                return at
        raise CompatibilityError(
            f"checkpoint tensor {name!r} becomes {self._renamed(name)!r}: its layer's number is computed while "
            "loading, so it cannot be moved."
        )


def unpacked_conversions(model: Any) -> list[Any] | None:
    """Return the conversions that saving a loaded model reverts, without those that pack weights for a quantizer."""
    rules = getattr(model, "_weight_conversions", None)
    packs = [any(hasattr(one, "hf_quantizer") for one in getattr(rule, "operations", ())) for rule in rules or ()]
    return rules and [rule for rule, packing in zip(rules, packs, strict=True) if not packing]


_ADAPTER = re.compile(r"(?:^|\.)(?:lora_|ia3_|hada_|lokr_|oft_|boft_|vera_|adalora)")


def is_adapter(name: str) -> bool:
    """Whether a tensor belongs to an adapter that was not merged into the layers."""
    return bool(_ADAPTER.search(name))


def is_adapted(name: str) -> bool:
    """Whether a tensor of a model in memory belongs to an adapter, or to a layer that an adapter wraps."""
    return is_adapter(name) or "base_layer" in name.split(".")
