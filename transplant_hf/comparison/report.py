"""The result of a comparison: a table, JSON, and one JSON file for each run."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

from ..display import align_table
from ..errors import ConfigurationError
from ..storage import check_output_folder, read_json, write_json, writing
from .runs import RunResult

__all__ = ["PICTURE", "ComparisonReport", "ComparisonRow", "RunFiles", "check_comparison_folder"]

PICTURE = "comparison.png"
_JSON, _TEXT, _RUNS = "comparison.json", "comparison.txt", "runs"
_LABEL_WIDTH = 34
_SEPARATORS = re.compile(r"[^\w.]+")


@dataclasses.dataclass(frozen=True)
class ComparisonRow:
    """One line of the table.

    Args:
        label: The method, in words.
        budget: "steps" or "time", or "-" for what was not trained.
        result: The run at the chosen learning rate.
    """

    label: str
    budget: str
    result: RunResult


@dataclasses.dataclass(frozen=True)
class ComparisonReport:
    """The whole comparison; prints as a table.

    Args:
        rows: What is reported, controls first.
        runs: Every run, chosen or not.
        about: How it was made.
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
            folder: The folder; created if it does not exist.
            overwrite: Replace an earlier comparison; without it, a folder that is not empty is refused.

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
        head = ["method", "lr", "steps", *texts, "seconds", "trained", "MB", "removal"]
        lines: list[list[str]] = [head]
        titles: dict[int, str] = {}  # by the number of the line that follows
        group = None
        for row in self.rows:
            if row.budget != "-" and group != (row.budget, row.result.replay_share):
                group = (row.budget, row.result.replay_share)
                titles[len(lines)] = f"at equal {row.budget}, {row.result.replay_share:.0%} general text replayed:"
            first, *rest = wrap(row.label, _LABEL_WIDTH, subsequent_indent="  ")
            lines.append([first, *_cells(row, texts)])
            lines += [[part, *[""] * (len(head) - 1)] for part in rest]
        printed = align_table(lines).splitlines()
        for number, title in sorted(titles.items(), reverse=True):
            printed.insert(number, title)
        return "\n".join(printed)


def _cells(row: ComparisonRow, texts: Sequence[str]) -> list[str]:
    result = row.result
    numbers = [f"{result.test[text]:.1f}" if result.failed is None else "diverged" for text in texts]
    if row.budget == "-":
        return ["-", "-", *numbers, "-", "-", "-", "-"]
    removal = "impossible"
    if result.removal_error is not None:
        removal = "exact" if result.removal_error == 0 else f"{result.removal_error:.1g}"
    return [
        f"{result.learning_rate:g}",
        str(result.steps),
        *numbers,
        f"{result.whole_seconds:.1f}",
        f"{result.trainable_parameters / 1e6:.2f}M",
        f"{result.artifact_bytes / 1e6:.1f}",
        removal,
    ]


class RunFiles:
    """The runs of a comparison as files, one JSON object each, so that a comparison that is stopped loses none.

    Args:
        folder: The comparison's folder; created if it does not exist.
        setup: What must be equal in all runs: recipient, texts, batch size, ...
        resume: Whether to keep the runs that are there.
    """

    def __init__(self, folder: Path, setup: Mapping[str, Any], resume: bool) -> None:
        self.folder, self.setup = folder / _RUNS, json.loads(json.dumps(dict(setup)))
        for path in [] if resume else self._files():
            path.unlink()

    def _files(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("*.json") if _is_run(path)) if self.folder.is_dir() else []

    def add(self, results: Sequence[RunResult]) -> None:
        """Write the results of one training, one file for each view."""
        with writing(self.folder, "Earlier runs are unchanged."):
            self.folder.mkdir(parents=True, exist_ok=True)
            for result in results:
                parts = [result.method, result.view, f"lr{result.learning_rate:g}", f"{result.steps}steps"]
                name = "-".join([*filter(None, parts), f"replay{result.replay_share:g}", f"seed{result.seed}"])
                content = {**dataclasses.asdict(result), "views": [one.view for one in results], "setup": self.setup}
                write_json(self.folder / f"{_SEPARATORS.sub('-', name)}.json", content)

    def find(self, **key: Any) -> list[RunResult]:
        """Return the results of a training that are there, or nothing if they are not complete."""
        found: dict[str, RunResult] = {}
        views: list[str] = []
        for path in self._files():
            content = read_json(path, "the run")
            if any(content.get(name) != value for name, value in key.items()):
                continue
            setup, views = content.pop("setup"), content.pop("views")
            differing = [name for name in self.setup if setup.get(name) != self.setup[name]]
            if differing:
                name = differing[0]
                raise ConfigurationError(
                    f"{path} was measured with another setup: {name} {setup.get(name)!r} there, {self.setup[name]!r} "
                    "now. Use the same setup, or another folder."
                )
            found[content["view"]] = RunResult(**content)
        return [found[view] for view in views] if set(found) == set(views) else []


def check_comparison_folder(folder: Path, overwrite: bool) -> None:
    """Refuse a folder to write a comparison into; see `check_output_folder`."""
    check_output_folder(folder, overwrite, _foreign_files)


def _foreign_files(folder: Path) -> set[str]:
    found = {name for name in (_JSON, _TEXT, PICTURE, _RUNS) if (folder / name).exists()}
    if _JSON in found and {"about", "rows", "runs"} <= set(read_json(folder / _JSON, "the comparison")):
        return set()
    ours = (folder / _RUNS).is_dir() and all(_is_run(path) for path in (folder / _RUNS).iterdir())
    return found - {_RUNS} if ours else found


def _is_run(path: Path) -> bool:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and {"method", "learning_rate", "steps", "setup"} <= set(content)
