"""How long a sweep over all positions takes beside evaluating a transplant at each.

Random Llamas with a small vocabulary, so that layers are nearly all of the work. Both ways start from a recipient in
memory, build every transplant, and give the same perplexities; rounds hold both once, in random order. Processor
time says what was done, whatever else the machine does.

example: python benchmarks/sweep.py --layers 9 22 --width 512 --runs 5
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the package beside this folder, installed or not

import torch  # noqa: E402
from report import compare, facts, header, table  # noqa: E402
from tqdm import tqdm  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402
from transformers.utils import logging  # noqa: E402

from transplant_hf import Donor, transplant  # noqa: E402
from transplant_hf.evaluation import perplexity, sweep  # noqa: E402
from transplant_hf.texts import Blocks  # noqa: E402

NAIVE, SWEEP = "evaluate at each position", "sweep"
_DONOR_LAYERS = 3
_VOCABULARY = 512


def passes(layers: int, donor_layers: int = _DONOR_LAYERS) -> tuple[int, int]:
    """Return how many layers run for each batch: in a sweep, and when each position is evaluated.

    Example:
        >>> passes(9)
        (84, 120)
    """
    swept = layers + sum(donor_layers + layers - position for position in range(layers + 1))
    return swept, (layers + 1) * (layers + donor_layers)


def naive(recipient: Any, donor: Donor, text: Blocks, batch_size: int) -> list[float]:
    """Build a transplant at each position and evaluate it."""
    found = []
    for position in range(recipient.config.num_hidden_layers + 1):
        model = transplant(recipient, donor, position)
        found.append(perplexity(model, text, batch_size=batch_size, quiet=True).nll)
    return found


def swept(recipient: Any, donor: Donor, text: Blocks, batch_size: int) -> list[float]:
    """Sweep."""
    report = sweep(recipient, donor, text, batch_size=batch_size, quiet=True)
    return [row.perplexity.nll for row in report.rows if row.perplexity]


WAYS: dict[str, Callable[[Any, Donor, Blocks, int], list[float]]] = {NAIVE: naive, SWEEP: swept}


def measure(layers: int, args: argparse.Namespace) -> dict[str, Any]:
    """Time both ways on one model, after one round that is not counted.

    Args:
        layers: The recipient's L.
        args: The command line.

    Returns:
        Seconds and processor seconds of every round by way, and the largest relative difference of what they found.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=args.width,
        intermediate_size=args.width * 8 // 3,
        num_attention_heads=args.width // 64,
        num_hidden_layers=layers,
        vocab_size=_VOCABULARY,
        max_position_embeddings=args.block_length,
    )
    recipient = LlamaForCausalLM(config).eval()
    donor = Donor.from_model(recipient, range(layers // 3, layers // 3 + _DONOR_LAYERS), name="donor")
    text = Blocks(torch.randint(0, _VOCABULARY, (args.blocks, args.block_length)))
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    processor: dict[str, list[float]] = {way: [] for way in WAYS}
    worst = 0.0
    with tqdm(total=(args.runs + 1) * 2, desc=f"{layers} layers", unit="run", file=sys.stderr) as bar:
        for number in range(args.runs + 1):
            found = {}
            for way in random.sample(list(WAYS), len(WAYS)):
                began, busy = time.perf_counter(), time.process_time()
                found[way] = WAYS[way](recipient, donor, text, args.batch_size)
                if number:
                    seconds[way].append(time.perf_counter() - began)
                    processor[way].append(time.process_time() - busy)
                bar.update()
            pairs = zip(found[NAIVE], found[SWEEP], strict=True)
            worst = max(worst, *(abs(one - other) / one for one, other in pairs))
    return {"seconds": seconds, "processor_seconds": processor, "worst_relative_difference": worst}


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--layers", type=int, nargs="+", default=[9, 22], help="recipients by their layers (default: 9 22)")
    add("--width", type=int, default=512, help="hidden size (default: 512)")
    add("--blocks", type=int, default=16, help="blocks of text (default: 16)")
    add("--block-length", type=int, default=128, help="tokens in each (default: 128)")
    add("--batch-size", type=int, default=8, help="blocks that are read at once (default: 8)")
    add("--runs", type=int, default=5, help="rounds (default: 5)")
    add("--threads", type=int, default=1, help="threads of torch; 0: its own choice (default: 1)")
    add("--json", action="store_true", help="print everything measured as JSON instead of tables")
    args = parser.parse_args()
    logging.disable_progress_bar()
    if args.threads:
        torch.set_num_threads(args.threads)
    known = facts(args.threads)
    found: dict[str, Any] = {**known, "runs": args.runs, "models": {n: measure(n, args) for n in args.layers}}
    if args.json:
        print(json.dumps(found))
        return
    print(header(known))
    for layers, measured in found["models"].items():
        print(f"\n## {layers} layers of width {args.width}, {args.blocks} x {args.block_length} tokens\n")
        _show(layers, measured)


def _show(layers: int, measured: dict[str, Any]) -> None:
    run, of = passes(layers)
    rows = []
    for way in WAYS:
        wall, busy = (
            compare(measured[kind][way], measured[kind][NAIVE]).cells for kind in ("seconds", "processor_seconds")
        )
        rows.append([way, *wall, busy[0], busy[3], f"{(run if way == SWEEP else of) / of:.3f}"])
    head = ["", "median s", "min - max", "ratio", "paired ratio", "processor s", "paired ratio", "layer passes, ratio"]
    print(table(head, rows))
    print(f"\nLargest relative difference of a loss: {measured['worst_relative_difference']:.1e}")


if __name__ == "__main__":
    main()
