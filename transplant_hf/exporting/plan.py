"""Which tensors an export holds, under which names and in which types."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..architecture import LayerNames
from ..donor.dtypes import loaded_dtype, stored_dtype
from ..donor.tensors import TensorInfo
from ..errors import CheckpointError, ConfigurationError
from ..splice import Blueprint, merge_weights
from ..splice.quantized import QUANTISED
from .checkpoint import StoredTensor

__all__ = ["Plan", "PlannedTensor", "draw_plan"]

_PACKED = (*QUANTISED, "g_idx")
# The one method whose loader takes layers in full precision beside packed ones, by their names.
_MIXES = "mxfp4"


@dataclasses.dataclass(frozen=True)
class PlannedTensor:
    """One tensor of an export.

    Args:
        source: Where it is read from.
        dtype: What it is written as, as safetensors names types.
    """

    source: StoredTensor
    dtype: str

    @property
    def written(self) -> TensorInfo:
        """What its header will say."""
        return TensorInfo(self.source.info.shape, self.dtype)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What an export holds.

    Args:
        tensors: By name, layer after layer.
        main_dtype: The type of most of what is not quantised.
        left_out: Names in the recipient's files that belong to layers it does not have.
        mixed: Donors in full precision inside a quantised recipient.
    """

    tensors: Mapping[str, PlannedTensor]
    main_dtype: torch.dtype
    left_out: tuple[str, ...]
    mixed: tuple[str, ...] = ()


def draw_plan(blueprint: Blueprint, recipient: Mapping[str, StoredTensor], dtype: torch.dtype | None) -> Plan:
    """Renumber the recipient's tensors, put the donors' between them, and choose every type.

    Args:
        blueprint: What runs.
        recipient: The recipient's tensors, by checkpoint name.
        dtype: What floating point weights are cast to; by default they stay as they are, and the donors' become what
            the recipient's are.

    Raises:
        CheckpointError: Tensors of a layer are missing.
        ConfigurationError: A quantised recipient with donors that are stored in another way.
    """
    names = LayerNames(blueprint.recipient.model, blueprint.recipient.stack_path)
    split = {name: names.split(name) for name in recipient}
    depth = blueprint.recipient.num_layers
    past_end = {name for name, at in split.items() if at is not None and at.number >= depth}
    kept = {name: tensor for name, tensor in recipient.items() if name not in past_end}
    layers: list[dict[str, str]] = [{} for _ in range(depth)]
    for name, tensor in kept.items():
        at = split[name]
        if at is not None:
            layers[at.number][at.rest] = tensor.info.dtype
    _refuse_gaps(blueprint, layers)
    mixed = _in_full_precision(blueprint)
    merged = merge_weights(blueprint, kept, {}, names)
    found = {name: tensor for name, tensor in merged.tensors.items() if name not in merged.donor_names}
    parts = {part.name: (part.donor.infos(), part.donor.store.slices(), part) for part in blueprint.parts}
    for name, (donor, inside) in merged.donor_names.items():
        infos, slices, part = parts[donor]
        file = infos[inside].file or part.donor
        found[name] = StoredTensor(infos[inside], slices[inside], f"{inside} of donor {donor} in {file}")
    choose = _Types(blueprint, kept, layers, dtype, _packed_modules(found))
    rests = {name: inside.split(".", 2)[2] for name, (_, inside) in merged.donor_names.items()}
    ordered = sorted(found, key=_by_number)
    tensors = {name: PlannedTensor(found[name], choose(name, found[name].info, rests.get(name))) for name in ordered}
    return Plan(tensors, choose.main, tuple(sorted(past_end)), mixed)


class _Types:
    """Chooses the type that each tensor is written in."""

    def __init__(
        self,
        blueprint: Blueprint,
        recipient: Mapping[str, StoredTensor],
        layers: list[dict[str, str]],
        wanted: torch.dtype | None,
        packed: Collection[str],
    ) -> None:
        self._wanted, self._packed = wanted, packed
        counts: Counter[str] = Counter()
        for name, tensor in recipient.items():
            if _is_plain_float(tensor.info.dtype) and not _is_of_quantised(name):
                counts[tensor.info.dtype] += tensor.info.num_elements
        self.main: torch.dtype = wanted or (loaded_dtype(counts.most_common(1)[0][0]) if counts else torch.float32)
        found: dict[str, Counter[str]] = {}
        for layer in layers:
            for rest, dtype in layer.items():
                found.setdefault(rest, Counter())[dtype] += 1
        self._usual = {rest: types.most_common(1)[0][0] for rest, types in found.items()}
        self._fixed = _kept_in_float32(blueprint.recipient.model, wanted)

    def __call__(self, name: str, info: TensorInfo, rest: str | None) -> str:
        """Choose one.

        Args:
            name: Its name in the export.
            info: What it is now.
            rest: Of a donor's tensor, the name inside its layer.
        """
        if not _is_plain_float(info.dtype) or _module(name) in self._packed:
            return info.dtype
        if self._fixed is not None and self._fixed.search(name):
            return info.dtype
        if self._wanted is not None:
            return stored_dtype(self._wanted, name)
        usual = self._usual.get(rest or "", stored_dtype(self.main, name)) if rest is not None else info.dtype
        return usual if _is_plain_float(usual) else info.dtype


def _kept_in_float32(model: PreTrainedModel, dtype: torch.dtype | None) -> re.Pattern[str] | None:
    """What Transformers keeps in float32 although the model is loaded in a smaller type: casting it would lose bits."""
    patterns = model._get_dtype_plan(dtype) if dtype is not None else {}
    return re.compile("|".join(pattern.replace("*", ".*") for pattern in patterns)) if patterns else None


def _is_plain_float(stored: str) -> bool:
    dtype = loaded_dtype(stored)
    return dtype.is_floating_point and dtype.itemsize > 1


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _is_of_quantised(name: str) -> bool:
    return any(word in name.rpartition(".")[2] for word in _PACKED)


def _packed_modules(names: Iterable[str]) -> set[str]:
    """Modules with quantised weights: their scales must stay as they are."""
    return {_module(name) for name in names if _is_of_quantised(name)}


def _by_number(name: str) -> list[tuple[int, int, str]]:
    """Sort `layers.2` before `layers.10`, so that a shard holds layers that follow each other."""
    return [(0, int(part), "") if part.isdecimal() and len(part) < 10 else (1, 0, part) for part in name.split(".")]


def _refuse_gaps(blueprint: Blueprint, layers: list[dict[str, str]]) -> None:
    empty = [number for number, tensors in enumerate(layers) if not tensors]
    if empty and len(empty) < len(layers):
        raise CheckpointError(
            f"the checkpoint of {blueprint.recipient.what} holds nothing of its layers {empty}: a file is missing, or "
            "its config.json belongs to another model."
        )


def _in_full_precision(blueprint: Blueprint) -> tuple[str, ...]:
    """Find donors beside quantised layers, and refuse those that no loader reads there; a donor is never quantised.

    Raises:
        ConfigurationError: With what to do.
    """
    method = _quantization_method(blueprint.recipient.config)
    names = tuple(part.name for part in blueprint.parts)
    if method not in (None, _MIXES):
        raise ConfigurationError(
            f"{blueprint.recipient.what} is quantised ({method}) and donor {names[0]!r} is not; a plain checkpoint can "
            f"hold both for {_MIXES} only. Export from the recipient in full precision, and quantise the export."
        )
    return names if method else ()


def _quantization_method(config: PreTrainedConfig) -> str | None:
    fields = getattr(config, "quantization_config", None)
    if fields is None:
        return None
    method = fields.get("quant_method") if isinstance(fields, dict) else fields.quant_method
    return str(getattr(method, "value", method))
