"""`plan`: the memory that a transplant needs, before anything is downloaded or built."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from accelerate import infer_auto_device_map
from accelerate.utils import get_balanced_memory
from torch import nn
from transformers import PreTrainedModel

from ..architecture import decoder_stack, max_context_length
from ..config import TransplantConfig
from ..display import bytes_text, dtype_name, parse_size
from ..errors import ConfigurationError
from ..layer_map import RECIPIENT
from ..sources import HubArguments, HubOptions
from ..splice import Blueprint
from ..training import DonorTrainingArguments
from .cache import LayerCache, layer_caches
from .models import find_models, loaded_transplant, quantization
from .results import CacheKind, Cost, Hardware, Plan, PlannedDonor, Share
from .training import check_training, training_cost

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["plan"]

_CONTEXT = 4096
_BLOCK = 1024  # tokens in a block, as in training
_CPU, _DISK = "cpu", "disk"
_Device = int | str


def plan(
    what: str | os.PathLike[str],
    donors: Any = None,
    *,
    count: int | None = None,
    position: int | None = None,
    devices: int = 1,
    memory: int | str | None = None,
    cpu_memory: int | str | None = None,
    dtype: str = "auto",
    batch_size: int = 1,
    context: int | None = None,
    dequantize: bool = False,
    train: DonorTrainingArguments | None = None,
    blocks: int | None = None,
    revision: str | None = None,
    **hub_kwargs: Unpack[HubArguments],
) -> Plan:
    """Compute the memory that a transplant needs on given devices, beside its untouched recipient.

    Configurations and headers are read, and models built on the meta device: no weights are downloaded or read. The
    plan counts weights, buffers and the cache, and with `train` what a training run holds: gradients, optimizer state,
    activations and hidden states. It does not count the memory of the runtime.

    Args:
        what: Hub id or folder of a recipient, a donor or a transplant. A folder with only a `config.json` is enough.
        donors: `{donor: position}`, donors or `DonorSpec`, when a recipient is named.
        count: Instead of donors: this many layers of the recipient's own shape, which need not exist yet.
        position: Where these layers go, 0..L; by default where `train` puts them.
        devices: Number of accelerators; layers are placed on them as by `device_map="auto"`.
        memory: Bytes that each may use, such as "80GiB"; by default without limit.
        cpu_memory: Bytes of CPU memory to offload to; by default none.
        dtype: As in `from_pretrained`.
        batch_size: Sequences at once.
        context: Tokens of each sequence; by default 4096, or fewer where the model reads fewer.
        dequantize: Plan a quantized recipient as if it were dequantized.
        train: Plan the training of a donor with these arguments as well; `donor_layers`, `position`, `mode`,
            `per_device_train_batch_size` and `block_length` are then theirs. `training` of the plan is the result.
        blocks: Different blocks of text of that run; by default all rows of `max_steps`.
        revision: Branch, tag or commit of `what`.
        **hub_kwargs: `token`, `cache_dir`, `local_files_only`, `force_download`, as in `from_pretrained`.

    Returns:
        The plan. It is false when the transplant does not fit.

    Raises:
        ConfigurationError: Arguments that are not valid, or an unknown quantization.
        CompatibilityError: A donor that does not fit the recipient.
        CheckpointError: Malformed headers.
        HubError: A repository is missing, gated, private or out of reach.

    Example:
        >>> import tempfile
        >>> from transformers import LlamaConfig
        >>> folder = tempfile.mkdtemp()
        >>> sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4}
        >>> config = LlamaConfig(**sizes, vocab_size=100, architectures=["LlamaForCausalLM"], dtype="bfloat16")
        >>> config.save_pretrained(folder)
        >>> result = plan(folder, count=2, context=1000)
        >>> result.before.layers, result.after.layers, result.after.parameters - result.before.parameters
        (6, 8, 69888)
        >>> result.after.cache[0].kind, result.after.cache[0].per_token
        ('full attention', 2048)
    """
    for name, value in (("batch_size", batch_size), ("context", context), ("count", count)):
        if value is not None and value < 1:
            raise ConfigurationError(f"{name} must be at least 1, got {value}.")
    sizes = {"memory": memory, "cpu_memory": cpu_memory}
    hardware = Hardware(devices, **{name: parse_size(size, name) for name, size in sizes.items() if size is not None})
    hub = HubOptions(**hub_kwargs)
    mode, late = "insert", False
    if train is not None:
        given = {"donors": donors, "count": count, "position": position, "context": context}
        names = [name for name, value in given.items() if value is not None]
        if names or batch_size != 1:
            raise ConfigurationError(
                f"set {', '.join(names) or 'batch_size'} in train, the arguments of the training run."
            )
        check_training(train)
        count, position, mode = train.donor_layers, train.position, train.mode
        late = bool(train.stream_prefix)
        batch_size, context = train.per_device_train_batch_size, train.block_length
        if blocks is None and train.max_steps > 0:
            blocks = train.max_steps * batch_size * train.gradient_accumulation_steps
    source, blueprint = find_models(os.fspath(what), donors, count, position, dtype, revision, hub, mode, late)
    recipient = blueprint.recipient
    longest = max_context_length(recipient.config)
    notes: tuple[str, ...] = ()
    if context is None:
        most = _CONTEXT if train is None else _BLOCK
        context = min(longest or most, most)
    elif longest is not None and context > longest:
        notes = (f"context {context:,} is more than the {longest:,} tokens that {source} reads",)
    quantized = not dequantize and quantization(recipient.config, recipient.what) is not None
    costs, known = [], dict[int, Sequence[LayerCache] | str]()
    bare = Blueprint(recipient, TransplantConfig(recipient=source.reference))
    for one in (bare, blueprint) if blueprint.parts else (bare,):
        model = loaded_transplant(one, quantized)
        whole = loaded_transplant(one, False) if quantized else model
        cached = _running_caches(one, context, known)
        costs.append(_cost(model, recipient.stack_path, whole.num_parameters(), cached, batch_size, hardware))
    return Plan(
        recipient=source.reference,
        revision=source.revision,
        model_class=recipient.model_class.__name__,
        dtype=dtype_name(recipient.config.dtype),
        batch_size=batch_size,
        context=context,
        hardware=hardware,
        donors=_donors(blueprint, decoder_stack(model, recipient.stack_path)),
        layer_map=blueprint.layer_map(),
        before=costs[0],
        after=costs[-1],
        notes=notes,
        training=training_cost(blueprint, quantized, train, context, blocks) if train else None,
    )


def _running_caches(
    blueprint: Blueprint, context: int, known: dict[int, Sequence[LayerCache] | str]
) -> Sequence[LayerCache] | str:
    """Return the cache of each layer that runs, or the reason why it is not known; keep those of each anatomy."""
    anatomies = {RECIPIENT: blueprint.recipient, **{part.name: part.anatomy for part in blueprint.parts}}
    running = []
    for source, index in blueprint.layer_map():
        anatomy = anatomies[source]
        if id(anatomy) not in known:
            known[id(anatomy)] = layer_caches(anatomy, context)
        layers = known[id(anatomy)]
        if isinstance(layers, str):
            return layers
        running.append(layers[index])
    return running


def _cost(
    model: PreTrainedModel,
    stack_path: str,
    parameters: int,
    cached: Sequence[LayerCache] | str,
    batch_size: int,
    hardware: Hardware,
) -> Cost:
    known = not isinstance(cached, str)
    layers: Sequence[LayerCache] = () if isinstance(cached, str) else cached
    by_kind: dict[str, list[int]] = {}
    for number, layer in enumerate(layers):
        by_kind.setdefault(layer.kind, []).append(number)
    sizes = [batch_size * layer.total for layer in layers] if known else None
    weights: Counter[str] = Counter()  # tied ones counted once
    for parameter in model.parameters():
        weights[dtype_name(parameter.dtype)] += parameter.nbytes
    shares, problems = _place(model, stack_path, sizes, hardware)
    return Cost(
        layers=len(decoder_stack(model, stack_path)),
        parameters=parameters,
        weights=dict(weights),
        buffers=sum(buffer.nbytes for buffer in model.buffers()),
        cache=tuple(
            CacheKind(
                kind,
                tuple(numbers),
                sum(layers[number].per_token for number in numbers),
                batch_size * sum(layers[number].total for number in numbers),
            )
            for kind, numbers in by_kind.items()
        ),
        cache_per_token=sum(layer.next_token for layer in layers) if known else None,
        shares=shares,
        problems=tuple(problems),
        notes=() if known else (f"the cache is not known: {cached}",),
    )


def _donors(blueprint: Blueprint, layers: nn.ModuleList) -> tuple[PlannedDonor, ...]:
    return tuple(
        PlannedDonor(
            name=part.name,
            position=part.spec.position,
            mode=part.spec.mode,
            layer_indices=tuple(part.donor.layer_indices),
            weights=sum(
                parameter.nbytes
                for number in blueprint.layer_map().layers_of(part.name)
                for parameter in layers[number].parameters()
            ),
        )
        for part in blueprint.parts
    )


# -- How `device_map="auto"` places a model on devices -----------------------------------------------------------------


def _place(
    model: PreTrainedModel, stack_path: str, cache: Sequence[int] | None, hardware: Hardware
) -> tuple[tuple[Share, ...], list[str]]:
    """Place a model on devices; return what each holds, and why it does not fit."""
    alone = hardware.devices == 1 and hardware.memory is None
    device_map = {"": 0} if alone else _device_map(model, stack_path, cache, hardware)
    order: list[_Device] = [*range(hardware.devices), *(d for d in (_CPU, _DISK) if d in device_map.values())]
    weights = dict.fromkeys(order, 0)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        weights[_device_of(name, device_map)] += tensor.nbytes
    numbers = range(len(decoder_stack(model, stack_path)))
    homes = [_device_of(f"{stack_path}.{number}", device_map) for number in numbers]
    # An offloaded layer runs on the first device, and its cache stays there.
    cached = [home if isinstance(home, int) else 0 for home in homes]
    limits: Mapping[_Device, int | None] = {_CPU: hardware.cpu_memory, _DISK: None}
    shares = tuple(
        Share(
            device=str(device),
            layers=tuple(number for number in numbers if homes[number] == device),
            weights=weights[device],
            cache=None if cache is None else sum(cache[number] for number in numbers if cached[number] == device),
            memory=limits.get(device, hardware.memory),
        )
        for device in order
    )
    problems = [
        f"{share.title} needs {bytes_text(share.needed)} and has {bytes_text(share.memory or 0)}"
        for share in shares
        if not share.fits
    ]
    if weights.get(_DISK):
        problems.append(f"{bytes_text(weights[_DISK])} of weights do not fit and would be read from disk at every step")
    return shares, problems


class _DeviceNumber(int):
    """A device number that accelerate does not compare with the devices of this machine: it would log a warning."""

    def __ge__(self, count: int) -> bool:
        return False


def _device_map(
    model: PreTrainedModel, stack_path: str, cache: Sequence[int] | None, hardware: Hardware
) -> Mapping[str, _Device]:
    limit = hardware.memory or 2 * model.get_memory_footprint()
    if cache:  # the device map leaves no room for it: reserve an equal part on each device, and one layer more
        limit = max(1, limit - sum(cache) // hardware.devices - max(cache))
    limits: dict[_Device, _Device] = {_DeviceNumber(device): limit for device in range(hardware.devices)}
    if hardware.cpu_memory is not None:
        limits[_CPU] = hardware.cpu_memory
    undivided = sorted({type(layer).__name__ for layer in decoder_stack(model, stack_path)})
    balanced = get_balanced_memory(model, max_memory=limits, no_split_module_classes=undivided)
    found: Mapping[str, _Device] = infer_auto_device_map(
        model, max_memory=balanced, no_split_module_classes=undivided, offload_buffers=True
    )
    return found


def _device_of(name: str, device_map: Mapping[str, _Device]) -> _Device:
    while name and name not in device_map:
        name = name.rpartition(".")[0]
    return device_map.get(name, 0)  # a device map does not name buffers of the outermost module
