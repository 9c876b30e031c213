"""What a plan says: plain values, as JSON or as text."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..layer_map import LayerMap
from .hardware import Hardware
from .text import plan_text

__all__ = ["CacheKind", "Cost", "Plan", "PlannedDonor", "Reading", "Share"]


@dataclasses.dataclass(frozen=True)
class CacheKind:
    """The cache of all layers of one kind.

    Args:
        kind: Such as "full attention", "sliding attention, window 128" or "recurrent".
        layers: The running numbers of the layers.
        per_token: Bytes that a token of one sequence adds in all of them while they grow; 0 for constant states.
        total: Bytes in all of them for the planned batch and context.
    """

    kind: str
    layers: tuple[int, ...]
    per_token: int
    total: int


@dataclasses.dataclass(frozen=True)
class Share:
    """What falls on one device, or on each rank.

    Args:
        device: Such as "0", "cpu" or "disk"; "each rank" where all hold the same amount, at most.
        layers: The running numbers of the layers whose weights are there, whole or in part.
        weights: Bytes of weights and buffers.
        cache: Bytes of cache; `None` when not known.
        memory: Bytes it may use; `None` when that was not said.
        replicated: Of the weights, what every rank holds whole.
        gathered: Bytes of the largest group of weights that is put together for its turn.
    """

    device: str
    layers: tuple[int, ...]
    weights: int
    cache: int | None
    memory: int | None = None
    replicated: int = 0
    gathered: int = 0

    @property
    def needed(self) -> int:
        """All of it, as far as it is known."""
        return self.weights + (self.cache or 0) + self.gathered

    @property
    def fits(self) -> bool:
        """Whether it may use so much."""
        return self.memory is None or self.needed <= self.memory


@dataclasses.dataclass(frozen=True)
class Reading:
    """What one process reads of the weight files.

    Args:
        bytes: Of the recipient's files and the donors', as slices are asked for.
        hashed: Bytes of donor files that every process also compares with their sha256.
        seconds: At the given bandwidth, each byte once; `None` without one.
    """

    bytes: int
    hashed: int
    seconds: float | None


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one model costs.

    Args:
        layers: How many run.
        parameters: How many numbers its parameters are, tied ones once.
        weights: Bytes of parameters by type after loading, such as `{"bfloat16": ...}`; experts in MXFP4 as "uint8".
        buffers: Bytes of buffers.
        kept: Names by which Transformers keeps parameters in float32.
        cache: By kind of layer; empty when not known.
        cache_per_token: Bytes that one more token of one sequence adds at the planned context; `None` if not known.
        shares: By device.
        reading: What a process reads.
        problems: Why it would not run so.
        notes: What is good to know.
    """

    layers: int
    parameters: int
    weights: Mapping[str, int]
    buffers: int
    kept: tuple[str, ...]
    cache: tuple[CacheKind, ...]
    cache_per_token: int | None
    shares: tuple[Share, ...]
    reading: Reading
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def weight_bytes(self) -> int:
        """Bytes of parameters of every type."""
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
        position: Recipient layers that run before it.
        mode: "insert" or "replace".
        layer_indices: Its layers' numbers in its source model.
        weights: Bytes of its parameters after loading.
    """

    name: str
    position: int
    mode: str
    layer_indices: tuple[int, ...]
    weights: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a transplant costs beside its untouched recipient. True when it fits.

    Args:
        recipient: Hub id or folder.
        revision: Its commit, on the Hub.
        model_class: The class that runs.
        dtype: The type of numbers it is loaded in.
        batch: Sequences at once.
        context: Tokens of each.
        hardware: What it runs on.
        donors: The donors.
        layer_map: What runs.
        before: The untouched recipient.
        after: The transplant; the same as `before` when there is no donor.
        notes: What was assumed.
    """

    recipient: str
    revision: str | None
    model_class: str
    dtype: str
    batch: int
    context: int
    hardware: Hardware
    donors: tuple[PlannedDonor, ...]
    layer_map: LayerMap
    before: Cost
    after: Cost
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return not self.after.problems

    def __str__(self) -> str:
        return plan_text(self)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON; sizes in bytes."""
        fields = dataclasses.asdict(self)
        fields["layer_map"] = [list(slot) for slot in self.layer_map]
        for name in ("before", "after"):
            cost: Cost = getattr(self, name)
            fields[name] |= {"weight_bytes": cost.weight_bytes, "cache_bytes": cost.cache_bytes}
        return {**fields, "ok": bool(self)}
