"""The evidence: from one JSON file for each run to the tables and pictures of docs/results.md.

    python benchmarks/evidence.py add NAME COMPARISON...   # copies the runs of `transplant-hf compare --output`
    python benchmarks/evidence.py memory NAME RECIPIENT    # measures peak memory, each method in a fresh process
    python benchmarks/evidence.py write                    # writes tables and pictures from these files alone
    python benchmarks/evidence.py small FOLDER             # `make evidence`: a small recipient, from texts to table

`benchmarks/evidence/NAME/` holds the runs of one table. Anybody can add a row: run `compare` with the same texts, then
`add` and `write`. A table is written between `<!-- evidence: NAME -->` and `<!-- end of evidence -->`.

*Gain* is how much lower the loss on the domain is than that of the untouched recipient, in nats. *Forgetting* is how
much higher it is on that of the other texts where it rose most. The *hull* of a method is its best gain at a forgetting
of at most .01, .03 and .1, over the learning rates that were tried and the strengths 1 and 0.75, on the test texts.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import report

from transplant_hf.comparison import METHODS, RunResult, compare
from transplant_hf.comparison.report import HULL_LIMITS, hull
from transplant_hf.demo.run import DemoSettings, train_recipient
from transplant_hf.demo.texts import write_texts
from transplant_hf.plots import plot_hulls
from transplant_hf.texts import TextSource

FOLDER = Path(__file__).with_name("evidence")
PAGE = FOLDER.parents[1] / "docs" / "results.md"
_MEMORY = "memory.json"
_SECONDS = ("seconds", "cache_seconds")
_WITHOUT_K = ("lora", "full")  # methods that do not depend on the number of layers


class Run(NamedTuple):
    """A run, with what of its setup is part of its label."""

    result: RunResult
    layers: int

    @property
    def label(self) -> str:
        """The method's name in tables."""
        what = METHODS[self.result.method].what
        return what if self.result.method in _WITHOUT_K else f"{what}, k = {self.layers}"


def main() -> int:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, function, arguments in (
        ("add", add, {"name": {}, "comparisons": {"nargs": "+", "type": Path}}),
        ("memory", measure_memory, {"name": {}, "recipient": {"type": Path}}),
        ("write", write, {}),
        ("small", small, {"folder": {"type": Path}}),
    ):
        command = commands.add_parser(name)
        for argument, how in arguments.items():
            command.add_argument(argument, **how)
        command.set_defaults(function=function)
    options = vars(parser.parse_args())
    options.pop("function")(**options)
    return 0


def add(name: str, comparisons: Iterable[Path]) -> None:
    """Copy the runs of comparisons."""
    (FOLDER / name).mkdir(parents=True, exist_ok=True)
    for path in (path for folder in comparisons for path in sorted((folder / "runs").glob("*.json"))):
        content = json.loads(path.read_text(encoding="utf-8"))
        content["setup"]["recipient"] = Path(content["setup"]["recipient"]).name  # not where it was
        target = FOLDER / name / f"k{content['setup']['layers']}-{path.name}"
        target.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read(folder: Path) -> list[Run]:
    """Read the runs of one table."""
    runs = []
    for path in sorted(folder.glob("*.json")):
        if path.name != _MEMORY:
            content = json.loads(path.read_text(encoding="utf-8"))
            layers = content.pop("setup")["layers"]
            content.pop("views")
            runs.append(Run(RunResult(**content), layers))
    order = list(METHODS)
    return sorted(runs, key=lambda run: (order.index(run.result.method), run.layers, run.result.steps))


def measure_memory(name: str, recipient: Path) -> None:
    """Write the peak memory of each method in the table, above what the imports took, in a fresh process each."""
    peaks = {}
    for method, layers in sorted({(run.result.method, run.layers) for run in read(FOLDER / name)}):
        script = Path(__file__).with_name("one_training.py")
        command = [sys.executable, str(script), str(recipient), method, "--layers", str(layers), "--batch-size", "2"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[f"{method}, {layers}"] = round(json.loads(done.stdout.splitlines()[-1])["mib"])
    (FOLDER / name / _MEMORY).write_text(json.dumps(peaks, indent=1) + "\n", encoding="utf-8")


def write() -> None:
    """Write all tables and pictures."""
    page = PAGE.read_text(encoding="utf-8")
    for folder in sorted(path for path in FOLDER.iterdir() if path.is_dir()):
        picture = PAGE.parent / "img" / f"evidence-{folder.name}.png"
        begin, end = f"<!-- evidence: {folder.name} -->\n", "<!-- end of evidence -->"
        written = f"{begin}\n{tables(folder)}\n\n![gain and forgetting]({picture.parent.name}/{picture.name})\n\n{end}"
        page, count = re.subn(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: written, page, flags=re.DOTALL)  # noqa: B023
        if count != 1:
            raise SystemExit(f"{PAGE} has no lines {begin.strip()} and {end}.")
        draw(read(folder), picture)
    PAGE.write_text(page, encoding="utf-8")


def tables(folder: Path) -> str:
    """Return what was learned and forgotten at each method's chosen rate, then the hull and the costs."""
    runs = read(folder)
    peaks = json.loads((folder / _MEMORY).read_text()) if (folder / _MEMORY).is_file() else {}
    first = next(run.result for run in runs if run.result.failed is None)
    changes = {"domain": -(first.gain or 0.0), **first.forgetting_on}
    names = list(first.test)
    untouched = {name: first.test[name] / math.exp(changes[name]) for name in names}
    quality = [["untouched", "-", "-", "-", *(f"{untouched[name]:.1f}" for name in names), "-", "-"]]
    costs = []
    for (label, steps), rows in _grouped(runs, lambda run: (run.label, run.result.steps)).items():
        chosen = _chosen(rows)
        results = [run.result for run in chosen]
        perplexities = [_mean([result.test[name] for result in results], ".1f") for name in names]
        shown = [f"{results[0].learning_rate:g}", str(steps), str(len(chosen)), *perplexities]
        gains = _mean([result.gain or 0.0 for result in results], ".3f")
        quality.append([label, *shown, gains, _mean([run.result.most_forgotten for run in chosen], ".3f")])
        peak = peaks.get(f"{results[0].method}, {chosen[0].layers}")
        costs.append([
            label, str(steps), *hull(_points(rows)),
            " + ".join(f"{statistics.mean(getattr(one, part) for one in results):.0f}" for part in _SECONDS),
            "-" if peak is None else str(peak),
            f"{results[0].trainable_parameters / 1e6:.2f} M", f"{results[0].artifact_bytes / 1e6:.1f}",
            "impossible" if results[0].removal_error is None else "exact" if not results[0].removal_error else "close",
        ])  # fmt: skip
    general = {"general": "general (replayed)"}
    head = ["method", "learning rate", "steps", "seeds", *(general.get(name, name) for name in names)]
    head_costs = ["hull and costs", "steps", *(f"gain at <= {limit:g}" for limit in HULL_LIMITS)]
    head_costs += ["s + cache", "peak MiB", "trained", "MB", "removal"]
    return "\n\n".join((report.table([*head, "gain", "forgetting"], quality), report.table(head_costs, costs)))


def _grouped(runs: Iterable[Run], key: Any) -> dict[Any, list[Run]]:
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return groups


def _chosen(rows: Sequence[Run]) -> list[Run]:
    """The runs, one for each seed, at the learning rate that is best on the validation text."""
    usual = [run for run in rows if run.result.view == "" and run.result.failed is None]
    rates = _grouped(usual, lambda run: run.result.learning_rate)
    most = max(map(len, rates.values()))  # seeds
    finalists = [of_rate for of_rate in rates.values() if len(of_rate) == most]
    return min(finalists, key=lambda of_rate: statistics.mean(run.result.validation for run in of_rate))


def _points(rows: Iterable[Run]) -> list[tuple[float, float]]:
    """Gain and forgetting at each learning rate and strength, mean over seeds."""
    worked = [run for run in rows if run.result.failed is None]
    settings = _grouped(worked, lambda run: (run.result.learning_rate, run.result.view))
    return [_point(runs) for runs in settings.values()]


def _point(runs: Sequence[Run]) -> tuple[float, float]:
    """Mean gain and mean forgetting."""
    return statistics.mean(run.result.gain or 0.0 for run in runs), statistics.mean(
        run.result.most_forgotten for run in runs
    )


def _mean(values: Sequence[float], how: str) -> str:
    """The mean, with half the range over seeds where there are several."""
    spread = f" ± {(max(values) - min(values)) / 2:{how}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{how}}{spread}"


def draw(runs: Sequence[Run], path: Path) -> None:
    """Draw gain against forgetting: a hull for each method and number of steps."""
    groups = _grouped(runs, lambda run: f"{run.label}, {run.result.steps} steps")
    plot_hulls({label: _points(rows) for label, rows in groups.items()}, path, overwrite=True)


def small(folder: Path) -> None:
    """Remake the small table: a recipient, its comparison, and the page."""
    texts = write_texts(folder / "texts", 1_500_000, 40_000)
    if not (folder / "recipient" / "config.json").is_file():
        train_recipient(texts, DemoSettings(recipient_steps=400), folder / "recipient", quiet=False)
    compare(
        str(folder / "recipient"),
        TextSource(str(texts["source-train"])),
        TextSource(str(texts["english-train"])),
        output=folder / "comparison",
        resume=True,
        methods=["donor", "donor-spread", "lora", "full"],
        steps=60,
        replay_shares=[0.25],
        equal_time=False,
        held_out_blocks=48,
        seed=0,
    )
    add("small", [folder / "comparison"])
    write()


if __name__ == "__main__":
    sys.exit(main())
