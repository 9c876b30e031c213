"""Whether the recipient's weights in a model are still those that were loaded, where they cannot be compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..architecture import is_packed, is_quantized, quantization_fields
from ..config import gguf_file_of, gguf_quantization
from ..errors import ConfigurationError
from ..layer_map import RECIPIENT
from ..splice.quantized import SKIP_FIELDS
from ..splice.surgery import outer_modules


@dataclasses.dataclass(frozen=True)
class _Seen:
    tensor: int  # its id: torch does not move packed tensors that have weak references
    version: int | None
    place: tuple[Any, ...] | None  # of the numbers of a plain tensor in memory


class AsLoaded:
    """The weights of a recipient when they were loaded by its name.

    Args:
        model: The model, just loaded.
    """

    def __init__(self, model: Any) -> None:
        self._seen = {
            name: _Seen(id(tensor), _version(tensor), _place(tensor))
            for name, tensor in _recipient_weights(model)
            if not tensor.is_meta  # offloaded: what is in its file is what was loaded
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy has other tensors, of which nothing is known."""

    def __reduce__(self) -> Any:
        return (type(None), ())

    def refuse_changed(self, model: Any) -> None:
        """Refuse a model whose recipient was changed, as far as that can be seen.

        Raises:
            ConfigurationError: Names the weight, and how it changed.
        """
        current = dict(_recipient_weights(model))
        for name, seen in self._seen.items():
            tensor = current.get(name)
            place = None if tensor is None else _place(tensor)
            reason = None
            if tensor is None:
                continue  # its layer was replaced and not kept, or it is tied
            if tensor.grad is not None:
                reason = "has a gradient: it is being trained"
            elif not tensor.is_meta and seen.tensor != id(tensor):
                reason = "is another tensor than the one that was loaded"
            elif not tensor.is_meta and _version(tensor) != seen.version:
                reason = "was changed in place after loading"
            elif place and seen.place and place[1:] == seen.place[1:] and place != seen.place:
                reason = "holds other numbers than those that were loaded"
            elif place and seen.place and place[2] != seen.place[2]:
                reason = f"was {seen.place[2]} when it was loaded, and is {place[2]} now"
            if reason is not None:
                raise ConfigurationError(
                    f"a thin save would lose changed recipient weights: {name} {reason}. Train donor layers only, or "
                    "load the model again."
                )


def _recipient_weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the recipient's parameters and the buffers that are in checkpoints, under its own names."""
    state = model._transplant
    path = state.blueprint.recipient.stack_path
    modules: list[tuple[str, nn.Module]] = list(outer_modules(model, path).items())
    for stage, layer in state.layers.items():
        if stage.slot.source == RECIPIENT:
            modules += [(f"{path}.{stage.slot.index}.{name}".rstrip("."), part) for name, part in layer.named_modules()]
    for name, module in modules:
        dot = f"{name}." if name else ""
        for key, parameter in module.named_parameters(recurse=False):
            yield f"{dot}{key}", parameter
        for key, buffer in module.named_buffers(recurse=False):
            if key not in module._non_persistent_buffers_set:
                yield f"{dot}{key}", buffer


def _version(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_meta or tensor.is_inference() or is_packed(tensor) else tensor._version


def _place(tensor: torch.Tensor) -> tuple[Any, ...] | None:
    # Packed weights have their own layouts, which their library may change.
    return None if tensor.is_meta or is_packed(tensor) else (tensor.data_ptr(), tensor.device, tensor.dtype)


def quantization_of_recipient(model: Any) -> dict[str, Any] | None:
    """Return how a recipient was quantized while it was loaded, as JSON; `None` if it was not.

    Modules that were not quantized are listed by the recipient's own names, and the donors that were.
    """
    blueprint = model._transplant.blueprint
    file = gguf_file_of(blueprint.config)
    if file is not None:
        return gguf_quantization(file)
    if not is_quantized(model) or getattr(blueprint.recipient.config, "quantization_config", None) is not None:
        return None
    fields = dict(quantization_fields(model) or {})
    path, plain = blueprint.recipient.stack_path, []
    for name, module in outer_modules(model, path).items():
        plain += [name] if _is_plain_linear(module) else []
    donors = set()
    for stage, layer in model._transplant.layers.items():
        linear = {name: part for name, part in layer.named_modules() if _is_linear(part)}
        unpacked = [name for name, part in linear.items() if _is_plain_linear(part)]
        if stage.slot.source == RECIPIENT:
            start = f"{path}.{stage.slot.index}"
            plain += [start] if len(unpacked) == len(linear) else [f"{start}.{name}" for name in unpacked]
        elif len(unpacked) < len(linear):
            donors.add(stage.slot.source)
    field = next((name for name in SKIP_FIELDS if name in fields), SKIP_FIELDS[0])
    return {"config": {**fields, field: plain}, "donors": sorted(donors)}


def _is_linear(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")


def _is_plain_linear(module: nn.Module) -> bool:
    return _is_linear(module) and not is_packed(module._parameters["weight"])  # type: ignore[arg-type]
