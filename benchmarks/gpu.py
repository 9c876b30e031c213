"""What a transplant costs on a GPU: load to first token, decoding, and a training step, in bf16.

Beside the same model saved whole, the recipient alone, and LoRA. Every measurement runs in a fresh process; rounds hold
every way once, in random order. Before anything is measured, a transplant must have the logits of the model saved
whole, and switched off those of the recipient; every measured model is held to that again. Weights are random and
written once into the work folder: 3 GB for `llama`, 54 GB for `gpt-oss`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the package beside this folder, installed or not

import torch  # noqa: E402
from gpu_models import SHAPES, GpuShape, prepare  # noqa: E402
from one_gpu import METHODS, VARIANTS  # noqa: E402
from report import compare, facts, header, table  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tqdm import tqdm  # noqa: E402

Row = dict[str, Any]
_LONGEST_RUN = 3600
# What must have the logits of what: the measured, and its reference.
_EQUAL = {"whole-again": "whole", "transplant": "whole", "disabled": "recipient"}
_RATIOS = (
    ("whole-again", "whole"), ("transplant", "whole"), ("disabled", "recipient"), ("transplant", "recipient"),
)  # fmt: skip
# Relative norm of the difference: kernels that add in another order stay far below it in bf16, and a layer too many,
# too few or in another place comes out far above.
_MOST_DIFFERENCE = 0.01
# Both come as the module flash_attn.
_PACKAGE_OF = {"flash_attention_2": "flash-attn", "flash_attention_4": "flash-attn-4"}


class UnmeasuredError(Exception):
    """A process that failed; the last line it wrote."""


class WrongResultError(Exception):
    """A model that does not compute what it must: its times would mean nothing."""


def main(words: Sequence[str] | None = None) -> int:
    """Measure what the command line names.

    Args:
        words: The command line; by default the process's own.
    """
    args = _parser().parse_args(words)
    known = _facts(args)
    found: Row = {**known, "rounds": args.rounds, "models": {}}
    if not args.json:
        print(header(known), end="\n\n")
    with tempfile.TemporaryDirectory(prefix="transplant-gpu-") as spare:
        folder = (args.folder or Path(spare)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        for shape in (SHAPES[name] for name in args.shapes):
            prepare(shape, folder, args.device)
            for attention in args.attention or shape.attentions[:2]:
                try:
                    measured = _measure(shape, attention, folder, args)
                except WrongResultError as error:
                    print(f"{shape.title}, {attention}: refused, {error}", file=sys.stderr)
                    return 1
                found["models"].setdefault(shape.name, {})[attention] = measured
                if not args.json:
                    _show(shape, attention, measured, args)
    if args.json:
        print(json.dumps(found))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python benchmarks/gpu.py --folder bench-gpu --shapes llama --rounds 5\n"
        "without a GPU: python benchmarks/gpu.py --device cpu --shapes tiny --rounds 2 --batch 2 --length 16",
    )
    add = parser.add_argument
    add("--shapes", nargs="+", choices=SHAPES, default=["llama", "gpt-oss"], help="default: llama gpt-oss")
    add("--what", nargs="+", choices=["serve", "train"], default=["serve", "train"], help="default: both")
    add("--attention", nargs="+", help="default: the usual one of each shape, and FlashAttention where installed")
    add("--device", default="cuda", help="default: cuda")
    add("--rounds", type=int, default=5, help="default: 5")
    add("--tokens", type=int, default=128, help="new tokens in decoding (default: 128)")
    add("--steps", type=int, default=10, help="training steps in each round (default: 10)")
    add("--batch", type=int, default=4, help="rows of a training step (default: 4)")
    add("--length", type=int, default=512, help="tokens of a row (default: 512)")
    add("--folder", type=Path, help="work folder, used again when present (default: a temporary one)")
    add("--json", action="store_true", help="print everything measured as JSON instead of tables")
    return parser


def _facts(args: argparse.Namespace) -> Row:
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU that this torch can use; with --device cpu --shapes tiny the benchmark can be tried.")
    known = facts(0)
    known["versions"].update({package: _version(package) or "not installed" for package in _PACKAGE_OF.values()})
    known["versions"]["cuda"] = torch.version.cuda or "none"
    known["device"] = {"name": args.device}
    if torch.device(args.device).type == "cuda":
        properties = torch.cuda.get_device_properties(args.device)
        known["device"] = {"name": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)}
    known["device"]["date"] = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return known


# -- Measuring ---------------------------------------------------------------------------------------------------


def _measure(shape: GpuShape, attention: str, folder: Path, args: argparse.Namespace) -> Row:
    reason = _unavailable(shape, attention)
    if reason is not None:
        return {"skipped": {attention: reason}}
    measured: Row = {"skipped": {}}
    if "serve" in args.what:
        measured["serve"] = _serve_rounds(shape, attention, folder, args, measured["skipped"])
    if "train" in args.what:
        measured["train"] = _train_rounds(shape, attention, folder, args, measured["skipped"])
    return measured


def _unavailable(shape: GpuShape, attention: str) -> str | None:
    if attention not in shape.attentions:
        return f"{shape.kind.model_type} cannot run with it; it can with {', '.join(shape.attentions)}"
    package = _PACKAGE_OF.get(attention)
    return f"{package} is not installed" if package is not None and _version(package) is None else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _serve_rounds(shape: GpuShape, attention: str, folder: Path, args: argparse.Namespace, skipped: Row) -> Row:
    """Load and decode with every variant in every round; the first round is not counted, and checks the logits."""
    rounds: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="transplant-logits-") as logits:
        wanted: dict[str, torch.Tensor] = {}
        for number in range(args.rounds + 1):
            rows = _round(shape, list(VARIANTS), number, attention, folder, args, skipped, Path(logits))
            states = {name: state for row in rows.values() for name, state in row["states"].items()}
            found = {name: load_file(state.pop("logits"))["logits"] for name, state in states.items()}
            if not number:
                wanted = {name: found[name] for name in ("whole", "recipient") if name in found}
                _check_sensitive(wanted)
            for name, value in found.items():
                reference = _EQUAL.get(name, name)
                if reference in wanted:
                    states[name]["difference"] = check_logits(name, value, reference, wanted[reference])
            if number:
                rounds.append({"loads": rows, "states": states})
    return {"rounds": rounds}


def _train_rounds(shape: GpuShape, attention: str, folder: Path, args: argparse.Namespace, skipped: Row) -> Row:
    rounds = []
    for number in range(args.rounds):
        rows = _round(shape, list(METHODS), number + 1, attention, folder, args, skipped, Path())
        for name, row in rows.items():
            expected = rows["donor"]["first_loss"] if name != "lora" and "donor" in rows else row["expected_loss"]
            if expected is not None:
                check_loss(name, row["first_loss"], expected)
        rounds.append(rows)
    return {"rounds": rounds}


def _round(
    shape: GpuShape, whats: list[str], number: int, attention: str, folder: Path, args: argparse.Namespace,
    skipped: Row, logits: Path,
) -> dict[str, Row]:  # fmt: skip
    """Run every way that has not failed yet once, each in a process of its own."""
    chosen = [what for what in whats if what not in skipped]
    rows: dict[str, Row] = {}
    names = "check" if not number else f"round {number}"
    for what in tqdm(random.sample(chosen, len(chosen)), desc=f"{shape.name}, {attention}: {names}", file=sys.stderr):
        numbers = {"tokens": args.tokens, "steps": args.steps, "batch": args.batch, "length": args.length}
        options = {"device": args.device, "attention": attention, "logits": logits, **numbers}
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        try:
            rows[what] = child([shape.name, what, str(folder), *words])
        except UnmeasuredError as error:
            skipped[what] = str(error)
    return rows


def child(words: list[str]) -> Row:
    """Run `one_gpu.py` in a fresh process.

    Args:
        words: Its command line.

    Raises:
        UnmeasuredError: It failed.
    """
    paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    # On the CPU, threads that wait for each other make a shared machine's times wild.
    threads = {"OMP_NUM_THREADS": "1"} if "cpu" in words else {}
    done = subprocess.run(
        [sys.executable, str(HERE / "one_gpu.py"), *words],
        env={**threads, **os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=_LONGEST_RUN,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise UnmeasuredError(lines[-1] if lines else f"exit code {done.returncode}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the norm of the difference of two tensors of logits, relative to that of the second."""
    return float((found - wanted).norm() / wanted.norm())


def check_logits(name: str, found: torch.Tensor, reference: str, wanted: torch.Tensor) -> float:
    """Refuse logits that are not the reference's.

    Args:
        name: What was measured.
        found: Its logits, `[tokens, vocabulary]`.
        reference: What it must equal.
        wanted: The reference's logits.

    Returns:
        The relative difference.

    Raises:
        WrongResultError: It is too large, or not a number.
    """
    relative = difference(found, wanted)
    if not relative <= _MOST_DIFFERENCE:
        raise WrongResultError(
            f"the logits of {name} differ from those of {reference} by {relative:.4f} of their norm, at most "
            f"{_MOST_DIFFERENCE} is rounding"
        )
    return relative


def check_loss(name: str, found: float, wanted: float) -> None:
    """Refuse a training whose first loss is not the one it must be.

    Args:
        name: The method.
        found: Its first loss.
        wanted: What it must be.

    Raises:
        WrongResultError: They differ by more than rounding.
    """
    if not abs(found - wanted) <= _MOST_DIFFERENCE * abs(wanted):
        raise WrongResultError(f"the first loss of {name} is {found:.4f} where it must be {wanted:.4f}")


def _check_sensitive(wanted: dict[str, torch.Tensor]) -> None:
    """Refuse weights with which the donor could be left out unnoticed."""
    if len(wanted) == 2 and difference(wanted["whole"], wanted["recipient"]) < 5 * _MOST_DIFFERENCE:
        raise WrongResultError("the donor hardly changes the recipient's logits: equal logits would prove nothing")


# -- Showing -----------------------------------------------------------------------------------------------------


def _show(shape: GpuShape, attention: str, measured: Row, args: argparse.Namespace) -> None:
    print(f"### {shape.title}, {attention}\n")
    if measured.get("serve", {}).get("rounds"):
        print(load_table(measured["serve"]["rounds"]), end="\n\n")
        print(decode_table(measured["serve"]["rounds"]), end="\n\n")
    if measured.get("train", {}).get("rounds"):
        print(f"{args.batch} x {args.length} tokens:\n\n{train_table(measured['train']['rounds'])}", end="\n\n")
    for what, why in measured["skipped"].items():
        print(f"{what}: skipped, {why}.", end="\n\n")


def _values(rounds: Sequence[Row], part: str | None, name: str, key: str) -> list[Any] | None:
    """One value of every round, or none where a round lacks it."""
    rows = [found if part is None else found[part] for found in rounds]
    return [row[name][key] for row in rows] if all(name in row for row in rows) else None


def _gib(peaks: list[float | None] | None) -> str:
    known = [peak for peak in peaks or [] if peak is not None]
    return f"{max(known):.2f}" if known else "-"


def load_table(rounds: Sequence[Row]) -> str:
    """Write seconds from the call of `from_pretrained` to the first token; ratios are to the model saved whole."""
    lines = []
    reference = _values(rounds, "loads", "whole", "seconds")
    for name in VARIANTS:
        seconds = _values(rounds, "loads", name, "seconds")
        if seconds is not None and reference is not None:
            peak = _gib(_values(rounds, "loads", name, "peak_gib"))
            lines.append([name, *compare(seconds, reference).cells, peak])
    return table(["load to first token", "median s", "min - max", "ratio", "paired ratio", "peak GPU GiB"], lines)


def decode_table(rounds: Sequence[Row]) -> str:
    """Write tokens per second of greedy generation, each beside its reference."""
    lines = []
    for name, other in _RATIOS:
        speed = _values(rounds, "states", name, "tokens_per_second")
        reference = _values(rounds, "states", other, "tokens_per_second")
        if speed is None or reference is None:
            continue
        apart = "by design"
        if _EQUAL[name] == other:
            apart = f"{max(_values(rounds, 'states', name, 'difference') or []):.1e}"
        peak = _gib(_values(rounds, "states", name, "peak_gib"))
        median = f"{statistics.median(reference):.3f}"
        lines.append([f"{name} / {other}", *compare(speed, reference).cells, median, peak, apart])
    head = ["decode", "tokens/s", "min - max", "ratio", "paired ratio", "reference tokens/s", "peak GPU GiB"]
    return table([*head, "logits differ by"], lines)


def train_table(rounds: Sequence[Row]) -> str:
    """Write seconds of a training step; ratios are to LoRA."""
    lines = []
    reference = _values(rounds, None, "lora", "seconds")
    for name in METHODS:
        seconds = _values(rounds, None, name, "seconds")
        if seconds is not None and reference is not None:
            peak = _gib(_values(rounds, None, name, "peak_gib"))
            trained = f"{rounds[0][name]['trained'] / 1e6:.1f}"
            lines.append([name, *compare(seconds, reference).cells, trained, peak])
    head = ["training step", "median s", "min - max", "ratio", "paired ratio", "trained, millions", "peak GPU GiB"]
    return table(head, lines)


if __name__ == "__main__":
    sys.exit(main())
