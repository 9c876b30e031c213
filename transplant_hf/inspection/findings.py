"""What `inspect` returns: plain values, as JSON or as text."""

from __future__ import annotations

import dataclasses
import itertools
import math
import reprlib
from collections.abc import Mapping
from typing import Any, ClassVar

from ..compatibility import CompatibilityReport
from ..display import bytes_text, numbers_text
from ..layer_map import LayerMap, Position
from ..sources import at_revision

_DEEPEST = 32
_MAX_ENTRIES = 12  # of a list or mapping
_MAX_LISTED = 6  # equal numbers of a longer list are counted
_MAX_WIDTH = 100  # of a text in a list or mapping
_SHOWN_APART = {"kind", "what", "revision", "ok", "notes", "problems", "layer_map"}


@dataclasses.dataclass(frozen=True)
class FileFinding:
    """A weight file.

    Args:
        name: Its name.
        size: In bytes; `None` when it is missing.
        sha256: As recorded beside it, if at all.
        hub_sha256: As the Hub lists it; `None` for files that are not on the Hub, or offline.
        state: "not recorded", "recorded", "same on the Hub", "verified" (the bytes were hashed) or "differs".
    """

    name: str
    size: int | None
    sha256: str | None
    hub_sha256: str | None
    state: str


@dataclasses.dataclass(frozen=True)
class Weights:
    """What the headers of weight files say.

    Args:
        files: The files.
        tensors: How many tensors they hold.
        parameters: How many parameters they hold.
        size: Sum of the file sizes, in bytes.
        dtypes: Parameters by dtype, as safetensors names it; the most frequent first.
        per_layer: Parameters of each decoder layer, in order; empty when not known.
    """

    files: tuple[FileFinding, ...]
    tensors: int
    parameters: int
    size: int
    dtypes: Mapping[str, int]
    per_layer: tuple[int, ...] = ()

    @property
    def sha256(self) -> str:
        """The worst state of a file."""
        order = ("differs", "not recorded", "recorded", "same on the Hub", "verified")
        return min((file.state for file in self.files), key=order.index, default="not recorded")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspection:
    """The result of `inspect`.

    Args:
        what: What was inspected.
        revision: Its commit, on the Hub.
        notes: What is not known, and why.
        problems: Why it would be refused: a mismatch with the given recipient, or bytes that differ.
    """

    kind: ClassVar[str] = ""

    what: str
    revision: str | None = None
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        return _text(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON."""
        return dict(_plain({"kind": self.kind, **vars(self), "ok": bool(self)}))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DonorInspection(Inspection):
    """A donor.

    Args:
        name: Its name.
        model_type: The type of the source model.
        layer_indices: The numbers of its layers in the source model.
        source: The source model, if known.
        source_revision: Its commit, if known.
        recipient: The model it is meant for, if known.
        recipient_revision: Its commit, if known.
        position: The recommended position, if any.
        mode: The recommended mode, "insert" or "replace".
        strength: The recommended strength.
        placed_at: The position of `layer_map` and `compatibility`: the given one, else the recommended one.
        metadata: What the author recorded.
        weights: What its weight files hold.
        layer_map: The layers that would run; empty when the recipient is out of reach.
        compatibility: Whether it fits the given recipient; `None` when none is given.
    """

    kind = "donor"

    name: str | None
    model_type: str
    layer_indices: tuple[int, ...]
    source: str | None
    source_revision: str | None
    recipient: str | None
    recipient_revision: str | None
    position: Position | None
    mode: str
    strength: float
    placed_at: Position | None
    metadata: Mapping[str, Any]
    weights: Weights
    layer_map: LayerMap
    compatibility: CompatibilityReport | None = None


@dataclasses.dataclass(frozen=True)
class PlacedDonor:
    """A donor of a transplant.

    Args:
        name: Its name in the transplant.
        donor: Hub id or folder.
        revision: Its commit, on the Hub.
        subfolder: The folder inside it.
        position: How many recipient layers run before it.
        mode: "insert" or "replace".
        strength: The factor that scales what its layers add.
        layer_indices: The numbers of its running layers in the source model.
        metadata: What the author recorded.
        weights: What its weight files hold.
    """

    name: str
    donor: str
    revision: str | None
    subfolder: str | None
    position: Position
    mode: str
    strength: float
    layer_indices: tuple[int, ...]
    metadata: Mapping[str, Any]
    weights: Weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransplantInspection(Inspection):
    """A recipient with donors in place.

    Args:
        recipient: The recipient.
        recipient_revision: Its commit, if pinned.
        full: Whether it contains the recipient with its weights.
        donors: The donors, in their order.
        composition: How donors at one position are combined, "stacked" or "side_by_side".
        parameters: Parameters of all donors.
        size: Bytes of the weight files of all donors.
        layer_map: The layers that run; empty when the recipient is out of reach.
        compatibility: For each donor, whether it fits the given recipient; empty when none is given.
    """

    kind = "transplant"

    recipient: str
    recipient_revision: str | None
    full: bool
    donors: tuple[PlacedDonor, ...]
    composition: str
    parameters: int
    size: int
    layer_map: LayerMap
    compatibility: tuple[CompatibilityReport, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelInspection(Inspection):
    """A model of a class of Transformers, which may be a recipient.

    Args:
        model_type: Its type.
        architecture: The class that loads it; `None` when it is not known.
        num_layers: L; `None` when its layers cannot be found.
        positions: The first and the last position of a donor: 0 and L.
        hidden_size: The size of its hidden states.
        movable: Whether donors can be put between its layers.
        reason: Why not.
        sharing_layers: Numbers of layers that share weights with each other and cannot be moved.
        weights: What its weight files hold; `None` when there are no safetensors files.
    """

    kind = "model"

    model_type: str
    architecture: str | None
    num_layers: int | None
    positions: tuple[int, int] | None
    hidden_size: int | None
    movable: bool
    reason: str | None
    sharing_layers: tuple[int, ...]
    weights: Weights | None


@dataclasses.dataclass(frozen=True)
class PtTensorFinding:
    """A tensor of a `.pt` file: its shape, and its dtype as torch names it."""

    shape: tuple[int, ...]
    dtype: str


@dataclasses.dataclass(frozen=True)
class Numbering:
    """Tensors of a `.pt` file whose names go on with a number."""

    prefix: str  # what stands before the number; empty at the top
    numbers: tuple[int, ...]
    tensors: int  # how many there are


@dataclasses.dataclass(frozen=True, kw_only=True)
class PtInspection(Inspection):
    """A file that `torch.save` wrote.

    Args:
        size: In bytes.
        tensors: All tensors, by dotted name.
        parameters: How many numbers they hold; tensors that show the same bytes count once.
        dtypes: Parameters by type.
        numbering: How its names are numbered, the most tensors first.
        classes: Classes of pickled objects, of which nothing was run.
        values: Plain values beside the tensors, by dotted name.
        metadata: What the author recorded beside the file.
        recipient: The recipient asked about, with its commit; this and all below only when one was.
        model_type: Its type.
        layer_indices: The layers of that model that the file holds, as `Donor.from_pt` sees them.
        prefix: What stands before their numbers in the file.
        dropped: Tensors that belong to none of them.
        placed_at: The position asked for, else the best that is recorded, else the first quarter.
        layer_map: What would run.
    """

    kind = "pt"

    size: int
    tensors: Mapping[str, PtTensorFinding]
    parameters: int
    dtypes: Mapping[str, int]
    numbering: tuple[Numbering, ...]
    classes: tuple[str, ...]
    values: Mapping[str, Any]
    metadata: Mapping[str, Any]
    recipient: str | None = None
    model_type: str | None = None
    layer_indices: tuple[int, ...] = ()
    prefix: str | None = None
    dropped: tuple[str, ...] = ()
    placed_at: Position | None = None
    layer_map: LayerMap = dataclasses.field(default_factory=LayerMap)


def _plain(value: Any, depth: int = 0) -> Any:
    """Return what JSON can say: strangers' values may be anything."""
    if depth > _DEEPEST:
        return reprlib.repr(value)
    if isinstance(value, CompatibilityReport):
        value = value.to_dict()
    elif isinstance(value, Weights):
        value = {**vars(value), "sha256": value.sha256}
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = vars(value)
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, depth + 1) for item in value]
    return reprlib.repr(value)


# -- As text: the fields of `to_dict` as an indented list, in the same way for every kind ------------------------------


def _text(fields: Mapping[str, Any]) -> str:
    """Return an inspection as text: a title, its fields, notes and problems, and the layer map."""
    lines = [f"{at_revision(fields['what'], fields['revision'])}: {fields['kind']}"]
    for name, value in fields.items():
        if name not in _SHOWN_APART and not name.endswith("revision") and not _is_empty(value):
            shown = at_revision(value, fields.get("_".join((name, "revision"))))
            lines += [f"  {line}" for line in _field(name, shown)]
    for label, texts in (("note", fields["notes"]), ("problem", fields["problems"])):
        lines += [f"  {line}" for text in texts for line in f"{label}: {text}".splitlines()]
    lines = [_escape_controls(line) for line in lines]
    if fields.get("layer_map"):
        lines += ["", str(LayerMap((_escape_controls(source), index) for source, index in fields["layer_map"]))]
    return "\n".join(lines)


def _field(name: str, value: Any) -> list[str]:
    """Return a field as one line, or as a heading with a line for each thing in it."""
    label = _one_line(name)
    if isinstance(value, list) and all(isinstance(item, Mapping) for item in value):
        value = {str(item.get("name", number)): {**item, "name": None} for number, item in enumerate(value)}
    if not isinstance(value, Mapping):
        return [f"{label}: {_value(name, value)}"]
    entries = [
        _field(str(key), _one_line(item) if isinstance(item, str) else item)
        for key, item in value.items()
        if not _is_empty(item)
    ]
    hidden = len(entries) - _MAX_ENTRIES
    lines = [line for entry in entries[:_MAX_ENTRIES] for line in entry]
    lines += [f"... and {hidden:,} more"] if hidden > 0 else []
    on_one_line = f"{label}: {'; '.join(lines)}"
    return [on_one_line] if len(on_one_line) <= _MAX_WIDTH else [f"{label}:", *(f"  {line}" for line in lines)]


def _value(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return bytes_text(value) if name == "size" else f"{value:,}"
    if not isinstance(value, list):
        return " ".join(str(value).split())
    if all(isinstance(item, int) for item in value):
        if len(value) <= _MAX_LISTED or len(set(value)) == len(value):
            return numbers_text(value)
        value = [f"{len(list(same))} x {number:,}" for number, same in itertools.groupby(value)]
    hidden = len(value) - _MAX_ENTRIES
    more = [f"... and {hidden:,} more"] if hidden > 0 else []
    return ", ".join([*(_one_line(str(item)) for item in value[:_MAX_ENTRIES]), *more])


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | Mapping) and not value)


def _one_line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _MAX_WIDTH else f"{text[: _MAX_WIDTH - 3]}..."


def _escape_controls(line: str) -> str:
    """Escape characters that could control a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in line)
