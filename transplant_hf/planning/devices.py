"""How `device_map="auto"` places a model on devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from accelerate import infer_auto_device_map
from accelerate.utils import get_balanced_memory
from transformers import PreTrainedModel

from ..architecture import decoder_stack
from ..display import bytes_text
from .results import Hardware, Share

__all__ = ["place_model"]

Device = int | str
_CPU, _DISK = "cpu", "disk"


def place_model(
    model: PreTrainedModel, stack_path: str, cache: Sequence[int] | None, hardware: Hardware
) -> tuple[tuple[Share, ...], list[str]]:
    """Place a model on devices."""
    alone = hardware.devices == 1 and hardware.memory is None
    device_map = {"": 0} if alone else _device_map(model, stack_path, cache, hardware)
    shares = _shares(model, stack_path, device_map, cache, hardware)
    problems = [
        f"{share.title} needs {bytes_text(share.needed)} and has {bytes_text(share.memory or 0)}"
        for share in shares
        if not share.fits
    ]
    on_disk = sum(share.weights for share in shares if share.device == _DISK)
    if on_disk:
        problems.append(f"{bytes_text(on_disk)} of weights do not fit and would be read from disk at every step")
    return shares, problems


class _DeviceNumber(int):
    """A device number that accelerate does not compare with the devices of this machine: it would log a warning."""

    def __ge__(self, count: int) -> bool:
        return False


def _device_map(
    model: PreTrainedModel, stack_path: str, cache: Sequence[int] | None, hardware: Hardware
) -> Mapping[str, Device]:
    limit = hardware.memory or 2 * model.get_memory_footprint()
    if cache:  # the device map leaves no room for it: reserve an equal part on each device, and one layer more
        limit = max(1, limit - sum(cache) // hardware.devices - max(cache))
    limits: dict[Device, Device] = {_DeviceNumber(device): limit for device in range(hardware.devices)}
    if hardware.cpu_memory is not None:
        limits[_CPU] = hardware.cpu_memory
    undivided = sorted({type(layer).__name__ for layer in decoder_stack(model, stack_path)})
    balanced = get_balanced_memory(model, max_memory=limits, no_split_module_classes=undivided)
    found: Mapping[str, Device] = infer_auto_device_map(
        model, max_memory=balanced, no_split_module_classes=undivided, offload_buffers=True
    )
    return found


def _shares(
    model: PreTrainedModel,
    stack_path: str,
    device_map: Mapping[str, Device],
    cache: Sequence[int] | None,
    hardware: Hardware,
) -> tuple[Share, ...]:
    order: list[Device] = [*range(hardware.devices), *(d for d in (_CPU, _DISK) if d in device_map.values())]
    weights = dict.fromkeys(order, 0)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        weights[_device_of(name, device_map)] += tensor.nbytes
    numbers = range(len(decoder_stack(model, stack_path)))
    devices = [_device_of(f"{stack_path}.{number}", device_map) for number in numbers]
    limits: Mapping[Device, int | None] = {_CPU: hardware.cpu_memory, _DISK: None}
    shares = []
    for device in order:
        # An offloaded layer runs on the first device, and its cache stays there.
        cached = [number for number, home in enumerate(devices) if (home if isinstance(home, int) else 0) == device]
        shares.append(
            Share(
                device=str(device),
                layers=tuple(number for number, home in enumerate(devices) if home == device),
                weights=weights[device],
                cache=sum(cache[number] for number in cached) if cache is not None else None,
                memory=limits.get(device, hardware.memory),
            )
        )
    return tuple(shares)


def _device_of(name: str, device_map: Mapping[str, Device]) -> Device:
    while name and name not in device_map:
        name = name.rpartition(".")[0]
    return device_map.get(name, 0)  # a device map does not name buffers of the outermost module
