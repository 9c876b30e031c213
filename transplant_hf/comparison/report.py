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

__all__ = ["HULL_LIMITS", "PICTURE", "ComparisonReport", "ComparisonRow", "Runs", "check_comparison_folder", "hull"]

PICTURE = "comparison.png"
_JSON, _TEXT, _RUNS = "comparison.json", "comparison.txt", "runs"
_LABEL_WIDTH = 34
HULL_LIMITS = (0.01, 0.03, 0.1)
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
        # The best gain of each method that forgets at most as much as each limit, in nats.
        curves: dict[tuple[str, ...], list[tuple[float, float]]] = {}
        for run in self.runs:
            if run.failed is None and run.gain is not None:
                label = (run.curve, str(run.steps), f"{run.replay_share:.0%}")
                curves.setdefault(label, []).append((run.gain, run.most_forgotten))
        best = [["gain at forgetting", "steps", "replay", *(f"<= {limit:g}" for limit in HULL_LIMITS)]]
        best += [[*label, *hull(pairs)] for label, pairs in curves.items()]
        return "\n".join([*printed, "", align_table(best)])


def hull(pairs: Sequence[tuple[float, float]]) -> list[str]:
    """Return the largest gain whose forgetting is at most each limit; "none" if there is none.

    Example:
        >>> hull([(0.2, 0.005), (0.3, 0.02), (0.9, 0.5)])  # pairs of gain and forgetting, in nats
        ['0.200', '0.300', '0.300']
    """
    kept = [[gain for gain, forgetting in pairs if forgetting <= limit] for limit in HULL_LIMITS]
    return [f"{max(gains):.3f}" if gains else "none" for gains in kept]


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


class Runs:
    """The runs of a comparison, and one JSON file for each, so that a comparison that is stopped loses none.

    `setup` is what must be equal in all runs: recipient, texts, batch size, ... With `resume` the runs that are in the
    folder are kept, otherwise removed.
    """

    def __init__(self, folder: Path | None, setup: Mapping[str, Any], resume: bool) -> None:
        self.folder, self.setup = folder and folder / _RUNS, json.loads(json.dumps(dict(setup)))
        found: dict[tuple[Any, ...], dict[str, Any]] = {}
        for path in sorted(filter(_is_run, self.folder.glob("*.json"))) if self.folder is not None else ():
            if not resume:
                path.unlink()
                continue
            content = read_json(path, "the run")
            self._check(path, content.pop("setup"))
            views = content.pop("views")
            result = RunResult(**content)
            found.setdefault(result.key, dict.fromkeys(views))[result.view] = result
        # A training of which a file is missing is made again.
        self._of = {key: [*results.values()] for key, results in found.items() if None not in results.values()}

    def _check(self, path: Path, setup: Mapping[str, Any]) -> None:
        for name in self.setup:
            if setup.get(name) != self.setup[name]:
                raise ConfigurationError(
                    f"{path} was measured with another setup: {name} {setup.get(name)!r} there, {self.setup[name]!r} "
                    "now. Use the same setup, or another folder."
                )

    def add(self, results: Sequence[RunResult]) -> None:
        """Keep the results of one training, one for each view."""
        self._of[results[0].key] = list(results)
        if self.folder is None:
            return
        for result in results:
            parts = [result.method, result.view, f"lr{result.learning_rate:g}", f"{result.steps}steps"]
            name = "-".join([*filter(None, parts), f"replay{result.replay_share:g}", f"seed{result.seed}"])
            content = {**dataclasses.asdict(result), "views": [one.view for one in results], "setup": self.setup}
            with writing(self.folder, "Earlier runs are unchanged."):
                self.folder.mkdir(parents=True, exist_ok=True)
                write_json(self.folder / f"{_SEPARATORS.sub('-', name)}.json", content)

    def find(self, key: tuple[Any, ...]) -> list[RunResult]:
        """Return the results of a training, or nothing."""
        return self._of.get(key, [])

    @property
    def all(self) -> tuple[RunResult, ...]:
        """All of them."""
        return tuple(result for results in self._of.values() for result in results)


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
