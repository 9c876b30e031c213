"""Perplexities as tables and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from ..display import align_table
from ..layer_map import RECIPIENT
from .losses import Perplexity

__all__ = ["EvaluationReport", "EvaluationRow", "StrengthCurve", "SweepReport", "SweepRow", "label_of"]


def label_of(donors: Iterable[str]) -> str:
    """Return what a model with these donors is called in reports, such as "with law, code"."""
    names = ", ".join(donors)
    return f"with {names}" if names else RECIPIENT


@dataclasses.dataclass(frozen=True)
class EvaluationRow:
    """One model on one text.

    Args:
        model: The model's name in the report.
        text: The text's name.
        perplexity: The result.
    """

    model: str
    text: str
    perplexity: Perplexity


@dataclasses.dataclass(frozen=True)
class EvaluationReport:
    """Models on texts; prints as a table.

    Args:
        rows: One for each model and text; for a transplant the untouched recipient comes first.
        about: How it was measured.
    """

    rows: tuple[EvaluationRow, ...]
    about: dict[str, Any]

    @property
    def models(self) -> tuple[str, ...]:
        """The models, in order."""
        return tuple(dict.fromkeys(row.model for row in self.rows))

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts, in order."""
        return tuple(dict.fromkeys(row.text for row in self.rows))

    def of(self, model: str, text: str) -> Perplexity:
        """Return the perplexity of one model on one text.

        Args:
            model: The model's name in the report.
            text: The text's name.
        """
        return next(row.perplexity for row in self.rows if (row.model, row.text) == (model, text))

    def __str__(self) -> str:
        lines = [["perplexity", *self.texts]]
        lines += [[model, *(str(self.of(model, text)) for text in self.texts)] for model in self.models]
        first, last = self.models[0], self.models[-1]
        if first != last:
            ratios = [self.of(last, text).value / self.of(first, text).value for text in self.texts]
            lines.append(["change", *(f"{ratio - 1:+.1%}" for ratio in ratios)])
        lines.append(["tokens predicted", *(f"{self.of(first, text).tokens:,}" for text in self.texts)])
        return align_table(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON."""
        rows = [{"model": row.model, "text": row.text, **row.perplexity.to_dict()} for row in self.rows]
        return {**self.about, "rows": rows}


@dataclasses.dataclass(frozen=True)
class StrengthCurve:
    """Perplexities at several strengths; prints as a table.

    Args:
        points: `{strength: {text: perplexity}}`, in the order asked for.
        donors: The donors whose strength was set.
        about: How it was measured.
    """

    points: Mapping[float, Mapping[str, Perplexity]]
    donors: tuple[str, ...]
    about: Mapping[str, Any]

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts' names."""
        return tuple(next(iter(self.points.values())))

    def __str__(self) -> str:
        rows = [[f"{strength:g}", *map(str, point.values())] for strength, point in self.points.items()]
        return align_table([["strength", *self.texts], *rows])

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON."""
        rows = [
            {"strength": strength, **{text: found.to_dict() for text, found in point.items()}}
            for strength, point in self.points.items()
        ]
        return {**self.about, "donors": list(self.donors), "rows": rows}


@dataclasses.dataclass(frozen=True)
class SweepRow:
    """One donor at one position.

    Args:
        donor: Its name.
        position: How many recipient layers run before it.
        strength: The strength of the donor.
        perplexity: The result; `None` where the donor does not fit.
        reason: Why it does not fit.
    """

    donor: str
    position: int
    strength: float
    perplexity: Perplexity | None = None
    reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON."""
        place = {"donor": self.donor, "position": self.position, "strength": self.strength}
        if self.perplexity is None:
            return {**place, "perplexity": None, "reason": self.reason}
        return {**place, **self.perplexity.to_dict()}


@dataclasses.dataclass(frozen=True)
class SweepReport:
    """Donors at positions, on one text; prints as a table.

    Args:
        rows: In the order of donors, positions and strengths.
        recipient: The perplexity of the untouched recipient.
        text: The text's name.
        about: How it was measured.
    """

    rows: tuple[SweepRow, ...]
    recipient: Perplexity
    text: str
    about: dict[str, Any]

    @property
    def best(self) -> SweepRow | None:
        """The row with the lowest perplexity, the first of equals; `None` where no donor fits anywhere."""
        return _best(self.rows)

    @property
    def donors(self) -> tuple[str, ...]:
        """The donors' names, in order."""
        return tuple(dict.fromkeys(row.donor for row in self.rows))

    def best_of(self, donor: str) -> SweepRow | None:
        """Return a donor's best row, or `None` where it does not fit anywhere.

        Args:
            donor: Its name in the report.
        """
        return _best(row for row in self.rows if row.donor == donor)

    def __str__(self) -> str:
        columns = list(dict.fromkeys((row.donor, row.strength) for row in self.rows))
        several = len({strength for _, strength in columns}) > 1
        best = [self.best_of(donor) for donor in self.donors]
        cells = {
            (row.position, row.donor, row.strength): f"{row.perplexity}{' *' if row in best else '  '}"
            for row in self.rows
            if row.perplexity is not None
        }
        lines = [["position", *(f"{donor}, strength {s:g}" if several else donor for donor, s in columns)]]
        for position in sorted({row.position for row in self.rows}):
            lines.append([str(position), *(cells.get((position, *column), "-  ") for column in columns)])
        lines.append(["recipient", *([f"{self.recipient}  "] * len(columns))])
        title = f"Perplexity on {self.text}; * the best position of each donor"
        failed: dict[tuple[str, str], dict[int, None]] = {}  # each reason once
        for row in self.rows:
            if row.reason is not None:
                failed.setdefault((row.donor, row.reason), {})[row.position] = None
        reasons = [
            f"{donor} cannot go to position {', '.join(map(str, positions))}: {reason}"
            for (donor, reason), positions in failed.items()
        ]
        return "\n".join([title, align_table(lines), *reasons])

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {
            **self.about,
            "text": self.text,
            "recipient": self.recipient.to_dict(),
            "best": self.best.to_dict() if self.best else None,
            "rows": [row.to_dict() for row in self.rows],
        }


def _best(rows: Iterable[SweepRow]) -> SweepRow | None:
    measured = [(row.perplexity.nll, row) for row in rows if row.perplexity is not None]
    return min(measured, key=lambda pair: pair[0])[1] if measured else None
