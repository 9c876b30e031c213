"""What quantizing the recipient costs a donor, and what QLoRA takes on the same recipient.

    python benchmarks/quantized_training.py RECIPIENT TEXT [--steps 32] [--output FILE]

Each training runs in a fresh process. RECIPIENT is a folder in full precision, with its tokenizer; the last blocks of
TEXT are held out. Losses are nats for each token of the held-out part. Memory is the peak of resident memory, mapped
pages included, from loading the recipient to the last step, above what the imports took; seconds are of the same time.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from cost import Cost
from transformers import AutoTokenizer, BitsAndBytesConfig, TorchAoConfig, TrainingArguments
from transformers.utils import logging

from transplant_hf import AutoModelWithTransplant, transplant
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
    method, _, stream = options.method.partition("-")
    tokenizer = AutoTokenizer.from_pretrained(options.recipient)
    args = DonorTrainingArguments(
        str(folder / "run"),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        stream_prefix=bool(stream),
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    cost, how = Cost(), {"dtype": torch.float32, **quantization(method)}
    trainer = DonorTrainer(options.recipient, args, text, processing_class=tokenizer, model_kwargs=how)
    trainer.train()
    spent = cost.so_far()
    trainer.save(folder / "donor")
    found = {"method": f"donor, {options.method}", **spent, "cache_seconds": round(trainer.cache_seconds, 1)}
    found |= {"trained_parameters": trainer.trainable_parameters, "started_from": trainer.started_from}
    del trainer
    recipient = load_model(options.recipient, **how)
    found["untouched"] = loss(recipient, held_out)
    found["as trained"] = loss(transplant(recipient, folder / "donor", in_place=True), held_out)
    for method in METHODS if options.method in ("full", "bnb4") else ():
        model = AutoModelWithTransplant.from_pretrained(folder / "donor", dtype=torch.float32, **quantization(method))
        found[f"used in {method}"] = loss(model, held_out)
    return found


def train_qlora(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train LoRA of rank 16 on all linear layers of the recipient in 4 bits."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    text, held_out = texts(options)
    cost = Cost()
    model = load_model(options.recipient, dtype=torch.float32, **quantization("bnb4"))
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=options.checkpointing)
    config = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    wrapped: Any = get_peft_model(model, config)
    args = TrainingArguments(
        str(folder / "run"),
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.lora_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    rows = Rows(text, options.steps * options.batch_size)
    trainer = PartTrainer(wrapped, args, rows, inner=model)
    trainer.train()
    spent = cost.so_far()
    with wrapped.disable_adapter():
        untouched = loss(wrapped, held_out)
    return {
        "method": f"QLoRA, r = 16, all linear, rate {options.lora_rate:g}",
        **spent,
        "checkpointing": options.checkpointing,
        "trained_parameters": trainer.trainable_parameters,
        "untouched": untouched,
        "as trained": loss(wrapped, held_out),
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
    parser.add_argument("--methods", nargs="+", default=["full", "bnb4", "bnb4-streamed", "bnb8", "torchao8", "qlora"])
    parser.add_argument("--lora-rate", type=float, default=2e-4, help="learning rate of QLoRA")
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
