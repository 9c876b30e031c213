"""What an evaluation and a sweep found, as tables and for machines."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from .perplexity import Perplexity

__all__ = ["EvaluationReport", "EvaluationRow", "SweepReport", "SweepRow"]


@dataclasses.dataclass(frozen=True)
class EvaluationRow:
    """One model on one text.

    Args:
        model: Which model.
        text: The text's name.
        perplexity: What was measured.
    """

    model: str
    text: str
    perplexity: Perplexity


@dataclasses.dataclass(frozen=True)
class EvaluationReport:
    """Models on texts; prints as a table.

    Args:
        rows: One for each model and text; of a transplant the untouched recipient comes first.
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
        """Return what one model reached on one text.

        Args:
            model: The model's name in the report.
            text: The text's name.
        """
        return next(row.perplexity for row in self.rows if (row.model, row.text) == (model, text))

    def __str__(self) -> str:
        head = ["perplexity", *self.texts]
        lines = [[model, *(str(self.of(model, text)) for text in self.texts)] for model in self.models]
        if len(self.models) > 1:
            first, last = self.models[0], self.models[-1]
            pairs = [(self.of(first, text), self.of(last, text)) for text in self.texts]
            lines.append(["change", *(f"{after.value / before.value - 1:+.1%}" for before, after in pairs)])
        tokens = [f"{self.of(self.models[0], text).tokens:,}" for text in self.texts]
        return _table([head, *lines, ["tokens predicted", *tokens]])

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON."""
        rows = [{"model": row.model, "text": row.text, **row.perplexity.to_dict()} for row in self.rows]
        return {**self.about, "rows": rows}


@dataclasses.dataclass(frozen=True)
class SweepRow:
    """One donor at one position.

    Args:
        donor: Its name.
        position: How many recipient layers run before it.
        strength: Of what it adds.
        perplexity: What was measured; `None` where it cannot go there.
        reason: Why not.
    """

    donor: str
    position: int
    strength: float
    perplexity: Perplexity | None = None
    reason: str | None = None


@dataclasses.dataclass(frozen=True)
class SweepReport:
    """Donors at positions, on one text; prints as a table.

    Args:
        rows: In the order of donors, positions and strengths.
        recipient: What the untouched recipient reached.
        text: The text's name.
        about: How it was measured.
    """

    rows: tuple[SweepRow, ...]
    recipient: Perplexity
    text: str
    about: dict[str, Any]

    @property
    def best(self) -> SweepRow | None:
        """The row with the lowest perplexity; the first of equals. `None` where no donor can go anywhere."""
        measured = [row for row in self.rows if row.perplexity is not None]
        return min(measured, key=_nll, default=None)

    @property
    def donors(self) -> tuple[str, ...]:
        """The donors' names, in order."""
        return tuple(dict.fromkeys(row.donor for row in self.rows))

    def best_of(self, donor: str) -> SweepRow | None:
        """Return a donor's best row, or `None` where it can go nowhere.

        Args:
            donor: Its name in the report.
        """
        measured = [row for row in self.rows if row.donor == donor and row.perplexity is not None]
        return min(measured, key=_nll, default=None)

    def __str__(self) -> str:
        columns = list(dict.fromkeys((row.donor, row.strength) for row in self.rows))
        scaled = len({strength for _, strength in columns}) > 1
        head = ["position", *(f"{donor}, strength {s:g}" if scaled else donor for donor, s in columns)]
        cells = {(row.position, row.donor, row.strength): row for row in self.rows}
        best = {id(self.best_of(donor)) for donor in self.donors}
        lines = [
            [str(p), *(_cell(cells.get((p, *column)), best) for column in columns)]
            for p in sorted({row.position for row in self.rows})
        ]
        reference = ["recipient", *([f"{self.recipient}  "] * len(columns))]
        table = _table([head, *lines, reference])
        return "\n".join([f"Perplexity on {self.text}; * the best position of each donor", table, *self._reasons()])

    def _reasons(self) -> list[str]:
        """Why a donor cannot go somewhere, each reason once."""
        places: dict[tuple[str, str], list[int]] = {}
        for row in self.rows:
            if row.reason is not None:
                numbers = places.setdefault((row.donor, row.reason), [])
                numbers += [] if row.position in numbers else [row.position]
        return [
            f"{donor} cannot go to position {', '.join(map(str, numbers))}: {reason}"
            for (donor, reason), numbers in places.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {
            **self.about,
            "text": self.text,
            "recipient": self.recipient.to_dict(),
            "best": _as_dict(self.best) if self.best else None,
            "rows": [_as_dict(row) for row in self.rows],
        }


def _nll(row: SweepRow) -> float:
    return row.perplexity.nll if row.perplexity else float("inf")


def _as_dict(row: SweepRow) -> dict[str, Any]:
    known = {"donor": row.donor, "position": row.position, "strength": row.strength}
    if row.perplexity is None:
        return {**known, "perplexity": None, "reason": row.reason}
    return {**known, **row.perplexity.to_dict()}


def _cell(row: SweepRow | None, best: set[int]) -> str:
    if row is None or row.perplexity is None:
        return "-  "
    return f"{row.perplexity} *" if id(row) in best else f"{row.perplexity}  "


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Align columns: the first to the left, numbers to the right."""
    widths = [max(len(row[number]) for row in rows) for number in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)
