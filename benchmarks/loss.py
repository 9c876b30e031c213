"""Memory and seconds of a step with the loss of the whole batch at one time, and with the loss in chunks of tokens.

Each run trains a donor of one layer in a fresh process, and the two kinds take turns. Memory is the peak of anonymous
memory in the steps, above what the model and the imports take. Ratios are paired inside each round.

    python benchmarks/loss.py --vocabulary 128256 --hidden 256 --tokens 1024 --rounds 3
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from typing import Any

import report
import torch
from one_load import PeakAnonymous
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from transplant_hf import DonorTrainer, DonorTrainingArguments
from transplant_hf.texts import Blocks

_KINDS = {"whole batch": 0, "in chunks": None}


class _Clock(TrainerCallback):
    """The seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self._began)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens in a step")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bf16", action="store_true", help="a model in bfloat16; float32 by default")
    parser.add_argument("--one", choices=sorted(_KINDS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(_train(options)))
        return
    print(report.header(report.facts(1)), end="\n\n")
    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in _KINDS}
    for number in range(options.rounds):
        for kind in sorted(_KINDS, reverse=number % 2 == 0):
            command = [sys.executable, *sys.argv, "--one", kind]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr)
            runs[kind].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"round {number + 1}: {kind} {runs[kind][-1]}", file=sys.stderr)
    reference = [run["seconds"] for run in runs["whole batch"]]
    rows = []
    for kind, found in runs.items():
        cells = report.compare([run["seconds"] for run in found], reference).cells
        rows.append([kind, f"{max(run['mib'] for run in found):.0f}", f"{found[-1]['loss']:.6f}", *cells])
    print(report.table(["loss", "peak MiB", "last loss", "s per step", "min - max", "ratio", "paired ratio"], rows))


def _train(options: argparse.Namespace) -> dict[str, float]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    length = min(options.tokens, 512)
    config = LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=2 * options.hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=options.vocabulary,
        max_position_embeddings=length,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16 if options.bf16 else torch.float32)
    rows = options.tokens // length
    blocks = Blocks(torch.randint(0, options.vocabulary, (rows * 2, length)), name="noise")
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        args = DonorTrainingArguments(
            folder,
            max_steps=options.steps,
            per_device_train_batch_size=rows,
            donor_layers=1,
            loss_chunk=_KINDS[options.one],
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            use_cpu=True,
            cache_prefix="off",
        )
        trainer = DonorTrainer(model, args, blocks, callbacks=[clock])
        with PeakAnonymous() as peak:
            trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"mib": peak.mib, "seconds": min(clock.seconds[1:]), "loss": losses[-1]}


if __name__ == "__main__":
    main()
