"""What a comparison found, as a table and for machines."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from textwrap import shorten, wrap
from typing import Any

from ..outputs import check_output_folder
from ..storage import read_json, write_json, writing
from .runs import RunResult

__all__ = ["PICTURE", "ComparisonReport", "ComparisonRow", "check_comparison_folder", "run_writer"]

PICTURE = "comparison.png"
_JSON, _TEXT, _RUNS = "comparison.json", "comparison.txt", "runs.jsonl"
_WIDTH = 100  # of the table, in characters
_NARROWEST = 20


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

    def save(self, folder: Path, overwrite: bool = False) -> None:
        """Write `comparison.json` and `comparison.txt`.

        Args:
            folder: Where to; it is made if it is not there.
            overwrite: Replace an earlier comparison there; without it, a folder that is not empty is refused.

        Raises:
            ConfigurationError: The folder is not empty.
        """
        check_comparison_folder(folder, overwrite)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / _JSON, self.to_dict())
            (folder / _TEXT).write_text(f"{self}\n", encoding="utf-8")

    def __str__(self) -> str:
        texts = list(self.rows[0].result.test)
        head = ["lr", "steps", *(shorten(text, 10, placeholder="...") for text in texts)]
        head += ["seconds", "trained", "MB", "removal"]
        cells = [_cells(row, texts) for row in self.rows]
        widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
        room = max(_WIDTH - sum(widths) - 2 * len(widths), _NARROWEST)
        labels = [wrap(row.label, room, subsequent_indent="  ") for row in self.rows]
        first = max(len(part) for label in (["method"], *labels) for part in label)

        def line(text: str, numbers: list[str]) -> str:
            return "  ".join([text.ljust(first), *map(str.rjust, numbers, widths)])

        lines = [line("method", head), "  ".join("-" * width for width in (first, *widths))]
        under = None
        for row, label, numbers in zip(self.rows, labels, cells, strict=True):
            if row.budget != "-" and under != (row.budget, row.result.share):
                under = (row.budget, row.result.share)
                lines.append(f"at equal {row.budget}, {row.result.share:.0%} general text replayed:")
            lines += [line(label[0], numbers), *label[1:]]
        return "\n".join(lines)


def run_writer(folder: Path) -> Callable[[RunResult], None]:
    """Return what adds a run to `runs.jsonl`, a JSON object a line, so that a comparison that is stopped loses none.

    Args:
        folder: Where the comparison is written; it is made if it is not there. The first run replaces what an earlier
            comparison wrote to the file.
    """
    path, mode = folder / _RUNS, "w"

    def write(result: RunResult) -> None:
        nonlocal mode
        with writing(path, "The runs before are unchanged."):
            folder.mkdir(parents=True, exist_ok=True)
            with path.open(mode, encoding="utf-8") as file:
                file.write(f"{json.dumps(dataclasses.asdict(result))}\n")
        mode = "a"

    return write


def check_comparison_folder(folder: Path, overwrite: bool) -> None:
    """Refuse a folder to write a comparison into; see `check_output_folder`.

    Raises:
        ConfigurationError: It is not empty, or holds files of the same names that are not of a comparison.
    """
    check_output_folder(folder, overwrite, _strangers)


def _strangers(folder: Path) -> set[str]:
    """The files of a comparison's names that are of no comparison."""
    found = {name for name in (_JSON, _TEXT, PICTURE, _RUNS) if (folder / name).exists()}
    if _JSON in found and {"about", "rows", "runs"} <= set(read_json(folder / _JSON, "the comparison")):
        return set()
    return found - {_RUNS} if _RUNS in found and _is_run(folder / _RUNS) else found


def _is_run(path: Path) -> bool:
    with path.open(encoding="utf-8", errors="replace") as file:
        line = file.readline(1 << 16)
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(fields, dict) and {"method", "learning_rate", "steps"} <= set(fields)


def _cells(row: ComparisonRow, texts: list[str]) -> list[str]:
    """The numbers of a row, without its label."""
    result = row.result
    if row.budget == "-":
        return ["-", "-", *(f"{result.test[text]:.1f}" for text in texts), "-", "-", "-", "-"]
    numbers = [f"{result.test[text]:.1f}" if result.failed is None else "diverged" for text in texts]
    removal = (
        "no way back"
        if result.removal_error is None
        else "exact"
        if result.removal_error == 0
        else f"{result.removal_error:.1g}"
    )
    return [
        f"{result.learning_rate:g}",
        str(result.steps),
        *numbers,
        f"{result.whole_seconds:.1f}",
        f"{result.trainable / 1e6:.2f}M",
        f"{result.artefact_bytes / 1e6:.1f}",
        removal,
    ]
