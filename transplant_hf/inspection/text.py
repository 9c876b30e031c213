"""Inspections as text."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..config import STACKED
from ..display import bytes_text, numbers_text, position_text
from ..layer_map import LayerMap, Position

if TYPE_CHECKING:
    from .findings import DonorInspection, Inspection, ModelInspection, PtInspection, TransplantInspection, Weights

__all__ = ["inspection_text"]

Row = tuple[str, str]

_MAX_VALUES = 12
_MAX_LISTED = 6
_MAX_WIDTH = 100


def inspection_text(found: Inspection) -> str:
    """Return an inspection as text: a title, aligned lines and the layer map."""
    title, rows = _KINDS[found.kind](found)
    lines = [
        *rows,
        *(("note" if number == 0 else "", note) for number, note in enumerate(found.notes)),
        *(("problem", problem) for problem in found.problems),
    ]
    width = max(len(label) for label, _ in lines)
    printed = [f"{_named(found.what, found.revision)}: {title}"]
    for label, text in lines:
        first, *rest = text.splitlines() or [""]
        printed += [f"  {label:{width}}  {first}".rstrip(), *(f"  {'':{width}}  {line}" for line in rest)]
    printed = [_escape_controls(line) for line in printed]
    layer_map = getattr(found, "layer_map", None)
    if layer_map:
        printed += ["", str(LayerMap((_escape_controls(source), index) for source, index in layer_map))]
    return "\n".join(printed)


def _escape_controls(line: str) -> str:
    """Escape characters that could control a terminal: names and metadata come from strangers."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in line)


def _listed(items: Sequence[str], most: int = _MAX_VALUES) -> str:
    more = f", ... and {len(items) - most:,} more" if len(items) > most else ""
    return (", ".join(items[:most]) or "none") + more


def _named(name: str | None, revision: str | None) -> str:
    return f"{name}@{revision}" if name and revision else name or "unknown"


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


# -- Donors and transplants --------------------------------------------------------------------------------------


def _donor(found: DonorInspection) -> tuple[str, Iterator[Row]]:
    def rows() -> Iterator[Row]:
        if found.name:
            yield "name", found.name
        source = _named(found.source, found.source_revision) if found.source else "an unknown model"
        yield "layers", f"{numbers_text(found.layer_indices)} of {source} ({found.model_type})"
        yield from _weights(found.weights)
        yield "recipient", _named(found.recipient, found.recipient_revision) if found.recipient else "not recorded"
        yield "position", _position(found.position, found.placed_at)
        if found.mode == "replace":
            yield "mode", f"replaces {_counted(len(found.layer_indices), 'recipient layer')} from that position"
        if found.strength != 1:
            yield "strength", f"{found.strength:g}"
        yield from _values("metadata", found.metadata)
        if found.compatibility is not None and found.compatibility:
            yield "fit", str(found.compatibility)

    return f"a donor of {_counted(len(found.layer_indices), 'layer')}", rows()


def _position(recommended: Position | None, placed_at: Position | None) -> str:
    known = "none is recommended" if recommended is None else f"{_numbers(recommended)} is recommended"
    if placed_at is None or placed_at == recommended:
        return known if recommended is None else f"{_numbers(recommended)} (recommended)"
    return f"{_numbers(placed_at)} (given; {known})"


def _numbers(position: Position) -> str:
    return position_text(position).partition(" ")[2]


def _transplant(found: TransplantInspection) -> tuple[str, Iterator[Row]]:
    def rows() -> Iterator[Row]:
        where = " (inside it)" if found.full else ""
        yield "recipient", _named(found.recipient, found.recipient_revision) + where
        yield "donors", f"{_counted(found.parameters, 'parameter')}, {bytes_text(found.size)}"
        if found.composition != STACKED:
            yield "composition", f"{found.composition}: donors at one position all get the same hidden state"
        for donor in found.donors:
            how = "in place of recipient layers from" if donor.mode == "replace" else "at"
            strength = "" if donor.strength == 1 else f", strength {donor.strength:g}"
            yield "", ""
            yield donor.name, _named(donor.donor, donor.revision)
            yield "", f"layers {numbers_text(donor.layer_indices)} {how} {position_text(donor.position)}{strength}"
            for label, text in _weights(donor.weights):
                yield "", f"{label}: {text}"
            for _, text in _values("", donor.metadata):
                yield "", text
        for number, report in enumerate(found.compatibility):
            if report:
                yield ("" if number else "fit"), str(report)

    return f"a {'full' if found.full else 'thin'} transplant of {_counted(len(found.donors), 'donor')}", rows()


def _weights(weights: Weights) -> Iterator[Row]:
    per_layer = sorted(set(weights.per_layer))
    ends = dict.fromkeys([per_layer[0], per_layer[-1]] if per_layer else ())
    each = f", {' to '.join(f'{count:,}' for count in ends)} per layer" if ends else ""
    yield "parameters", f"{weights.parameters:,}{each and ' in all'}{each} ({_dtypes(weights.dtypes)})"
    files = weights.files[0].name if len(weights.files) == 1 else _counted(len(weights.files), "file")
    yield "weights", f"{bytes_text(weights.size)} in {files}, {_counted(weights.tensors, 'tensor')}"
    yield (
        "sha256",
        {
            "recorded": "recorded, not verified",
            "same on the Hub": "recorded, and the same on the Hub",
            "verified": "verified",
        }.get(weights.sha256, weights.sha256),
    )


def _dtypes(dtypes: Mapping[str, int]) -> str:
    if len(dtypes) == 1:
        return next(iter(dtypes))
    return _listed([f"{name} {count:,}" for name, count in dtypes.items()], _MAX_LISTED) if dtypes else "empty"


def _values(label: str, values: Mapping[str, Any]) -> Iterator[Row]:
    for number, (name, value) in enumerate(values.items()):
        if number == _MAX_VALUES:
            yield "", f"... and {len(values) - _MAX_VALUES:,} more"
            return
        text = value if isinstance(value, str) else reprlib.repr(value)
        short = " ".join(f"{name}: {text}".split())
        yield ("" if number else label), short if len(short) <= _MAX_WIDTH else f"{short[: _MAX_WIDTH - 3]}..."


# -- Models and files --------------------------------------------------------------------------------------------


def _model(found: ModelInspection) -> tuple[str, Iterator[Row]]:
    def rows() -> Iterator[Row]:
        yield "class", found.architecture or "unknown"
        if found.num_layers is not None and found.positions is not None:
            yield "layers", f"{found.num_layers:,}"
            yield "positions", f"{found.positions[0]}..{found.positions[1]}"
        if found.hidden_size is not None:
            yield "hidden size", f"{found.hidden_size:,}"
        yield "donors", "can be inserted between its layers" if found.movable else f"cannot be inserted: {found.reason}"
        if found.sharing_layers:
            yield "shared", f"layers {numbers_text(found.sharing_layers)} share weights and cannot be moved"
        if found.weights is not None:
            yield from _weights(found.weights)

    return f"a model of type {found.model_type}", rows()


def _pt(found: PtInspection) -> tuple[str, Iterator[Row]]:
    def rows() -> Iterator[Row]:
        yield "size", bytes_text(found.size)
        yield "parameters", f"{found.parameters:,} ({_dtypes(found.dtypes)})"
        yield "tensors", f"{len(found.tensors):,}"
        shown = list(found.tensors.items())[:_MAX_LISTED]
        for name, tensor in shown:
            yield "", f"{name} {list(tensor.shape)} {tensor.dtype}"
        if len(found.tensors) > len(shown):
            yield "", f"... and {len(found.tensors) - len(shown):,} more"
        for number, group in enumerate(found.numbering[:3]):
            place = f"after {group.prefix!r}" if group.prefix else "at the top"
            counted = _counted(group.tensors, "tensor")
            yield ("" if number else "numbered"), f"{numbers_text(group.numbers)} {place}, {counted}"
        if found.classes:
            yield "classes", f"{_listed(found.classes, _MAX_LISTED)}; named in the file, not run"
        yield from _values("values", found.values)
        yield from _values("metadata", found.metadata)
        if found.layer_indices:
            source = f"{found.recipient} ({found.model_type})"
            yield "layers", f"{numbers_text(found.layer_indices)} of {source}"
            yield "position", str(found.placed_at)
            if found.dropped:
                yield "left out", f"{_counted(len(found.dropped), 'tensor')}: {_listed(found.dropped, 4)}"

    return "a .pt file; nothing in it was run", rows()


_KINDS: Mapping[str, Any] = {"donor": _donor, "transplant": _transplant, "model": _model, "pt": _pt}
