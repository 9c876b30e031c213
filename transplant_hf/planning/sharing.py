"""How a model falls on devices: by Transformers' own device map, its tensor-parallel plan, or FSDP2's rule."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re
from collections.abc import Mapping, Sequence

from transformers import PreTrainedModel

from ..errors import ConfigurationError
from .body import Body, Held
from .cost import Share
from .hardware import Hardware

__all__ = ["Shared", "share_model"]

DISK = "disk"


@dataclasses.dataclass(frozen=True)
class Shared:
    """A model on its devices.

    Args:
        shares: By device.
        read: Bytes that one process reads of the files.
        problems: Why it would not run so.
        notes: What is good to know.
    """

    shares: tuple[Share, ...]
    read: int
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def share_model(body: Body, cache: Sequence[int] | None, heads: Sequence[int | None], hardware: Hardware) -> Shared:
    """Spread a model over devices.

    Args:
        body: The model.
        cache: Bytes of cache by running layer, for the whole batch; `None` when not known.
        heads: Key-value heads by running layer.
        hardware: The devices, and how to spread.

    Raises:
        ConfigurationError: A model without a tensor-parallel plan; or accelerate is missing.
    """
    if hardware.parallel in ("tensor", "expert"):
        return _by_tensors(body, cache, heads, hardware)
    if hardware.parallel == "fsdp":
        return _by_groups(body, cache, hardware)
    return _by_layers(body, cache, hardware)


# -- Whole layers ------------------------------------------------------------------------------------------------


def _by_layers(body: Body, cache: Sequence[int] | None, hardware: Hardware) -> Shared:
    read = sum(held.stored for held in body.held)
    if hardware.memory is None and hardware.devices == 1:
        everything = _placed(body, {"": 0}, cache, hardware)
        return Shared(everything, read)
    limit = hardware.memory or sum(held.nbytes for held in body.held) * 2
    rooms = dict.fromkeys(range(hardware.devices), limit)
    shares = _placed(body, _device_map(body.model, rooms, hardware.cpu_memory), cache, hardware)
    notes: tuple[str, ...] = ()
    if not all(share.fits for share in shares) and cache:
        # The device map knows nothing of the cache: leave room for what its layers will keep.
        for share in shares:
            if share.device.isdigit():
                rooms[int(share.device)] = max(1, limit - (share.cache or 0) - max(cache))
        shares = _placed(body, _device_map(body.model, rooms, hardware.cpu_memory), cache, hardware)
        said = ", ".join(f"{device}: {room}" for device, room in rooms.items())
        notes = (f"the device map leaves room for the cache with max_memory={{{said}}}.",)
    problems = [
        f"{_named(share)} needs {share.needed:,} bytes of {share.memory:,}" for share in shares if not share.fits
    ]
    on_disk = sum(share.weights for share in shares if share.device == DISK)
    if on_disk:
        problems.append(f"{on_disk:,} bytes of weights find no place and would be read from disk at every step")
    return Shared(shares, read, tuple(problems), notes)


def _device_map(model: PreTrainedModel, rooms: Mapping[int, int], cpu: int | None) -> dict[str, int | str]:
    if importlib.util.find_spec("accelerate") is None:
        raise ConfigurationError(
            "a device map is computed by accelerate, which is not installed: pip install accelerate"
        )
    from transformers.integrations.accelerate import get_balanced_memory, infer_auto_device_map

    split = set(model._no_split_modules or ())
    limits: dict[int | str, int | str] = {_OfAnotherMachine(device): room for device, room in rooms.items()}
    if cpu is not None:
        limits["cpu"] = cpu
    balanced = get_balanced_memory(model, max_memory=limits, no_split_module_classes=split)
    found: dict[str, int | str] = infer_auto_device_map(model, max_memory=balanced, no_split_module_classes=split)
    return found


class _OfAnotherMachine(int):
    """A device's number that is not beyond those of this machine: accelerate would warn that the device is not here."""

    def __ge__(self, number: int) -> bool:
        return False


def _placed(
    body: Body, device_map: Mapping[str, int | str], cache: Sequence[int] | None, hardware: Hardware
) -> tuple[Share, ...]:
    order: list[int | str] = [*range(hardware.devices), *(d for d in ("cpu", DISK) if d in device_map.values())]
    weights = dict.fromkeys(order, 0)
    layers: dict[int | str, set[int]] = {device: set() for device in order}
    for held in body.held:
        device = _device_of(held.name, device_map)
        weights[device] += held.nbytes
        if held.layer is not None:
            layers[device].add(held.layer)
    limits = {"cpu": hardware.cpu_memory, DISK: None}
    # Offloaded layers come to the first device for their turn, and their cache stays there.
    homes = {layer: device if isinstance(device, int) else 0 for device in order for layer in layers[device]}
    return tuple(
        Share(
            device=str(device),
            layers=tuple(sorted(layers[device])),
            weights=weights[device],
            cache=sum(cache[layer] for layer, home in homes.items() if home == device) if cache is not None else None,
            memory=limits.get(device, hardware.memory) if isinstance(device, str) else hardware.memory,
        )
        for device in order
    )


def _device_of(name: str, device_map: Mapping[str, int | str]) -> int | str:
    while name not in device_map:
        if not name:
            return 0  # a buffer of the outermost module, which no map names
        name = name.rpartition(".")[0]
    return device_map[name]


def _named(share: Share) -> str:
    return f"device {share.device}" if share.device.isdigit() else share.device


# -- A part of every tensor --------------------------------------------------------------------------------------

# The dimension that a style of Transformers' plans divides, counted from the end; of vectors the only one.
_DIVIDED = {
    "colwise": -2,
    "colwise_rep": -2,
    "colwise_gather_output": -2,
    "packed_colwise": -2,
    "rowwise": -1,
    "rowwise_rep": -1,
    "rowwise_split_input": -1,
    "packed_rowwise": -1,
    "embedding_rowwise": -2,
    "embedding_colwise": -1,
}
# Whole experts, which are the first dimension of their tensors.
_BY_EXPERT = "grouped_gemm"
_WHOLE = frozenset(
    {
        "sequence_parallel",
        "replicated_with_grad_allreduce",
        "mla_kv_a_proj",
        "all_reduce",
        "moe_tp_experts",
        "moe_identity_expert",
        "local_params",
        "ep_dispatch_experts",
        "replicate",
    }
)


def _by_tensors(body: Body, cache: Sequence[int] | None, heads: Sequence[int | None], hardware: Hardware) -> Shared:
    name, plan = type(body.model).__name__, _plan(body.model, hardware.parallel)
    ranks, notes = hardware.devices, []
    unknown = sorted(set(plan.values()) - set(_DIVIDED) - _WHOLE - {_BY_EXPERT})
    if unknown:
        notes.append(
            f"styles {', '.join(unknown)} of the plan are not known here: counted as held whole by every rank."
        )
    weights = replicated = read = 0
    divided: set[int] = set()
    for held in body.held:
        parts = _part(held, _style(held.name, plan), ranks)
        mine = math.ceil(held.num_elements / held.shape[parts[0]] * parts[1]) if parts else held.num_elements
        weights += mine * held.dtype.itemsize
        read += held.stored * mine // max(1, held.num_elements)
        replicated += 0 if parts else held.nbytes
        if parts and held.layer is not None:
            divided.add(held.layer)
    if len(divided) < len(body.layer_map):
        notes.append(f"the plan of {name} divides no tensor of {len(body.layer_map) - len(divided)} layers.")
    by_heads = _divides_heads(plan)
    problems = []
    odd = sorted({count for count in heads if count is not None and count % ranks} if by_heads else ())
    if odd:
        problems.append(f"{ranks} ranks do not divide {odd[0]} key-value heads, as the plan of {name} needs")
    kept = None
    if cache is not None:
        pairs = zip(cache, heads, strict=True)
        kept = sum(size // ranks if by_heads and count is not None else size for size, count in pairs)
    share = Share("each rank", tuple(range(len(body.layer_map))), weights, kept, hardware.memory, replicated)
    return Shared((share,), read, (*problems, *_too_large(share)), tuple(notes))


def _plan(model: PreTrainedModel, parallel: str) -> dict[str, str]:
    """The model's own plan, as Transformers puts it together: what is said of experts goes before the rest."""
    tensors, experts = dict(model.tp_plan or {}), dict(model.ep_plan or {})
    if parallel == "expert" and experts:
        inside = re.compile(rf"(?:{'|'.join(map(re.escape, experts))})(?:\..+)?")
        return {**{name: style for name, style in tensors.items() if not inside.fullmatch(name)}, **experts}
    if not tensors or parallel == "expert":
        raise ConfigurationError(
            f"{type(model).__name__} has no {parallel}-parallel plan in this release of Transformers, which refuses it "
            'then. Use parallel="auto" or "fsdp".'
        )
    return tensors


def _style(name: str, plan: Mapping[str, str]) -> str | None:
    """The style of a parameter: its own, else that of the module it is in."""
    generic = re.sub(r"\.\d+(?=\.|$)", ".*", name)
    return plan.get(generic, plan.get(generic.rpartition(".")[0]))


def _part(held: Held, style: str | None, ranks: int) -> tuple[int, int] | None:
    """The dimension that is divided and what the first rank has of it, or `None` for a tensor held whole."""
    dimension = -len(held.shape) if style == _BY_EXPERT else _DIVIDED.get(style or "")
    if dimension is None or held.buffer or not held.shape:
        return None
    if len(held.shape) == 1:
        if style is not None and "rowwise" in style:  # a bias, added once all is summed
            return None
        dimension = 0
    at = len(held.shape) + dimension
    return at, math.ceil(held.shape[at] / ranks)


def _divides_heads(plan: Mapping[str, str]) -> bool:
    """Whether what makes keys is divided by its outputs, which are heads."""
    makers = ("k_proj", "qkv_proj", "query_key_value", "kv_b_proj")
    return any(name.rpartition(".")[2] in makers and style == "colwise" for name, style in plan.items())


def _too_large(share: Share) -> tuple[str, ...]:
    return () if share.fits else (f"{share.device} needs {share.needed:,} bytes of {share.memory:,}",)


# -- Parts that are gathered ---------------------------------------------------------------------------------------


def _by_groups(body: Body, cache: Sequence[int] | None, hardware: Hardware) -> Shared:
    """FSDP2 divides every parameter by its first dimension, padded, and gathers a group of them for its turn."""
    ranks = hardware.devices
    weights = read = 0
    groups: dict[str, int] = {}
    for held in body.held:
        if held.buffer or not held.shape:
            weights += held.nbytes
            continue
        mine = math.ceil(held.shape[0] / ranks) * (held.num_elements // max(1, held.shape[0]))
        weights += mine * held.dtype.itemsize
        read += held.stored * mine // max(1, held.num_elements)
        group = f"layer {held.layer}" if held.layer is not None else _outer_group(body.model, held.name)
        groups[group] = groups.get(group, 0) + held.nbytes
    largest = max(groups, key=lambda group: groups[group])
    plan = body.model.fsdp_plan or {}
    unnamed = (
        ()
        if f"{body.stack_path}.*" in plan
        else (
            f"the FSDP plan of {type(body.model).__name__} in this release of Transformers names none of its "
            "layers: with DistributedConfig all is gathered at once. This is for fully_shard on each layer.",
        )
    )
    notes = (
        f"the largest group that is gathered is {largest}; the next one may be gathered while it runs. Every rank has "
        "its own batch, and its cache.",
        "read in parts by DistributedConfig(fsdp_size=...); after from_pretrained and fully_shard on each layer every "
        "process has read all.",
        *unnamed,
    )
    total = sum(cache) if cache is not None else None
    share = Share("each rank", tuple(range(len(body.layer_map))), weights, total, hardware.memory, 0, groups[largest])
    return Shared((share,), read, _too_large(share), notes)


def _outer_group(model: PreTrainedModel, name: str) -> str:
    plan = model.fsdp_plan or {}
    module = name.rpartition(".")[0]
    return module if module in plan else "what is outside the layers"
