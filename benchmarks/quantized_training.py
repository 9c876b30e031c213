"""What quantizing the recipient costs a donor, and what QLoRA takes on the same recipient.

    python benchmarks/quantized_training.py RECIPIENT TEXT [--steps 32] [--output FILE]

Each training runs in a fresh process. RECIPIENT is a folder in full precision, with its tokenizer; the last blocks of
TEXT are held out. Losses are nats for each token of the held-out part.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, BitsAndBytesConfig, TorchAoConfig, TrainingArguments
from transformers.utils import logging

from transplant_hf import AutoModelWithTransplant
from transplant_hf.evaluation import perplexity
from transplant_hf.model.load_any_model import load_model
from transplant_hf.texts import Blocks, TextSource, pack
from transplant_hf.training import DonorTrainer, DonorTrainingArguments
from transplant_hf.training.data import Rows
from transplant_hf.training.part_trainer import PartTrainer

METHODS = ("full", "bnb4", "bnb8", "torchao8")


def quantization(method: str) -> dict[str, Any]:
    """Return the arguments for loading a recipient."""
    if method == "full":
        return {}
    if method == "torchao8":
        from torchao.quantization import Int8WeightOnlyConfig

        return {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig())}
    bits = {"bnb4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "bnb8": {"load_in_8bit": True}}[method]
    return {"quantization_config": BitsAndBytesConfig(**bits)}


class Peak:
    """The largest resident memory of this process since it was reset, in MiB, mapped pages included."""

    def __init__(self) -> None:
        self.before = self._status("VmRSS")
        self.reset()

    def reset(self) -> None:
        """Begin again."""
        Path("/proc/self/clear_refs").write_text("5")

    @property
    def mib(self) -> int:
        """MiB above what was there when it was made."""
        return self._status("VmHWM") - self.before

    @staticmethod
    def _status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) // 1024


def loss(model: Any, blocks: Blocks) -> float:
    """Return the mean loss of a model on blocks."""
    return round(math.log(perplexity(model, blocks, quiet=True).value), 4)


def texts(options: argparse.Namespace) -> tuple[Blocks, Blocks]:
    """Return the text to learn and the held-out text."""
    tokenizer = AutoTokenizer.from_pretrained(options.recipient)
    rows = options.steps * options.batch_size
    blocks = pack(TextSource.parse(options.text), tokenizer, options.block_length, rows + options.held_out)
    return blocks.part(0, len(blocks) - options.held_out), blocks.part(len(blocks) - options.held_out, len(blocks))


def train_donor(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train a donor on a recipient that is quantized by one method, and measure it in each form of the recipient."""
    text, held_out = texts(options)
    peak = Peak()
    recipient = load_model(options.recipient, dtype=torch.float32, **quantization(options.method))
    loaded = peak.mib
    untouched = loss(recipient, held_out)
    args = DonorTrainingArguments(
        str(folder / "run"),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    peak.reset()
    begin = time.perf_counter()
    trainer = DonorTrainer(recipient, args, text, processing_class=AutoTokenizer.from_pretrained(options.recipient))
    trainer.train()
    seconds, trained = time.perf_counter() - begin, peak.mib
    trainer.finish()
    found = {
        "method": f"donor, {options.method}",
        "untouched": untouched,
        "as trained": loss(trainer.model, held_out),
        "seconds": round(seconds, 1),
        "cache_seconds": round(trainer.cache_seconds, 1),
        "load_mib": loaded,
        "train_mib": trained,
        "trained_parameters": trainer.trainable_parameters,
        "started_from": trainer.started_from,
    }
    trainer.save(folder / "donor")
    del trainer, recipient
    for method in METHODS if options.method in ("full", "bnb4") else ("full",):
        model = AutoModelWithTransplant.from_pretrained(folder / "donor", dtype=torch.float32, **quantization(method))
        found[f"used in {method}"] = loss(model, held_out)
    return found


def train_qlora(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train LoRA of rank 16 on all linear layers of the recipient in 4 bits."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    text, held_out = texts(options)
    peak = Peak()
    model = load_model(options.recipient, dtype=torch.float32, **quantization("bnb4"))
    loaded = peak.mib
    untouched = loss(model, held_out)
    peak.reset()
    begin = time.perf_counter()
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=options.checkpointing)
    config = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    wrapped: Any = get_peft_model(model, config)
    args = TrainingArguments(
        str(folder / "run"),
        per_device_train_batch_size=options.batch_size,
        learning_rate=2e-4,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    rows = Rows(text, options.steps * options.batch_size)
    trainer = PartTrainer(wrapped, args, rows, inner=model)
    trainer.train()
    seconds, trained = time.perf_counter() - begin, peak.mib
    return {
        "method": "QLoRA, r = 16, all linear",
        "untouched": untouched,
        "as trained": loss(wrapped, held_out),
        "seconds": round(seconds, 1),
        "load_mib": loaded,
        "train_mib": trained,
        "trained_parameters": trainer.trainable_parameters,
    }


def main() -> None:
    """Run the trainings one after another, and print a line of JSON for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipient")
    parser.add_argument("text")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--block-length", type=int, default=128)
    parser.add_argument("--held-out", type=int, default=32, help="blocks of the text that are held out")
    parser.add_argument("--methods", nargs="+", default=["full", "bnb4", "bnb8", "torchao8", "qlora"])
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing of QLoRA")
    parser.add_argument("--output", type=Path, help="file of the lines of JSON")
    parser.add_argument("--method", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.method is not None:
        logging.disable_progress_bar()
        with tempfile.TemporaryDirectory() as folder:
            run = train_qlora if options.method == "qlora" else train_donor
            print(json.dumps(run(options, Path(folder))))
        return
    for method in options.methods:
        command = [sys.executable, __file__, *sys.argv[1:], "--method", method]
        line = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
        print(line, flush=True)
        if options.output is not None:
            with options.output.open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")


if __name__ == "__main__":
    main()
