"""What a comparison found, as a table and for machines."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ..storage import write_json, writing
from .runs import RunResult

__all__ = ["ComparisonReport", "ComparisonRow"]


@dataclasses.dataclass(frozen=True)
class ComparisonRow:
    """One line of the table.

    Args:
        label: The method, in words.
        budget: "steps" or "time", or "-" for what was not trained.
        result: The run at the learning rate that was chosen.
    """

    label: str
    budget: str
    result: RunResult


@dataclasses.dataclass(frozen=True)
class ComparisonReport:
    """The whole comparison.

    Args:
        rows: What is reported, controls first.
        runs: Every run, chosen or not.
        about: What it was made with.
    """

    rows: tuple[ComparisonRow, ...]
    runs: tuple[RunResult, ...]
    about: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {
            "about": self.about,
            "rows": [{"label": row.label, "budget": row.budget, **dataclasses.asdict(row.result)} for row in self.rows],
            "runs": [dataclasses.asdict(run) for run in self.runs],
        }

    def save(self, folder: Path) -> None:
        """Write `comparison.json` and `comparison.txt`.

        Args:
            folder: Where to; it is made if it is not there.
        """
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "comparison.json", self.to_dict())
            (folder / "comparison.txt").write_text(f"{self}\n", encoding="utf-8")

    def __str__(self) -> str:
        texts = list(self.rows[0].result.test)
        head = ["method", "equal", "replay", "lr", "steps", *texts, "train s", "cache s", "trained", "MB", "removal"]
        lines = [head, *(_cells(row, texts) for row in self.rows)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
        ruler = ["-" * width for width in widths]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if column == 0 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in [head, ruler, *lines[1:]]
        )


def _cells(row: ComparisonRow, texts: list[str]) -> list[str]:
    result = row.result
    if row.budget == "-":
        numbers = [f"{result.test[text]:.1f}" for text in texts]
        return [row.label, "-", "-", "-", "-", *numbers, "-", "-", "-", "-", "-"]
    numbers = [f"{result.test[text]:.1f}" if result.failed is None else "diverged" for text in texts]
    removal = (
        "no way back"
        if result.removal_error is None
        else "exact"
        if result.removal_error == 0
        else f"{result.removal_error:.1g}"
    )
    return [
        row.label,
        row.budget,
        f"{result.share:g}",
        f"{result.learning_rate:g}",
        str(result.steps),
        *numbers,
        f"{result.seconds:.1f}",
        f"{result.cache_seconds:.1f}",
        f"{result.trainable:,}",
        f"{result.artefact_bytes / 1e6:.1f}",
        removal,
    ]
