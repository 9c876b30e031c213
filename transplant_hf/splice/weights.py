"""Merge the weights of recipient and donors in one pass: layers renumbered, all tensors read lazily."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_safetensors_bytes
from transformers.modeling_utils import load_state_dict

from ..architecture import LayerNames
from ..display import some_of
from ..donor.tensors import layer_of, read_shard_index, slices_of
from ..errors import CheckpointError
from ..layer_map import RECIPIENT
from ..numeric import is_finite
from ..sources import HubOptions, locate
from .blueprint import Blueprint

# A checkpoint in one file, and the index of one in shards, in the order in which Transformers looks for them.
_WEIGHTS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)


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
    not_finite: list[str]  # donor tensors, filled while they are read

    def weight_map(self) -> dict[str, str]:
        """Absolute file by name, as a shard index has them."""
        return {name: os.path.abspath(origin.file) for name, origin in self.provenance.items()}

    def refuse_not_finite(self) -> None:
        """Refuse donors with NaN or infinity among the values that were read."""
        if self.not_finite:
            raise CheckpointError(f"donor weights hold NaN or infinity: {some_of(self.not_finite)}.")

    def restore_offload_names(self, index: dict[str, dict[str, Any]] | None) -> None:
        """Point entries of a disk offload index to the names that tensors have in their files."""
        done: set[int] = set()
        for entry in (index or {}).values():
            origin = self.provenance.get(entry["weight_name"])
            if id(entry) not in done and origin and entry["safetensors_file"] == os.path.abspath(origin.file):
                entry["weight_name"] = origin.name
                done.add(id(entry))


class WatchedTensor:
    """A lazy tensor whose values are checked when it is read, so that it is read once."""

    def __init__(self, name: str, part: Any, not_finite: list[str]) -> None:
        self._name, self._part, self._not_finite = name, part, not_finite

    def __getitem__(self, index: Any) -> torch.Tensor:
        tensor: torch.Tensor = self._part[index]
        if not is_finite(tensor):
            self._not_finite.append(self._name)
        return tensor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)


def checkpoint_files(reference: str, revision: str | None, hub: HubOptions) -> list[Path]:
    """Return the weight files of a model, downloaded if it is a repository; empty where one is missing."""
    for whole, index in _WEIGHTS:
        source = locate(reference, files=("config.json", whole, index), revision=revision, hub=hub)
        names = [whole]
        if not (source.folder / whole).is_file() and (source.folder / index).is_file():
            names = sorted(set(read_shard_index(source.folder / index).values()))
            if source.from_hub:
                locate(reference, files=names, revision=source.revision, hub=hub)
        files = [source.folder / name for name in names]
        if all(file.is_file() for file in files):
            return files
    return []


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
            slices = slices_of(Path(path))
            tensors.update(slices)
            provenance.update({name: Provenance(path, name) for name in slices})
    return tensors, provenance


def merge_weights(
    blueprint: Blueprint,
    recipient: Mapping[str, Any],
    provenance: Mapping[str, Provenance],
    names: LayerNames,
) -> MergedWeights:
    """Renumber the recipient's layers and insert the donors'."""
    places = {stage.slot: number for number, stage in enumerate(blueprint.built)}
    merged = MergedWeights({}, {}, {}, [])
    prefixes: Counter[str] = Counter()
    for raw, tensor in recipient.items():
        parts = names.split(raw)
        new = raw
        if parts is not None:
            prefixes[parts.prefix] += 1
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
    _add_donors(merged, blueprint, prefix=prefixes.most_common(1)[0][0])
    return merged


def _add_donors(merged: MergedWeights, blueprint: Blueprint, prefix: str) -> None:
    for part in blueprint.parts:
        places = [number for number, stage in enumerate(blueprint.built) if stage.slot.source == part.name]
        infos = part.donor.infos()
        for name, tensor in part.donor.store.slices().items():
            number, rest = layer_of(name)
            new = f"{prefix}.{places[number]}.{rest}"
            merged.tensors[new] = WatchedTensor(f"{part.name}: {name}", tensor, merged.not_finite)
            merged.donor_names[new] = (part.name, name)
            file = infos[name].file
            if file is not None:
                merged.provenance[new] = Provenance(str(file), infos[name].name_in_file or name)
