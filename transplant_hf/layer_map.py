"""Pure algebra of positions: which layer runs where. No files, no models.

One index rule, used everywhere: a position p counts the recipient's layers that run before the donor, in the
untouched recipient's numbering, whatever else is transplanted.
"""

from __future__ import annotations

import dataclasses
import html
import itertools
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import ConfigurationError
from .numeric import whole_number

if TYPE_CHECKING:
    from .config import DonorSpec

RECIPIENT = "recipient"
# Of a donor; several for one that is spread through the recipient.
Position = int | tuple[int, ...]


class Slot(NamedTuple):
    """Where a running layer came from: the source's name and the layer's index in its source model."""

    source: str
    index: int  # type: ignore[assignment]  # hides tuple.index, which is not needed here


class LayerMap(tuple[Slot, ...]):
    """For each layer that runs, in order, where it came from. Prints as a picture of the stack, with donor rows marked.

    A tuple of (source, index) pairs. The `legend` gives a phrase for some of the sources, which is printed below the
    picture. It is not part of the tuple, so maps with different legends are equal.

    Example:
        >>> print(LayerMap([("recipient", 0), ("law", 4), ("law", 5), ("recipient", 1)]))
        layer  from
            0  recipient 0
            1  |  law 4
            2  |  law 5
            3  recipient 1
        4 layers run: 2 recipient, 2 law
    """

    legend: tuple[tuple[str, str], ...]

    def __new__(cls, slots: Iterable[tuple[str, int]] = (), legend: Iterable[tuple[str, str]] = ()) -> LayerMap:
        """Create a map from (source, index) pairs."""
        made = super().__new__(cls, (Slot(*slot) for slot in slots))
        made.legend = tuple(legend)
        return made

    def __repr__(self) -> str:
        return f"LayerMap({[tuple(slot) for slot in self]})"

    def __str__(self) -> str:
        lines = ["layer  from"]
        for (source, _), run in itertools.groupby(enumerate(self), lambda row: (row[1].source, row[1].index - row[0])):
            mark = "" if source == RECIPIENT else "|  "
            rows = [f"{number:>5}  {mark}{source} {slot.index}" for number, slot in run]
            # Only the ends of a long run of recipient layers are printed.
            lines += [*rows[:2], "    :  :", *rows[-2:]] if source == RECIPIENT and len(rows) > 6 else rows
        counts = ", ".join(f"{len(self.layers_of(source))} {source}" for source in self.sources)
        lines.append(f"{len(self)} layers run: {counts}")
        return "\n".join([*lines, *(f"{name}: {phrase}" for name, phrase in self.legend)])

    def _repr_html_(self) -> str:
        """The same picture, for notebooks."""
        return f"<pre>{html.escape(str(self))}</pre>"

    @property
    def sources(self) -> tuple[str, ...]:
        """The names of the sources, the recipient first, then in running order."""
        named = dict.fromkeys(slot.source for slot in self)
        return tuple(sorted(named, key=lambda source: source != RECIPIENT))

    def layers_of(self, source: str) -> list[int]:
        """Return the running numbers of the layers that came from `source`.

        Args:
            source: "recipient", or a donor's name.
        """
        return [number for number, slot in enumerate(self) if slot.source == source]


@dataclasses.dataclass(frozen=True)
class Placement:
    """A donor and its position; several positions divide its layers into parts of one size."""

    name: str
    position: Position
    layer_indices: tuple[int, ...]
    replaces: bool = False

    def __post_init__(self) -> None:
        if len(self.layer_indices) % len(self.positions):
            raise ConfigurationError(
                f"donor {self.name!r} has {len(self.layer_indices)} layers, which cannot be divided into "
                f"{len(self.positions)} parts of one size, for positions {list(self.positions)}."
            )

    @classmethod
    def of(cls, spec: DonorSpec, layer_indices: tuple[int, ...]) -> Placement:
        """Return where a spec puts a donor."""
        return cls(str(spec.name), spec.position, layer_indices, spec.mode == "replace")

    @property
    def positions(self) -> tuple[int, ...]:
        """The position of each part."""
        return self.position if isinstance(self.position, tuple) else (self.position,)

    @property
    def parts(self) -> tuple[tuple[int, range], ...]:
        """Each part: its position, and its layers' numbers in the donor."""
        size = len(self.layer_indices) // len(self.positions)
        return tuple((place, range(part * size, (part + 1) * size)) for part, place in enumerate(self.positions))

    def position_of(self, numbers: Collection[int]) -> Position | None:
        """Return where some of its layers run; `None` where one donor cannot run there."""
        parts = [(place, part[0], [number for number in part if number in numbers]) for place, part in self.parts]
        parts = [part for part in parts if part[2]]
        apart = self.replaces and any(own[-1] - own[0] >= len(own) for _, _, own in parts)
        if apart or len({len(own) for _, _, own in parts}) > 1:
            return None
        places = tuple(place + (own[0] - first if self.replaces else 0) for place, first, own in parts)
        return places if len(places) > 1 else places[0]

    @property
    def end(self) -> int:
        """How many layers the recipient has at least."""
        return max(self.positions[-1], *(layer + 1 for layer in self.replaced), 0)

    @property
    def replaced(self) -> tuple[int, ...]:
        """The recipient layers that it replaces; empty for an inserted donor."""
        parts = self.parts if self.replaces else ()
        return tuple(place + number for place, layers in parts for number in range(len(layers)))


@dataclasses.dataclass(frozen=True)
class Stage:
    """A layer that the model holds, and when it runs."""

    slot: Slot
    donor_layer: int | None = None  # its number inside the donor; `None` for a recipient layer
    replaced_by: str | None = None

    def runs(self, disabled: Collection[str]) -> bool:
        """Whether it runs while the donors in `disabled` are off."""
        if self.slot.source != RECIPIENT:
            return self.slot.source not in disabled
        return self.replaced_by is None or self.replaced_by in disabled


class Splice:
    """A recipient of L layers with donors in place."""

    def __init__(self, num_layers: int, placements: Sequence[Placement]) -> None:
        self.num_layers = num_layers
        self.placements = tuple(placements)
        owners: dict[int, str] = {}
        for placement in self.placements:
            for position, layers in placement.parts:
                replaced = len(layers) if placement.replaces else 0
                check_position(position, num_layers, donor=placement.name, replaced=replaced)
            for layer in placement.replaced:
                if layer in owners:
                    raise ConfigurationError(
                        f"donors {owners[layer]!r} and {placement.name!r} both replace recipient layer {layer}. "
                        "Replacements may not overlap; move or shorten one of them."
                    )
                owners[layer] = placement.name
        stages: list[Stage] = []
        for position in range(self.num_layers + 1):
            stages += [
                Stage(Slot(placement.name, placement.layer_indices[number]), donor_layer=number)
                for placement in self.placements
                for place, layers in placement.parts
                if place == position
                for number in layers
            ]
            if position < self.num_layers:
                stages.append(Stage(Slot(RECIPIENT, position), replaced_by=owners.get(position)))
        self.stages = tuple(stages)

    @property
    def names(self) -> tuple[str, ...]:
        """The donors' names in the given order."""
        return tuple(placement.name for placement in self.placements)

    def running(self, disabled: Collection[str] = ()) -> tuple[Stage, ...]:
        """Return the stages that run, in order, while the donors in `disabled` are off."""
        return tuple(stage for stage in self.stages if stage.runs(disabled))

    def layer_map(self, disabled: Collection[str] = ()) -> LayerMap:
        """Return the layer map while the donors in `disabled` are off."""
        return LayerMap(stage.slot for stage in self.running(disabled))


def check_position(
    position: Any, num_layers: int, *, recipient: str = "", donor: str | None = None, replaced: int = 0
) -> int:
    """Return a position as an integer, or refuse one that the recipient does not have."""
    what = "position" if donor is None else f"position of donor {donor!r}"
    found, known = whole_number(position, what), f"recipient {recipient}" if recipient else "the recipient"
    what = what.replace("position", f"position {found}", 1)
    if not 0 <= found <= num_layers:
        raise ConfigurationError(
            f"{what} is outside 0..{num_layers}: {known} has {num_layers} layers, and the position counts those that "
            "run before the donor."
        )
    if replaced > num_layers:
        raise ConfigurationError(f"{what}: {replaced} layers cannot be replaced, {known} has only {num_layers}.")
    if found + replaced > num_layers:
        raise ConfigurationError(
            f"{what} is outside 0..{num_layers - replaced}: {known} has {num_layers} layers, of which {replaced} are "
            "replaced from the position on. Use a smaller position, or mode='insert' (--mode insert)."
        )
    return found


# Where a donor goes that recommends no position. These differ because what is known of the layers differs: training was
# measured, extracted layers have a place in their own model, and the author of the paper has a rule.

# Spread layers were ahead in a model of 30 layers and behind in one of 9 (docs/results.md); none between was tried.
_DEEP = 12


def trained_position(num_layers: int, count: int, mode: str = "insert", *, late: bool = False) -> Position:
    """Return the best measured position of a donor to train.

    Positions are spread through a deep recipient. With `late`, and in other recipients, the donor is before the last
    layer, or replaces the last layers, so that a training step runs as few layers as possible.
    """
    if late or num_layers < max(_DEEP, 2 * count) or count == 1:
        return max(num_layers - (count if mode == "replace" else 1), 0)
    return spread_positions(num_layers, count, mode)


def trained_placement(
    num_layers: int, count: int, mode: str = "insert", position: Position | None = None, *, late: bool = False
) -> Placement:
    """Return where a donor to train goes, by default at the best measured position; refuse what the recipient lacks."""
    position = trained_position(num_layers, count, mode, late=late) if position is None else position
    placement = Placement("donor", position, tuple(range(count)), mode == "replace")
    Splice(num_layers, [placement])  # checks the position
    return placement


def spread_positions(num_layers: int, count: int, mode: str = "insert") -> tuple[int, ...]:
    """Return positions for the layers of a donor that is spread evenly.

    The last layer is inserted before the recipient's last one. To replace, they go from the first layer to the last.

    Example:
        >>> spread_positions(30, 3), spread_positions(30, 3, "replace")
        ((10, 20, 29), (0, 15, 29))
    """
    if mode == "replace":
        last = num_layers - 1
        return tuple(last - round(last * part / max(count - 1, 1)) for part in reversed(range(count)))
    return tuple(min(round(num_layers * part / count), num_layers - 1) for part in range(1, count + 1))


def starting_layers(placement: Placement, num_layers: int) -> tuple[int, ...]:
    """Return the recipient layers that a donor's training starts from: those before each part, or those it replaces."""
    count = len(placement.layer_indices)
    if count > num_layers:
        raise ConfigurationError(f"a donor of {count} layers cannot start from a recipient of {num_layers} layers.")
    start: list[int] = []
    for place, layers in placement.parts:
        size = len(layers)
        first = place if placement.replaces else min(max(place - size, 0), max(num_layers - size, 0))
        start += range(first, min(first + size, num_layers))
    if start != sorted(set(start)):
        raise ConfigurationError(
            f"the parts of {placement.name} at positions {list(placement.positions)} would start from layers {start}, "
            "some of them twice. Move the positions apart, or pass start_layers (--start-layers)."
        )
    return tuple(start)


def extracted_position(num_layers: int, layers: Sequence[int]) -> int:
    """Return the position right after the layers that a donor was extracted from."""
    return min(layers[-1] + 1, num_layers)


def paper_position(num_layers: int) -> int:
    """Return the position that the paper uses for a donor: after the first quarter of the model."""
    return max(1, num_layers // 4)


def paper_layers(num_layers: int, count: int = 3) -> range:
    """Return the layers that the paper uses for a donor: `count` layers, starting at a third of the model."""
    if not 1 <= count <= num_layers:
        raise ConfigurationError(f"a donor of {count} layers cannot be extracted from a model of {num_layers} layers.")
    start = min(num_layers // 3, num_layers - count)
    return range(start, start + count)
