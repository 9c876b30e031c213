"""Layers of a loaded model whose weights stay in their files until they are asked for.

Such a layer has no parameters: a model on the training device, in DDP or in an optimizer holds what is left.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..architecture import LayerNames, decoder_stack
from ..errors import CheckpointError, ConfigurationError
from ..numeric import is_finite
from ..splice import MergedWeights, Provenance

_Load = Callable[[dict[str, Any], list[str], torch.device], Any]
_Stamp = tuple[int, int, int]
_PAGE = 4096  # bytes, or a fraction of a page


class LayersInFiles:
    """The first layers of a model, in files.

    It is made before the model's weights are loaded, and takes those of its layers out of `merged`. `load` loads
    tensors by their checkpoint names into the model, for some of its own names, on a device; it returns what is missing
    or wrong.
    """

    def __init__(
        self,
        model: Any,
        path: str,
        count: int,
        merged: MergedWeights,
        names: LayerNames,
        files: Collection[str],
        load: _Load,
    ) -> None:
        self.count = count
        self.bytes_read = 0
        self._path, self._load, self._not_finite = path, load, merged.not_finite
        self._layers = list(decoder_stack(model, path))[:count]
        self._tensors: list[dict[str, Any]] = [{} for _ in range(count)]
        self._origins: dict[str, Provenance] = {}
        for name in list(merged.tensors):
            parts = names.split(name)
            if parts is not None and parts.number < count:
                self._tensors[parts.number][name] = merged.tensors.pop(name)
                if name in merged.provenance:
                    self._origins[name] = merged.provenance.pop(name)
        self._watched = {name for held in self._tensors for name in held if name in merged.donor_names}
        self.files: dict[str, _Stamp] = {
            os.path.abspath(file): _stamp(file)
            for file in sorted({*files, *(origin.file for origin in self._origins.values())})
        }
        self._weights = [_weights(layer, f"{path}.{number}") for number, layer in enumerate(self._layers)]
        # The names of the weights in these layers, in the model.
        self.own_names = {path for weights in self._weights for *_, path in weights}
        self._loaded: set[int] = set(range(count))  # until `drop`: the loader needs placeholders
        for number, layer in enumerate(self._layers):
            for _, _, placeholder, _ in self._weights[number]:
                placeholder._is_hf_initialized = True  # type: ignore[attr-defined]
            layer.register_forward_pre_hook(lambda layer, args, number=number: self._refuse_call(layer, number))

    @property
    def absent(self) -> list[int]:
        """The layers that have no weights now."""
        return [number for number in range(self.count) if number not in self._loaded]

    def load(self, number: int, device: torch.device) -> None:
        """Read the weights of a layer; does nothing if it has them."""
        if number in self._loaded:
            return
        _fill(self._weights[number])
        try:
            self._load_checked(number, device)
            self._loaded.add(number)
        finally:
            if number not in self._loaded:
                _fill(self._weights[number], remove=True)
        self._layers[number].requires_grad_(False)

    def _load_checked(self, number: int, device: torch.device) -> None:
        wanted = {path for *_, path in self._weights[number]}
        info = self._load(self._read(number), sorted(wanted), device)
        for verb, keys in (
            ("lacks", info.missing_keys & wanted),
            ("has tensors of another shape:", {key for key, *_ in info.mismatched_keys}),
            ("cannot be converted:", set(info.conversion_errors)),
        ):
            if keys:
                raise CheckpointError(f"layer {number} of {self._path} {verb} {', '.join(sorted(keys)[:5])}.")
        if self._not_finite:
            raise CheckpointError(f"donor tensor {self._not_finite[0]!r} holds NaN or infinity.")

    @contextmanager
    def loaded(self, numbers: Collection[int], device: torch.device) -> Iterator[None]:
        """Give some layers their weights inside a `with` block."""
        absent = set(self.absent) & set(numbers)
        try:
            for number in absent:
                self.load(number, device)
            yield
        finally:
            self.drop(absent)

    def drop(self, numbers: Collection[int] | None = None) -> None:
        """Free the memory of some layers; by default of all."""
        for number in list(self._loaded if numbers is None else self._loaded & set(numbers)):
            _fill(self._weights[number], remove=True)
            self._loaded.discard(number)

    def _refuse_call(self, layer: nn.Module, number: int) -> None:
        if number not in self._loaded and "forward" not in vars(layer):  # it is not left out
            raise ConfigurationError(
                f"layer {number} stayed in its files (stream_prefix), so that the whole model cannot run. Save the "
                "donor, and load it with its recipient to use it."
            )

    def _read(self, number: int) -> dict[str, Any]:
        """Map the tensors of a layer from newly opened files: what is mapped is memory until the layer is dropped."""
        self.refuse_changed([number])
        tensors = dict(self._tensors[number])
        by_file: dict[str, list[str]] = {}
        for name in tensors.keys() & self._origins.keys():
            by_file.setdefault(self._origins[name].file, []).append(name)
        for file, names in by_file.items():
            try:
                opened = safe_open(file, framework="pt", device="cpu")
                tensors |= {name: self._touched(opened.get_slice(self._origins[name].name)[...]) for name in names}
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"layer {number} cannot be read from {file}: {error}") from error
        self._not_finite += [name for name in self._watched & tensors.keys() if not is_finite(tensors[name])]
        return tensors

    def _touched(self, tensor: torch.Tensor) -> torch.Tensor:
        """Read every page of a mapped tensor now, in the thread that loads it."""
        self.bytes_read += tensor.nbytes
        tensor.flatten().view(torch.uint8)[::_PAGE].sum()
        return tensor

    def refuse_changed(self, numbers: Collection[int]) -> None:
        """Refuse files of some layers that are not those that the model was loaded from."""
        names = {name for number in numbers for name in self._tensors[number]}
        files = {self._origins[name].file for name in names & self._origins.keys()}
        if names - self._origins.keys():  # mapped by torch
            files |= {file for file in self.files if not file.endswith(".safetensors")}
        for file in sorted(files):
            try:
                found = _stamp(file)
            except OSError as error:
                raise CheckpointError(
                    f"layers {sorted(numbers)} cannot be read: {file} was there when the model was loaded, and is "
                    "missing now."
                ) from error
            before = self.files[os.path.abspath(file)]
            if found != before:
                raise CheckpointError(
                    f"{file} changed while its layers were being read ({before[0]:,} bytes when the model was loaded, "
                    f"{found[0]:,} bytes now, or written again): its layers belong to two models. Start again."
                )


def layers_in_files(model: Any) -> LayersInFiles | None:
    """Return the layers of a model that stay in files, if any."""
    return getattr(model, "_layers_in_files", None)


# Of each: its module, its name there, a placeholder, and its path in the model.
_Weights = list[tuple[nn.Module, str, torch.Tensor, str]]


def _weights(layer: nn.Module, path: str) -> _Weights:
    modules = [(".".join(filter(None, (path, name))), module) for name, module in layer.named_modules()]
    return [(module, name, one, f"{place}.{name}") for place, module in modules for name, one in saved_tensors(module)]


def saved_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the parameters of a module itself, and its buffers that are in checkpoints."""
    yield from module.named_parameters(recurse=False)
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield name, buffer


def _fill(weights: _Weights, remove: bool = False) -> None:
    for module, name, placeholder, _ in weights:
        places: Any = module._parameters if isinstance(placeholder, nn.Parameter) else module._buffers
        places[name] = None if remove else placeholder
        # No parameter, but its shape can be read: `print(model)` shows it.
        vars(module).update({name: placeholder} if remove else {})
        if not remove:
            vars(module).pop(name, None)


def _stamp(file: str) -> _Stamp:
    found = os.stat(file)
    return found.st_size, found.st_mtime_ns, found.st_ino
