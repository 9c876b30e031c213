"""A plan as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ..display import bytes_text, numbers_text

if TYPE_CHECKING:
    from .cost import Cost, Plan, Share

__all__ = ["plan_text"]

_MOST_KINDS = 6


def plan_text(plan: Plan) -> str:
    """Return a plan as a person reads it: the recipient beside the transplant, then what falls where."""
    lines = [_title(plan), *(f"  {donor}" for donor in _donors(plan)), ""]
    rows = [("", "recipient", "transplant" if plan.donors else "", "")]
    rows += [(label, *texts) for label, texts in _rows(plan)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))]
        lines.append(("  " + "  ".join(cells if plan.donors else cells[:2])).rstrip())
    lines += ["", *(_share(share) for share in plan.after.shares)]
    lines += [f"problem: {problem}." for problem in plan.after.problems]
    lines += [f"note: {note}" for note in (*plan.notes, *plan.after.notes)]
    return "\n".join(lines)


def _title(plan: Plan) -> str:
    named = f"{plan.recipient}@{plan.revision}" if plan.revision else plan.recipient
    hardware = plan.hardware
    memory = f" of {bytes_text(hardware.memory)}" if hardware.memory is not None else ""
    devices = f"{hardware.devices} device{'' if hardware.devices == 1 else 's'}{memory}"
    return (
        f"{named} ({plan.model_class}) in {plan.dtype}, {devices}, {hardware.parallel}; batch {plan.batch:,}, context "
        f"{plan.context:,}"
    )


def _donors(plan: Plan) -> Iterator[str]:
    for donor in plan.donors:
        how = "in place of recipient layers from" if donor.mode == "replace" else "at"
        layers = f"layers {numbers_text(donor.layer_indices)} of its source"
        yield f"{donor.name}: {layers} {how} position {donor.position}, {bytes_text(donor.weights)}"


def _rows(plan: Plan) -> Iterator[tuple[str, tuple[str, str, str]]]:
    before, after = plan.before, plan.after
    yield "layers", _counts(before.layers, after.layers)
    yield "parameters", _counts(before.parameters, after.parameters)
    yield "weights", _sizes(before.weight_bytes, after.weight_bytes)
    types = sorted({*before.weights, *after.weights})
    if len(types) > 1:
        for name in types:
            yield f"  in {name}", _sizes(before.weights.get(name, 0), after.weights.get(name, 0))
    yield "cache", _sizes(before.cache_bytes, after.cache_bytes)
    kinds = {kind.kind: None for cost in (before, after) for kind in cost.cache}
    for kind in list(kinds)[:_MOST_KINDS]:
        found = [next((one for one in cost.cache if one.kind == kind), None) for cost in (before, after)]
        yield f"  {kind}", _sizes(*(one.total if one else 0 for one in found))
    yield "  per token", _sizes(before.cache_per_token, after.cache_per_token)
    yield "largest share", _sizes(*(max(share.needed for share in cost.shares) for cost in (before, after)))
    yield "a process reads", _sizes(before.reading.bytes, after.reading.bytes)
    if after.reading.hashed:
        yield "  and hashes", _sizes(before.reading.hashed, after.reading.hashed)
    if after.reading.seconds is not None:
        yield "  which takes", _seconds(before, after)


def _counts(before: int, after: int) -> tuple[str, str, str]:
    return f"{before:,}", f"{after:,}", _change(before, after)


def _sizes(before: int | None, after: int | None) -> tuple[str, str, str]:
    if before is None or after is None:
        return "unknown", "unknown", ""
    return bytes_text(before), bytes_text(after), _change(before, after)


def _seconds(before: Cost, after: Cost) -> tuple[str, str, str]:
    return f"{before.reading.seconds or 0:,.1f} s", f"{after.reading.seconds or 0:,.1f} s", ""


def _change(before: int, after: int) -> str:
    return f"{(after - before) / before:+.1%}" if before and before != after else ""


def _share(share: Share) -> str:
    where = f"device {share.device}" if share.device.isdigit() else share.device
    parts = [f"weights {bytes_text(share.weights)}"]
    if share.replicated:
        parts[0] += f" (held whole by every rank: {bytes_text(share.replicated)})"
    if share.gathered:
        parts.append(f"gathered {bytes_text(share.gathered)}")
    parts.append(f"cache {bytes_text(share.cache) if share.cache is not None else 'unknown'}")
    memory = f" of {bytes_text(share.memory)}" if share.memory is not None else ""
    return f"  {where}: {_layers(share.layers)}; {', '.join(parts)}: {bytes_text(share.needed)}{memory}"


def _layers(numbers: Sequence[int]) -> str:
    return f"layers {numbers_text(numbers)}" if numbers else "no layers"
