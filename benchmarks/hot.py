"""Changing the donors of a loaded model against loading it again; and what a choice by call or row costs.

Each change is timed on one live model, interleaved with a load of the same transplant from the same files, which are
in the page cache for both. The logits after the change must be those of the load, to the bit. A load in the dtype of
the files maps them and copies nothing; with `--dtype float32` it converts every weight, as a load onto a GPU moves it.

    python benchmarks/hot.py            # the shape of TinyLlama, about 5 GB of files
    python benchmarks/hot.py tiny       # to try it
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import torch
from models import MODELS, Folders, ModelShape, prepare
from one_load import PeakAnonymous, input_tokens
from report import compare, facts, header, table
from tqdm import tqdm
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from transplant_hf import AutoModelWithTransplant

__all__ = ["measure_calls", "measure_changes"]


def _load(folders: Folders, position: int | None, dtype: str) -> Any:
    if position is None:
        return AutoModelForCausalLM.from_pretrained(folders.recipient, dtype=dtype)
    return AutoModelWithTransplant.from_pretrained(
        folders.recipient, donors={str(folders.donor): position}, dtype=dtype
    )


def _timed(action: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = action()
    return time.perf_counter() - start, result


def measure_changes(shape: ModelShape, folders: Folders, runs: int, dtype: str) -> dict[str, dict[str, list[float]]]:
    """Time changes of a live model, each beside a new load, and the first logits after both.

    Args:
        shape: The model.
        folders: Its files.
        runs: Rounds that count, after one that does not.
        dtype: What weights are loaded as.

    Returns:
        For each change, by round: seconds of the change, of the first logits after it, of the load and the first
        logits after that; and peak anonymous MiB of the change.

    Raises:
        RuntimeError: Logits after a change are not those of a model loaded so.
    """
    position, other = shape.position, shape.num_layers - 1
    tokens = input_tokens(shape.build_config().vocab_size)
    donor = str(folders.donor)
    live = _load(folders, position, dtype)
    name = live.transplant_config.donors[0].name
    changes: dict[str, tuple[Callable[[], Any], int | None]] = {
        "remove_donor": (lambda: live.remove_donor(name), None),
        "add_donor": (lambda: live.add_donor(donor, position, name=name), position),
        "move_donor": (lambda: live.move_donor(name, other), other),
        "swap_donor": (lambda: live.swap_donor(name, donor, position=position), position),
        "set_strength": (lambda: live.set_strength(name, 1.0), position),
    }
    found: dict[str, dict[str, list[float]]] = {
        change: {"change": [], "logits": [], "load": [], "anon_mib": []} for change in changes
    }
    for number in tqdm(range(runs + 1), desc="changes", unit="round", file=sys.stderr):
        for change, (action, place) in changes.items():
            with torch.no_grad():
                with PeakAnonymous() as memory:
                    changing, _ = _timed(action)
                running, logits = _timed(lambda: live(tokens).logits)
                loading, wanted = _timed(lambda at=place: _load(folders, at, dtype)(tokens).logits)
            if not torch.equal(logits, wanted):
                raise RuntimeError(f"after {change!r} the logits are not those of a model that is loaded so.")
            if number:
                for key, value in (("change", changing), ("logits", running), ("load", loading)):
                    found[change][key].append(value)
                found[change]["anon_mib"].append(memory.mib)
    return found


def measure_calls(
    shape: ModelShape, folders: Folders, runs: int, dtype: str, new_tokens: int = 16
) -> dict[str, list[float]]:
    """Time `generate` for two rows as the model is loaded, and with a choice by call and by row, interleaved."""
    ids = input_tokens(shape.build_config().vocab_size).repeat(2, 1)
    plain, live = _load(folders, shape.position, dtype), _load(folders, shape.position, dtype)
    name = live.transplant_config.donors[0].name
    ways: dict[str, Callable[[], Any]] = {
        "no choice": lambda: _generate(plain, ids, new_tokens),
        "all donors, by call": lambda: _generate(live, ids, new_tokens, donors=name),
        "no donors, by call": lambda: _generate(live, ids, new_tokens, donors=()),
        "one of two rows": lambda: _generate(live, ids, new_tokens, rows=[name, None]),
    }
    found: dict[str, list[float]] = {way: [] for way in ways}
    for number in tqdm(range(runs + 1), desc="calls", unit="round", file=sys.stderr):
        for way, call in ways.items():
            elapsed, _ = _timed(call)
            if number:
                found[way].append(elapsed)
    return found


def _generate(model: Any, ids: torch.Tensor, new: int, **choice: Any) -> torch.Tensor:
    def run() -> torch.Tensor:
        return model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)

    if not choice:
        return run()
    with model.using(choice.get("donors"), rows=choice.get("rows")):
        return run()


def _report(changes: dict[str, dict[str, list[float]]], calls: dict[str, list[float]]) -> str:
    rows = []
    for change, one in changes.items():
        alone = compare(one["change"], one["load"])
        whole = compare([a + b for a, b in zip(one["change"], one["logits"], strict=True)], one["load"])
        rows.append([f"`{change}`", *alone.cells[:2], whole.cells[0], whole.cells[3], f"{max(one['anon_mib']):.0f}"])
    head = ["change", "median s", "spread", "with first logits, s", "ratio to load and logits", "peak anon MiB"]
    more = [[way, *(compare(seconds, calls["no choice"]).cells)] for way, seconds in calls.items()]
    calls_head = ["generate, two rows", "median s", "spread", "ratio", "paired"]
    return "\n\n".join([table(head, rows), table(calls_head, more)])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", choices=MODELS, default="llama")
    parser.add_argument("--runs", type=int, default=5, help="rounds (default: 5)")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 for its own choice")
    parser.add_argument("--dtype", default="auto", help="what weights are loaded as (default: as in the files)")
    parser.add_argument("--folder", type=Path, help="where files are kept for the next run; a temporary one by default")
    parser.add_argument("--json", action="store_true", help="print every value")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as scratch:
        folders = prepare(MODELS[args.model], args.folder or Path(scratch))
        changes = measure_changes(MODELS[args.model], folders, args.runs, args.dtype)
        calls = measure_calls(MODELS[args.model], folders, args.runs, args.dtype)
    if args.json:
        print(json.dumps({"changes": changes, "calls": calls, **facts(args.threads)}))
    else:
        print(header(facts(args.threads)), _report(changes, calls), sep="\n\n")


if __name__ == "__main__":
    main()
