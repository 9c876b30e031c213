"""`plan`: what a transplant costs on given hardware, before anything is downloaded or built."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from ..architecture import Anatomy, text_config
from ..display import parse_size
from ..errors import ConfigurationError
from ..layer_map import RECIPIENT
from ..sources import HubOptions
from .body import Body, bodies
from .cache import LayerCaches, measure_caches, running_caches
from .cost import CacheKind, Cost, Plan, PlannedDonor, Reading
from .hardware import Hardware
from .numbers import dtype_name
from .sharing import share_model
from .subject import Subject, find_subject

__all__ = ["plan"]

_CONTEXT = 4096


def plan(
    what: str | os.PathLike[str],
    donors: Any = None,
    *,
    layers: int | None = None,
    position: int | None = None,
    devices: int = 1,
    memory: int | str | None = None,
    cpu_memory: int | str | None = None,
    bandwidth: int | str | None = None,
    parallel: str = "auto",
    dtype: str = "auto",
    batch: int = 1,
    context: int | None = None,
    dequantize: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
) -> Plan:
    """Compute what a transplant costs on given hardware, beside its untouched recipient.

    Headers and configurations are read, and models built on the meta device: no weights are downloaded or read, and
    no tensor is made. Counted are weights, buffers and the cache; not the activations of a step, the runtime's own
    memory, gradients or an optimizer's state.

    Args:
        what: Hub id or folder of a recipient, a donor or a transplant. A folder with only a `config.json` will do.
        donors: `{donor: position}` or a list of `DonorSpec`, when a recipient is named.
        layers: Instead of donors: so many layers of the recipient's own shape, which need not exist yet.
        position: Where those go, 0..L; by default where a third of the recipient has run.
        devices: Accelerators, or processes where `parallel` is not "auto".
        memory: Bytes that each may use, or such as "80GiB".
        cpu_memory: The same of main memory, for what finds no place; only with "auto".
        bandwidth: Bytes in a second that a process reads, or such as "2GB/s".
        parallel: "auto" as `device_map="auto"` places whole layers; "tensor", "expert" and "fsdp" as Transformers'
            `DistributedConfig` with `tp_size`, with `ep_size` as large, and with `fsdp_size` divides tensors.
        dtype: The type of numbers as in `from_pretrained`.
        batch: Sequences at once.
        context: Tokens of each; by default 4096, or fewer where the model reads fewer.
        dequantize: Plan a quantised recipient as it is after dequantising.
        revision: Branch, tag or commit of `what`.
        token: As in `from_pretrained`.
        cache_dir: The same.
        local_files_only: The same.

    Returns:
        The plan; false when it does not fit.

    Raises:
        ConfigurationError: Arguments that make no sense, no tensor-parallel plan, an unknown quantisation.
        CompatibilityError: A donor that does not fit.
        CheckpointError: Malformed headers.
        HubError: Missing, gated, private or out of reach.

    Example:
        >>> import tempfile
        >>> from transformers import LlamaConfig
        >>> folder = tempfile.mkdtemp()
        >>> config = LlamaConfig(
        ...     hidden_size=64,
        ...     intermediate_size=96,
        ...     num_hidden_layers=6,
        ...     num_attention_heads=4,
        ...     vocab_size=100,
        ...     architectures=["LlamaForCausalLM"],
        ...     dtype="bfloat16",
        ... )
        >>> config.save_pretrained(folder)
        >>> found = plan(folder, layers=2, context=1000)
        >>> found.before.layers, found.after.layers, found.after.parameters - found.before.parameters
        (6, 8, 69888)
        >>> found.after.cache[0].kind, found.after.cache[0].per_token
        ('full attention', 2048)
    """
    sizes = {"memory": memory, "cpu_memory": cpu_memory, "bandwidth": bandwidth}
    known = {name: parse_size(size, name) for name, size in sizes.items() if size is not None}
    hardware = Hardware(devices, parallel=parallel, **known)
    for name, value in (("batch", batch), ("context", context), ("layers", layers)):
        if value is not None and value < 1:
            raise ConfigurationError(f"{name} must be at least 1, got {value}.")
    hub = HubOptions(token, cache_dir, local_files_only)
    subject = find_subject(os.fspath(what), donors, layers, position, dtype, revision, hub)
    context, told = _context(subject, context)
    before, after = bodies(subject, dequantize)
    measured = measure_caches(_anatomies(subject), context)
    running = after or before
    costs = [_cost(body, subject, hardware, measured, batch, context) for body in dict.fromkeys((before, running))]
    return Plan(
        recipient=subject.source.reference,
        revision=subject.source.revision,
        model_class=subject.recipient.model_class.__name__,
        dtype=dtype_name(subject.recipient.config.dtype),
        batch=batch,
        context=context,
        hardware=hardware,
        donors=tuple(_donors(subject, running)),
        layer_map=running.layer_map,
        before=costs[0],
        after=costs[-1],
        notes=(*subject.notes, *told),
    )


def _context(subject: Subject, asked: int | None) -> tuple[int, tuple[str, ...]]:
    """Return the tokens that are planned for, and what is to be said about them."""
    known = getattr(text_config(subject.recipient.config).config, "max_position_embeddings", None) or 0
    if known <= 0:  # no limit
        return asked or _CONTEXT, ()
    if asked is None:
        return min(known, _CONTEXT), ()
    longer = (
        f"context {asked:,} is more than the {known:,} tokens that {subject.source} reads (max_position_embeddings)."
    )
    return asked, (longer,) if asked > known else ()


def _donors(subject: Subject, body: Body) -> Sequence[PlannedDonor]:
    return [
        PlannedDonor(
            name=part.name,
            position=part.spec.position,
            mode=part.spec.mode,
            layer_indices=tuple(part.donor.layer_indices),
            weights=sum(held.nbytes for held in body.weights if held.source == part.name),
        )
        for part in (subject.blueprint.parts if subject.blueprint else ())
    ]


def _anatomies(subject: Subject) -> dict[str, Anatomy]:
    parts = subject.blueprint.parts if subject.blueprint else ()
    return {RECIPIENT: subject.recipient, **{part.name: part.anatomy for part in parts}}


def _cost(
    body: Body,
    subject: Subject,
    hardware: Hardware,
    measured: Mapping[str, LayerCaches],
    batch: int,
    context: int,
) -> Cost:
    caches = running_caches(body.layer_map, measured)
    known = caches.layers if caches.reason is None else None
    sizes = [batch * layer.total for layer in known] if known is not None else None
    heads = [layer.heads for layer in known] if known is not None else [None] * len(body.layer_map)
    shared = share_model(body, sizes, heads, hardware)
    weights: dict[str, int] = {}
    for held in body.weights:
        weights[dtype_name(held.dtype)] = weights.get(dtype_name(held.dtype), 0) + held.nbytes
    hashed = 0 if subject.invented else sum(held.stored for held in body.held if held.source != RECIPIENT)
    seconds = shared.read / hardware.bandwidth if hardware.bandwidth else None
    reason = (f"the cache is not known: {caches.reason}.",) if caches.reason is not None else ()
    return Cost(
        layers=len(body.layer_map),
        parameters=body.parameters,
        weights=weights,
        buffers=sum(held.nbytes for held in body.held if held.buffer),
        kept=body.kept,
        cache=_kinds(caches, batch, context),
        cache_per_token=_growth(caches, context),
        shares=shared.shares,
        reading=Reading(shared.read, hashed, seconds),
        problems=shared.problems,
        notes=(*reason, *shared.notes),
    )


def _kinds(caches: LayerCaches, batch: int, context: int) -> tuple[CacheKind, ...]:
    by_kind: dict[str, list[int]] = {}
    for number, layer in enumerate(caches.layers):
        by_kind.setdefault(layer.kind, []).append(number)
    return tuple(
        CacheKind(
            kind,
            tuple(numbers),
            sum(caches.layers[number].per_token for number in numbers),
            batch * sum(caches.layers[number].total for number in numbers),
        )
        for kind, numbers in by_kind.items()
    )


def _growth(caches: LayerCaches, context: int) -> int | None:
    """What one more token adds: layers that hold less than every token have stopped growing."""
    if caches.reason is not None:
        return None
    return sum(layer.per_token for layer in caches.layers if layer.total >= context * layer.per_token)
