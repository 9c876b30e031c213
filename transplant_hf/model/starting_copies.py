"""Layers of a quantized model in full precision, for a donor that starts from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from ..architecture import Anatomy, LayerNames, decoder_stack, find_stack, quantization_method
from ..architecture.quantized import dequantized_layer
from ..donor import Donor
from ..donor.extract import checkpoint_tensors
from ..donor.record import DonorRecord
from ..donor.tensors import MemoryTensors, unpack_mxfp4
from ..errors import CheckpointError, HubError
from ..sources import HubOptions, locate
from ..splice import checkpoint_files, open_checkpoint
from ..splice.quantized import QUANTIZED
from ..storage import read_json
from .live import without_quantization
from .native_methods import recipient_class

STARTED_FROM = "started_from"  # in a donor's metadata
FROM_CHECKPOINT, FROM_DEQUANTIZED = "the full-precision checkpoint", "dequantized weights"


def full_precision_copies(
    model: Any, numbers: Sequence[int], name: str | None, revision: str | None = None
) -> tuple[Donor, str]:
    """Return a donor with copies of recipient layers of a quantized model, and where their weights are from.

    The recipient's checkpoint is read where it is on this machine and in full precision. `revision` is the commit that
    a model without donors was loaded from.
    """
    state = getattr(model, "_transplant", None)
    known = state.blueprint.config if state is not None else None
    reference = known.recipient if known is not None else model.config.name_or_path
    revision = known.recipient_revision if known is not None else revision
    native = recipient_class(type(model))
    config = without_quantization(state.blueprint.recipient.config if state is not None else model.config)
    plain = Anatomy(native, config, f"recipient {reference or native.__name__}")
    indices = [slot.index for slot in (model.layer_map[n] for n in numbers)] if state is not None else list(numbers)
    record = DonorRecord.of_layers(
        config, layer_indices=tuple(indices), source_id=reference or None, source_revision=revision, name=name
    )
    hub = HubOptions(cache_dir=None if state is None else state.hub.cache_dir, local_files_only=True)
    read = _from_checkpoint(reference, revision, hub, plain, indices) if reference else None
    if read is not None:
        return Donor(record, MemoryTensors(read)), FROM_CHECKPOINT
    path, method = find_stack(model), str(quantization_method(model))
    stack = decoder_stack(model, path)
    weights: dict[str, torch.Tensor] = {}
    for number, index in zip(numbers, indices, strict=True):
        layer = dequantized_layer(stack[number], plain.layers[index], f"{path}.{number}", method)
        weights |= {f"{plain.stack_path}.{index}.{name}": tensor for name, tensor in layer.items()}
    tensors = checkpoint_tensors(plain.model, plain.stack_path, indices, state_dict=weights)
    return Donor(record, MemoryTensors(tensors)), FROM_DEQUANTIZED


def _from_checkpoint(
    reference: str, revision: str | None, hub: HubOptions, plain: Anatomy, indices: Sequence[int]
) -> dict[str, torch.Tensor] | None:
    """Read layers from a recipient's files; `None` where these are not at hand, or not in full precision."""
    try:
        source = locate(reference, files=("config.json",), revision=revision, hub=hub)
        files = checkpoint_files(reference, revision, hub)
    except (HubError, LocalEntryNotFoundError, CheckpointError):
        return None
    path = source.folder / "config.json"
    if not files or not path.is_file():
        return None
    method = (read_json(path, "config.json").get("quantization_config") or {}).get("quant_method")
    if method not in (None, "mxfp4"):
        return None
    names = LayerNames(plain.model, plain.stack_path)
    found: dict[str, Any] = {}
    for raw, part in open_checkpoint([str(file) for file in files], None, True)[0].items():
        parts = names.split(raw)
        if parts is not None and parts.number in indices and not names.is_ignored(raw):
            found[f"layers.{list(indices).index(parts.number)}.{parts.rest}"] = part
    read = _unpacked({name: part[...] for name, part in found.items()}, method)
    if not read or any(marker in name for name in read for marker in QUANTIZED):
        return None
    return read if all(tensor.is_floating_point() for tensor in read.values()) else None


def _unpacked(tensors: Mapping[str, torch.Tensor], method: str | None) -> dict[str, torch.Tensor]:
    """Dequantize MXFP4, which has blocks of numbers and their scales in the place of each weight."""
    if method is None:
        return dict(tensors)
    made = {}
    for name, tensor in tensors.items():
        plain = name.removesuffix("_blocks")
        if plain != name:
            made[plain] = unpack_mxfp4(tensor, tensors[f"{plain}_scales"])
        elif not name.endswith("_scales"):
            made[name] = tensor
    return made
