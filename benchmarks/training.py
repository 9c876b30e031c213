"""Seconds and memory of making donors, beside LoRA and fine-tuning.

Seconds: in every round each method trains once, in random order, in this process; ratios are paired with LoRA's of the
same round. Memory: each method trains in a fresh process; its peak of anonymous memory above what the imports took.

    python benchmarks/training.py --recipient FOLDER --text shakespeare.txt --general wikitext-2-test.txt
    python benchmarks/training.py --memory gpt2 --methods donor lora full
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import report
import torch
from one_training import SHAPES
from transformers import AutoTokenizer
from transformers.utils import logging

from transplant_hf.comparison import METHODS
from transplant_hf.comparison.methods import Setting
from transplant_hf.comparison.runs import Budget, train_once
from transplant_hf.model.load_any_model import load_model
from transplant_hf.texts import Blocks, pack

_REFERENCE = "lora"


def main() -> None:
    """Measure what was asked for and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipient", type=Path, help="folder of the recipient")
    parser.add_argument("--text", help="text to learn")
    parser.add_argument("--general", help="text to replay; none by default")
    parser.add_argument("--blocks", type=int, default=1000)
    parser.add_argument("--block-length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--fp32", action="store_true", help="no bfloat16 autocast")
    parser.add_argument("--memory", nargs="+", choices=sorted(SHAPES), default=[], help="shapes to measure memory with")
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    logging.disable_progress_bar()
    if options.threads:
        torch.set_num_threads(options.threads)
    print(report.header(report.facts(options.threads)), end="\n\n")
    if options.recipient is not None:
        print(_seconds(options), end="\n\n")
    for shape in options.memory:
        print(_memory(shape, options.methods), end="\n\n")


def _seconds(options: argparse.Namespace) -> str:
    tokenizer = AutoTokenizer.from_pretrained(options.recipient)
    text = pack(options.text, tokenizer, options.block_length)
    text = Blocks(text.tokens[torch.linspace(0, len(text) - 1, min(options.blocks, len(text))).long()], text.name)
    general = pack(options.general, tokenizer, options.block_length) if options.general else None
    budget = Budget(options.steps, replay_share=0.25 if general else 0.0, bf16=not options.fp32)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in options.methods}
    shared = load_model(options.recipient).eval().requires_grad_(False)
    setting = Setting(lambda: load_model(options.recipient), shared)
    for number in range(options.rounds):
        order = random.Random(number).sample(options.methods, len(options.methods))
        for name in order:
            with tempfile.TemporaryDirectory() as folder:
                run = train_once(METHODS[name].prepare(setting), folder, 1e-3, budget, text, general)
            times[name].append((run["seconds"], run["cache_seconds"]))
            print(f"round {number + 1}: {name} {run['seconds']:.1f} s + {run['cache_seconds']:.1f} s", file=sys.stderr)
    rows = []
    reference = [sum(pair) for pair in times[_REFERENCE]]
    for name, pairs in times.items():
        alone, whole = [pair[0] for pair in pairs], [sum(pair) for pair in pairs]
        rows.append([name, *report.compare(alone, reference).cells, report.compare(whole, reference).cells[3]])
    head = ["method", f"s for {options.steps} steps", "min - max", "ratio", "paired ratio", "with the cache"]
    return report.table(head, rows)


def _memory(shape: str, methods: list[str]) -> str:
    rows, peaks = [], {}
    for name in methods:
        command = [sys.executable, str(Path(__file__).with_name("one_training.py")), shape, name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        peaks[name] = json.loads(done.stdout.splitlines()[-1])
        print(f"{shape}: {name} {peaks[name]}", file=sys.stderr)
    for name, peak in peaks.items():
        ratios = [f"{peak['mib'] / peaks['full']['mib']:.2f}" if "full" in peaks else "-"]
        whole = [f"{peak['whole_mib'] / peaks['full']['whole_mib']:.2f}" if "full" in peaks else "-"]
        rows.append([name, f"{peak['mib']:.0f}", *ratios, f"{peak['whole_mib']:.0f}", *whole])
    head = [f"{shape}: peak anonymous memory", "MiB above imports", "of full", "MiB with imports", "of full"]
    return report.table(head, rows)


if __name__ == "__main__":
    main()
