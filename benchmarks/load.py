"""How long a transplant takes to load, and how much memory, beside the same model saved whole.

Every load runs in a fresh process; rounds hold every way of loading once, in random order, so that what else the
machine does falls on all alike. Weights are random and written once into the work folder (about 6 GB).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the package beside this folder, installed or not

from models import MODELS, Folders, ModelShape, prepare  # noqa: E402
from one_speed import ACTIONS  # noqa: E402
from report import compare, facts, header, table  # noqa: E402
from routes import NEEDS, REFERENCE, ROUTES, cannot_express  # noqa: E402
from tqdm import tqdm  # noqa: E402

Row = dict[str, Any]
_CHUNK = 1 << 24
_LONGEST_RUN = 1800


class UnmeasuredError(Exception):
    """A way of loading that failed; the last line it wrote."""


def main() -> None:
    """Measure what the command line names."""
    args = _parser().parse_args()
    known = facts(args.threads)
    known["versions"]["mergekit"] = _mergekit_version(args.mergekit_python) or "not installed"
    if not args.json:
        print(header(known), end="\n\n")
    found: Row = {**known, "runs": args.runs, "cache": args.cache, "models": {}}
    with _work_folder(args.folder) as folder:
        for name in args.models:
            shape = MODELS[name]
            folders = prepare(shape, folder)
            measured = found["models"][name] = {}
            if "load" in args.what:
                measured["load"] = _loads(shape, folders, args)
            actions = [action for action in ACTIONS if action in args.what]
            if actions:
                measured.update(_speeds(shape, folders, actions, args))
            if not args.json:
                _show(shape, measured)
    found["machine"]["load_average_at_end"] = round(os.getloadavg()[0], 1)
    print(json.dumps(found) if args.json else f"load average at the end: {found['machine']['load_average_at_end']}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example: python benchmarks/load.py --folder bench-models --models gpt2 --what load forward",
    )
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=["gpt2", "llama"], help="default: gpt2 llama")
    add("--what", nargs="+", choices=["load", *ACTIONS], default=["load"], help="default: load")
    add("--routes", nargs="+", choices=ROUTES, default=list(ROUTES), help="ways of loading (default: all)")
    add("--runs", type=int, default=7, help="rounds (default: 7)")
    add("--folder", type=Path, help="work folder, used again when present (default: a temporary one)")
    add(
        "--threads",
        type=int,
        default=1,
        help="threads of torch; 0: its own choice (default: 1, because threads that wait for each other make a shared "
        "machine's times wild)",
    )
    add(
        "--cache",
        choices=["warm", "cold"],
        default="warm",
        help="have the files in the page cache before every run, or dropped from it (default: warm)",
    )
    add("--mergekit-python", default=sys.executable, help="a Python with mergekit (default: this one)")
    add("--json", action="store_true", help="print everything measured as JSON instead of tables")
    return parser


@contextmanager
def _work_folder(asked: Path | None) -> Iterator[Path]:
    if asked is not None:
        asked.mkdir(parents=True, exist_ok=True)
        yield asked.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="transplant-bench-") as folder:
        yield Path(folder)


def _loads(shape: ModelShape, folders: Folders, args: argparse.Namespace) -> Row:
    skipped = {route: why for route in args.routes if (why := _skip(route, shape, args.mergekit_python))}
    wanted = [route for route in ROUTES if route in {*args.routes, REFERENCE} and route not in skipped]
    rows: dict[str, list[Row]] = {route: [] for route in wanted}
    # Pages that were written lie in the cache in larger pieces than pages that were read, and are faster to map: all
    # files are dropped and read once, so that none has that advantage.
    _set_cache(folders, cold=True)
    bar = tqdm(total=args.runs * len(wanted), desc=f"{shape.name}: load", unit="run", file=sys.stderr)
    for _ in range(args.runs):
        for route in random.sample(wanted, len(wanted)):
            bar.set_postfix_str(route)
            if route not in skipped:
                _set_cache(folders, cold=args.cache == "cold")
                python = args.mergekit_python if route == "mergekit" else sys.executable
                command = [python, str(HERE / "one_load.py"), shape.name, route, str(folders.root.parent)]
                try:
                    rows[route].append(_child(command, args.threads, capture=True))
                except UnmeasuredError as error:
                    skipped[route] = str(error)
            bar.update()
    bar.close()
    if REFERENCE in skipped:
        raise SystemExit(f"{REFERENCE} could not be measured: {skipped[REFERENCE]}")
    return {"rows": {route: found for route, found in rows.items() if route not in skipped}, "skipped": skipped}


def _mergekit_version(python: str) -> str | None:
    ask = "import importlib.metadata, mergekit; print(importlib.metadata.version('mergekit'))"
    done = subprocess.run([python, "-c", ask], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def _skip(route: str, shape: ModelShape, mergekit_python: str) -> str | None:
    package = NEEDS.get(route)
    if package == "mergekit":
        missing = _mergekit_version(mergekit_python) is None
    else:
        missing = package is not None and importlib.util.find_spec(package) is None
    return f"{package} is not installed" if missing else cannot_express(route, shape)


def _set_cache(folders: Folders, cold: bool) -> None:
    """Have every weight file in the page cache, or none."""
    for path in folders.root.glob("*/*.safetensors"):
        with path.open("rb", buffering=0) as file:
            if cold:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while file.read(_CHUNK):
                    pass


def _child(command: list[str], threads: int, capture: bool) -> Row:
    paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    done = subprocess.run(
        command,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE if capture else None,
        timeout=_LONGEST_RUN,
    )
    if done.returncode != 0:
        lines = (done.stderr or "see above").strip().splitlines()
        raise UnmeasuredError(lines[-1] if lines else f"exit code {done.returncode}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _speeds(shape: ModelShape, folders: Folders, actions: list[str], args: argparse.Namespace) -> Row:
    _set_cache(folders, cold=False)
    command = [sys.executable, str(HERE / "one_speed.py"), shape.name, str(folders.root.parent)]
    return _child([*command, "--runs", str(args.runs), "--actions", *actions], args.threads, capture=False)


def _show(shape: ModelShape, measured: Row) -> None:
    print(f"## {shape.title}\n")
    if "load" in measured:
        _show_loads(measured["load"])
    for action in (name for name in ACTIONS if name in measured):
        _show_speed(action, measured[action])


def _show_loads(found: Row) -> None:
    rows = found["rows"]
    reference = rows[REFERENCE]
    lines = []
    for route, runs in rows.items():
        time, cpu = ([run[key] for run in runs] for key in ("seconds", "cpu_seconds"))
        to_whole = compare(time, [run["seconds"] for run in reference])
        work = compare(cpu, [run["cpu_seconds"] for run in reference])
        anonymous = statistics.median(run["anon_mib"] for run in runs)
        same = {run["logits"] for run in runs} == {run["logits"] for run in reference}
        lines.append(
            [
                route,
                *to_whole.cells,
                f"{work.median:.3f}",
                f"{work.ratio:.3f}",
                f"{anonymous:.0f}",
                "yes" if same else "no",
            ]
        )
    head = [
        "to first logits",
        "median s",
        "min - max",
        "ratio",
        "paired ratio",
        "CPU s",
        "ratio",
        "anon MiB",
        "same logits",
    ]
    print(table(head, lines), end="\n\n")
    for route, why in found["skipped"].items():
        print(f"{route}: skipped, {why}.")
    waited = sum(run["disk_faults"] for runs in rows.values() for run in runs)
    print(f"page faults that waited for the disk, all runs together: {waited:.0f}", end="\n\n")


def _show_speed(action: str, found: Row) -> None:
    seconds = found["seconds"]
    pairs = (("whole-again", "whole"), ("transplant", "whole"), ("disabled", "recipient"))
    lines = [
        [f"{name} / {other}", *compare(seconds[name], seconds[other]).cells, f"{statistics.median(seconds[other]):.3f}"]
        for name, other in pairs
    ]
    head = [action, "median s", "min - max", "ratio", "paired ratio", "reference s"]
    print(table(head, lines), end="\n\n")
    print(f"results equal: {'yes' if found['equal'] else 'no'}", end="\n\n")


if __name__ == "__main__":
    main()
