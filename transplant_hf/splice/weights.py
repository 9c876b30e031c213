"""Merge the weights of recipient and donors in one pass: layers renumbered, all tensors read lazily."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_safetensors_bytes
from transformers.modeling_utils import load_state_dict

from ..architecture import LayerNames
from ..donor.tensors import layer_of
from ..errors import CheckpointError
from ..layer_map import RECIPIENT
from ..numeric import is_finite
from .blueprint import Blueprint


@dataclasses.dataclass(frozen=True)
class Provenance:
    """The file that holds a tensor, and its name there."""

    file: str
    name: str


@dataclasses.dataclass
class MergedWeights:
    """The weights of a transplant before they are read."""

    tensors: dict[str, Any]  # by new checkpoint name, lazy: `[...]` reads one
    provenance: dict[str, Provenance]
    donor_names: dict[str, tuple[str, str]]  # the donor, and the tensor's name in it
    check: FiniteCheck

    def weight_map(self) -> dict[str, str]:
        """Absolute file by name, as a shard index has them."""
        return {name: os.path.abspath(origin.file) for name, origin in self.provenance.items()}

    def restore_offload_names(self, index: dict[str, dict[str, Any]] | None) -> None:
        """Point entries of a disk offload index to the names that tensors have in their files."""
        done: set[int] = set()
        for entry in (index or {}).values():
            origin = self.provenance.get(entry["weight_name"])
            if id(entry) not in done and origin and entry["safetensors_file"] == os.path.abspath(origin.file):
                entry["weight_name"] = origin.name
                done.add(id(entry))


class FiniteCheck:
    """Checks donor tensors while they are read, so that each is read once."""

    def __init__(self) -> None:
        self.not_finite: list[str] = []

    def watch(self, name: str, tensor: Any) -> Any:
        """Wrap a lazy tensor."""
        return _Watched(name, tensor, self)

    def look(self, name: str, tensor: torch.Tensor) -> None:
        """Record a tensor that holds NaN or infinity."""
        if not is_finite(tensor):
            self.not_finite.append(name)


class _Watched:
    """A lazy tensor whose values are checked when it is read."""

    def __init__(self, name: str, part: Any, check: FiniteCheck) -> None:
        self._name, self._part, self._check = name, part, check

    def __getitem__(self, index: Any) -> torch.Tensor:
        tensor = self._part[index]
        self._check.look(self._name, tensor)
        return tensor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)


def open_checkpoint(
    files: Sequence[str], disable_mmap: bool | None, weights_only: bool
) -> tuple[dict[str, Any], dict[str, Provenance]]:
    """Open a recipient's checkpoint without reading its tensors."""
    tensors: dict[str, Any] = {}
    provenance: dict[str, Provenance] = {}
    for path in files:
        if not path.endswith(".safetensors"):
            tensors.update(load_state_dict(path, weights_only=weights_only))
        elif disable_mmap:
            tensors.update(load_safetensors_bytes(Path(path).read_bytes()))
        else:
            try:
                file = safe_open(path, framework="pt", device="cpu")
            except SafetensorError as error:
                raise CheckpointError(f"{path} is not a whole safetensors file ({error}).") from error
            for name in file.keys():  # noqa: SIM118 - a safetensors file, not a dict
                tensors[name] = file.get_slice(name)
                provenance[name] = Provenance(path, name)
    return tensors, provenance


def merge_weights(
    blueprint: Blueprint,
    recipient: Mapping[str, Any],
    provenance: Mapping[str, Provenance],
    names: LayerNames,
) -> MergedWeights:
    """Renumber the recipient's layers and insert the donors'."""
    places = {stage.slot: number for number, stage in enumerate(blueprint.built)}
    merged = MergedWeights({}, {}, {}, FiniteCheck())
    prefixes: dict[str, int] = {}
    for raw, tensor in recipient.items():
        parts = names.split(raw)
        new = raw
        if parts is not None:
            prefixes[parts.prefix] = prefixes.get(parts.prefix, 0) + 1
            place = places.get((RECIPIENT, parts.number))  # type: ignore[call-overload]
            if place is None and parts.number < blueprint.recipient.num_layers:
                continue
            # A layer past the end does not belong to the model: it stays an unexpected key, as in Transformers.
            past_end = len(blueprint.built) + parts.number
            new = parts.at(past_end if place is None else place)
        merged.tensors[new] = tensor
        if raw in provenance:
            merged.provenance[new] = provenance[raw]
    if not prefixes:
        raise CheckpointError(
            f"no tensor of the checkpoint of {blueprint.recipient.what} belongs to a layer of "
            f"{blueprint.recipient.stack_path}; is it the checkpoint of another model?"
        )
    prefix = max(prefixes, key=lambda key: prefixes[key])
    _add_donors(merged, blueprint, prefix)
    return merged


def _add_donors(merged: MergedWeights, blueprint: Blueprint, prefix: str) -> None:
    for part in blueprint.parts:
        places = [number for number, stage in enumerate(blueprint.built) if stage.slot.source == part.name]
        infos = part.donor.infos()
        for name, tensor in part.donor.store.slices().items():
            number, rest = layer_of(name)
            new = f"{prefix}.{places[number]}.{rest}"
            merged.tensors[new] = merged.check.watch(f"{part.name}: {name}", tensor)
            merged.donor_names[new] = (part.name, name)
            file = infos[name].file
            if file is not None:
                merged.provenance[new] = Provenance(str(file), infos[name].name_in_file or name)
