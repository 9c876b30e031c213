"""What `plan` returns: plain values, as JSON or as text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..display import align_table, bytes_text, numbers_text, position_text
from ..errors import ConfigurationError
from ..layer_map import LayerMap, Position
from ..sources import at_revision

__all__ = ["CacheKind", "Cost", "Hardware", "Plan", "PlannedDonor", "Share", "TrainingCost"]


@dataclasses.dataclass(frozen=True)
class Hardware:
    """The devices of a plan.

    Args:
        devices: Number of accelerators, all alike.
        memory: Bytes that each may use; `None` for no limit.
        cpu_memory: Bytes of CPU memory for weights that do not fit on the devices; `None` for none.

    Raises:
        ConfigurationError: No device, or no memory.
    """

    devices: int = 1
    memory: int | None = None
    cpu_memory: int | None = None

    def __post_init__(self) -> None:
        for name in ("devices", "memory", "cpu_memory"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigurationError(f"{name} must be at least 1, got {value}.")


@dataclasses.dataclass(frozen=True)
class CacheKind:
    """The cache of all layers of one kind.

    Args:
        kind: Such as "full attention", "sliding attention, window 128" or "recurrent".
        layers: Numbers of the layers in the running model.
        per_token: Bytes that a token of one sequence adds in all of them until a window is full; 0 for states of
            constant size.
        total: Bytes in all of them for the planned batch and context.
    """

    kind: str
    layers: tuple[int, ...]
    per_token: int
    total: int


@dataclasses.dataclass(frozen=True)
class Share:
    """What one device holds.

    Args:
        device: "0", "1", ..., "cpu" or "disk".
        layers: Numbers of the running layers that are placed there.
        weights: Bytes of weights and buffers.
        cache: Bytes of cache; `None` when not known.
        memory: Bytes that it may use; `None` for no limit.
    """

    device: str
    layers: tuple[int, ...]
    weights: int
    cache: int | None
    memory: int | None = None

    @property
    def needed(self) -> int:
        """Bytes of weights and cache together."""
        return self.weights + (self.cache or 0)

    @property
    def fits(self) -> bool:
        """Whether the device has enough memory."""
        return self.memory is None or self.needed <= self.memory

    @property
    def title(self) -> str:
        """The device by name, such as "device 0" or "cpu"."""
        return f"device {self.device}" if self.device.isdigit() else self.device

    def __str__(self) -> str:
        layers = f"layers {numbers_text(self.layers)}" if self.layers else "no layers"
        cache = bytes_text(self.cache) if self.cache is not None else "unknown"
        limit = f" of {bytes_text(self.memory)}" if self.memory is not None else ""
        weights = bytes_text(self.weights)
        return f"{self.title}: {layers}; weights {weights}, cache {cache}: {bytes_text(self.needed)}{limit}"


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one model needs.

    Args:
        layers: How many layers run.
        parameters: How many parameters it has, tied ones counted once.
        weights: Bytes of parameters after loading by dtype, such as `{"bfloat16": ...}`; MXFP4 experts are "uint8".
        buffers: Bytes of buffers.
        cache: The cache by kind of layer; empty when not known.
        cache_per_token: Bytes that one more token of one sequence adds at the planned context; `None` when not known.
        shares: What each device holds.
        problems: Why it does not fit.
        notes: What is not known.
    """

    layers: int
    parameters: int
    weights: Mapping[str, int]
    buffers: int
    cache: tuple[CacheKind, ...]
    cache_per_token: int | None
    shares: tuple[Share, ...]
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def weight_bytes(self) -> int:
        """Bytes of parameters of every dtype."""
        return sum(self.weights.values())

    @property
    def cache_bytes(self) -> int | None:
        """Bytes of cache for the planned batch and context; `None` when not known."""
        return sum(kind.total for kind in self.cache) if self.cache_per_token is not None else None


@dataclasses.dataclass(frozen=True)
class PlannedDonor:
    """A donor of a plan.

    Args:
        name: Its name in the transplant.
        position: How many recipient layers run before it.
        mode: "insert" or "replace".
        layer_indices: Numbers of its layers in its source model.
        weights: Bytes of its parameters after loading.
    """

    name: str
    position: Position
    mode: str
    layer_indices: tuple[int, ...]
    weights: int

    def __str__(self) -> str:
        how = "in place of recipient layers from" if self.mode == "replace" else "at"
        layers = f"layers {numbers_text(self.layer_indices)} of its source"
        return f"{self.name}: {layers} {how} {position_text(self.position)}, {bytes_text(self.weights)}"


@dataclasses.dataclass(frozen=True)
class TrainingCost:
    """What a training run of a donor holds in memory and on disk; sizes in bytes.

    Args:
        optimizer: Its name in Transformers.
        batch_size: Blocks in a step and process.
        block_length: Tokens in a block.
        gradient_checkpointing: Whether layers run again in the backward pass.
        blocks: Different blocks of the run; `None` when not known.
        rest: Embeddings, norms and head, with buffers.
        before: Layers before the donor.
        donor: The donor's layers.
        after: The recipient's layers after the first of the donor.
        largest_layer: The largest of the layers before the donor.
        gradients: Gradients of the donor.
        optimizer_state: What the optimizer keeps of the donor.
        activations: What a step takes beside these; `None` when not known.
        filling: Activations of the pass that computes the hidden states before the donor; `None` when not known.
        allocator: Freed memory that the allocator keeps: glibc returns to the system what is above 2 x 32 MiB.
        compared: Logits of a few tokens, by the part and by the whole model, which are compared before the first step.
        states: The cache of hidden states, blocks x block length x width x bytes of a number; `None` when not known.
        states_on_disk: Whether it is in a file.
        notes: What is not known.
    """

    optimizer: str
    batch_size: int
    block_length: int
    gradient_checkpointing: bool
    blocks: int | None
    rest: int
    before: int
    donor: int
    after: int
    largest_layer: int
    gradients: int
    optimizer_state: int
    activations: int | None
    filling: int | None
    compared: int
    states: int | None
    states_on_disk: bool
    allocator: int = 64 << 20
    notes: tuple[str, ...] = ()

    @property
    def resident(self) -> int | None:
        """The largest memory of a run with the whole recipient in memory; `None` when not known."""
        return self._peak(self.before, max(self.filling or 0, self.compared))

    @property
    def streamed(self) -> int | None:
        """The same with the layers before the donor in their files: one computes while the next one is read."""
        return self._peak(0, 2 * self.largest_layer + (self.filling or 0)) if self.before else None

    @property
    def disk(self) -> int | None:
        """The hidden states in files of a run with the whole recipient in memory; `None` when not known."""
        return self.states if self.states_on_disk else 0

    @property
    def streamed_disk(self) -> int | None:
        """The same of a streamed run, which keeps those before and after a layer; `None` when not known."""
        return None if self.states is None else 2 * self.states

    def _peak(self, before: int, first: int) -> int | None:
        if self.activations is None or self.filling is None:
            return None
        step = self.gradients + self.optimizer_state + self.activations
        states = 0 if self.states_on_disk or not before else self.states or 0
        return self.rest + before + self.donor + self.after + states + self.allocator + max(first, step)

    def __str__(self) -> str:
        checkpointing = ", gradient checkpointing" if self.gradient_checkpointing else ""
        blocks = f"{self.blocks:,} blocks" if self.blocks is not None else "a number of blocks that is not known"
        both = {
            "embeddings, norms, head": (self.rest, self.rest),
            "layers before the donor": (self.before, 2 * self.largest_layer),
            "donor": (self.donor, self.donor),
            "layers after it": (self.after, self.after),
            "gradients": (self.gradients, self.gradients),
            "optimizer state": (self.optimizer_state, self.optimizer_state),
            "activations of a step": (self.activations, self.activations),
            "or: of the pass before it": (self.filling, self.filling),
            "or: logits, compared once": (self.compared, 0),
            "hidden states in memory": (0 if self.states_on_disk else self.states, 0),
            "hidden states on disk": (self.disk, self.streamed_disk),
            "kept by the allocator": (self.allocator, self.allocator),
            "peak of memory": (self.resident, self.streamed),
        }
        header = ("", "resident", "streamed prefix") if self.before else ("", "resident")
        rows = [
            (name, *("unknown" if size is None else bytes_text(size) for size in sizes))[: len(header)]
            for name, sizes in both.items()
        ]
        return "\n".join(
            [
                f"training with {self.optimizer}{checkpointing}: {blocks}, batches of {self.batch_size:,} x "
                f"{self.block_length:,} tokens",
                *(f"  {line}" for line in align_table([header, *rows]).splitlines()),
                *(f"note: {note}." for note in self.notes),
            ]
        )


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a transplant needs beside its untouched recipient. True when it fits.

    Args:
        recipient: Hub id or folder.
        revision: Its commit, on the Hub.
        model_class: The class of the model.
        dtype: The dtype that it is loaded in.
        batch_size: Sequences at once.
        context: Tokens of each sequence.
        hardware: The devices.
        donors: The donors.
        layer_map: The layers that run.
        before: What the untouched recipient needs.
        after: What the transplant needs; the same as `before` when there is no donor.
        notes: What else to know.
        training: What a training run of the donor holds, if it is planned.
    """

    recipient: str
    revision: str | None
    model_class: str
    dtype: str
    batch_size: int
    context: int
    hardware: Hardware
    donors: tuple[PlannedDonor, ...]
    layer_map: LayerMap
    before: Cost
    after: Cost
    notes: tuple[str, ...] = ()
    training: TrainingCost | None = None

    def __bool__(self) -> bool:
        return not self.problems

    @property
    def problems(self) -> tuple[str, ...]:
        """Why it does not fit."""
        memory, training = self.hardware.memory, self.training
        if training is None:
            return self.after.problems
        peaks = [peak for peak in (training.resident, training.streamed) if peak is not None]
        if memory is None or not peaks or min(peaks) <= memory:
            return ()
        return (f"training needs {bytes_text(min(peaks))} and has {bytes_text(memory)}",)

    def __str__(self) -> str:
        name = at_revision(self.recipient, self.revision)
        limit = f" of {bytes_text(self.hardware.memory)}" if self.hardware.memory is not None else ""
        devices = f"{self.hardware.devices} device{'' if self.hardware.devices == 1 else 's'}{limit}"
        lines = [
            f"{name} ({self.model_class}) in {self.dtype}, {devices}; batch size {self.batch_size:,}, context "
            f"{self.context:,}",
            *(f"  {donor}" for donor in self.donors),
            "",
        ]
        header = ("", "recipient", "transplant", "") if self.donors else ("", "recipient")
        rows = [row[: len(header)] for row in _rows(self.before, self.after)]
        lines += [f"  {line}" for line in align_table([header, *rows]).splitlines()]
        lines += ["", *(f"  {share}" for share in self.after.shares)]
        lines += ["", str(self.training)] if self.training is not None else []
        lines += [f"problem: {problem}." for problem in self.problems]
        lines += [f"note: {note}." for note in (*self.notes, *self.after.notes)]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON; sizes in bytes."""
        fields = dataclasses.asdict(self)
        fields["layer_map"] = [list(slot) for slot in self.layer_map]
        for name, cost in (("before", self.before), ("after", self.after)):
            fields[name] |= {"weight_bytes": cost.weight_bytes, "cache_bytes": cost.cache_bytes}
        if self.training is not None:
            names = ("resident", "streamed", "disk", "streamed_disk")
            fields["training"] |= {name: getattr(self.training, name) for name in names}
        return {**fields, "ok": bool(self)}


_Row = tuple[str, str, str, str]


def _rows(before: Cost, after: Cost) -> Iterator[_Row]:
    yield _row("layers", before.layers, after.layers, text="{:,}".format)
    yield _row("parameters", before.parameters, after.parameters, text="{:,}".format)
    yield _row("weights", before.weight_bytes, after.weight_bytes)
    dtypes = sorted({*before.weights, *after.weights})
    for name in dtypes if len(dtypes) > 1 else ():
        yield _row(f"  in {name}", before.weights.get(name, 0), after.weights.get(name, 0))
    yield _row("cache", before.cache_bytes, after.cache_bytes)
    for kind in dict.fromkeys(kind.kind for cost in (before, after) for kind in cost.cache):
        yield _row(f"  {kind}", *(sum(k.total for k in cost.cache if k.kind == kind) for cost in (before, after)))
    yield _row("  per token", before.cache_per_token, after.cache_per_token)
    yield _row("largest share", *(max(share.needed for share in cost.shares) for cost in (before, after)))


def _row(label: str, before: int | None, after: int | None, *, text: Callable[[int], str] = bytes_text) -> _Row:
    if before is None or after is None:
        return label, "unknown", "unknown", ""
    change = f"{(after - before) / before:+.1%}" if before and before != after else ""
    return label, text(before), text(after), change
