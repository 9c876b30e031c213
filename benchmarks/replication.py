"""The paper's recipe on a real model, beside LoRA and fine-tuning, with padding counted in the loss and without.

    python benchmarks/replication.py RECIPIENT --train wikitext-2-valid.txt --test wikitext-2-test.txt

The recipe of arXiv 2601.13580, as far as its text says it: 1,000 samples of WikiText, 5 epochs, AdamW at 1e-4; three
layers from L/3 on are trained alone, between the frozen embeddings and the head, and are then inserted at every
position. A sample is a paragraph, cut to --max-length tokens. Every model is measured twice: on the tokens of the test
paragraphs, and with each paragraph padded to --max-length with the end-of-text token and all positions counted, as
`labels = input_ids` does after padding.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import report
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset
from transformers import AutoTokenizer, Trainer, TrainingArguments
from transformers.utils import logging

from transplant_hf import Donor, transplant
from transplant_hf.comparison import METHODS
from transplant_hf.comparison.methods import Setting, donor_of
from transplant_hf.model.load_any_model import load_model
from transplant_hf.partial import PartialRun
from transplant_hf.training.donor_trainer import with_untrained_donor

_IGNORED = -100


class Samples(Dataset[list[int]]):
    """Paragraphs as token ids."""

    def __init__(self, path: Path, tokenizer: Any, count: int, max_length: int) -> None:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        texts = [line for line in lines if line and not line.startswith("=")]
        if len(texts) < count:
            raise SystemExit(f"{path} has {len(texts)} paragraphs, not {count}.")
        chosen = [texts[n * len(texts) // count] for n in range(count)]
        self.ids = [tokenizer(text)["input_ids"][:max_length] for text in chosen]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> list[int]:
        return self.ids[index]


@dataclasses.dataclass(frozen=True)
class Padding:
    """Makes a batch of samples.

    Args:
        token: What is appended.
        length: The length of all batches; `None` for that of the longest sample.
        counted: Whether appended tokens count in the loss.
    """

    token: int
    length: int | None
    counted: bool

    def __call__(self, samples: Sequence[list[int]]) -> dict[str, torch.Tensor]:
        """Return `input_ids`, `attention_mask` and `labels`, each `[batch, length]`."""
        length = self.length or max(map(len, samples))

        def padded(value: int, of: Sequence[list[int]]) -> torch.Tensor:
            return torch.tensor([row + [value] * (length - len(row)) for row in of])

        return {
            "input_ids": padded(self.token, samples),
            "attention_mask": padded(0, [[1] * len(row) for row in samples]),
            "labels": padded(self.token if self.counted else _IGNORED, samples),
        }


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What all trainings share."""

    train: Samples
    test: Samples
    pad: int
    batch_size: int
    max_length: int

    def fit(self, model: Any, rate: float, epochs: float, counted: bool) -> float:
        """Train the parameters of a model that require a gradient, and return the processor seconds."""
        with tempfile.TemporaryDirectory() as folder:
            args = TrainingArguments(
                folder, num_train_epochs=epochs, learning_rate=rate, per_device_train_batch_size=self.batch_size,
                save_strategy="no", report_to=[], seed=0, use_cpu=not torch.cuda.is_available(), disable_tqdm=True,
                remove_unused_columns=False, logging_steps=25,
            )  # fmt: skip
            collate = Padding(self.pad, self.max_length if counted else None, counted)
            began = time.process_time()
            Trainer(model, args, train_dataset=self.train, data_collator=collate).train()
            return time.process_time() - began

    @torch.no_grad()
    def measure(self, model: Any) -> dict[str, float]:
        """Return perplexity on the tokens of the test samples, and with padding counted."""
        collate = Padding(self.pad, self.max_length, False)
        sums, counts = torch.zeros(2, dtype=torch.float64), torch.zeros(2)
        model.eval()
        for start in range(0, len(self.test), self.batch_size):
            rows = collate(self.test.ids[start : start + self.batch_size])
            rows = {name: value.to(model.device) for name, value in rows.items()}
            labels = rows.pop("labels")[:, 1:]
            logits = model(**rows, use_cache=False).logits[:, :-1].float()
            losses = cross_entropy(logits.transpose(1, 2), rows["input_ids"][:, 1:], reduction="none")
            for number, mask in enumerate((labels != _IGNORED, torch.ones_like(labels, dtype=torch.bool))):
                sums[number] += losses[mask].double().sum().cpu()
                counts[number] += mask.sum().cpu()
        tokens, padded = torch.exp(sums / counts).tolist()
        return {"tokens": tokens, "with padding": padded}


def main() -> None:
    """Measure, print a table, and write the rows as JSON."""
    options = _arguments()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(options.recipient)
    recipe = Recipe(
        Samples(options.train, tokenizer, options.samples, options.max_length),
        Samples(options.test, tokenizer, options.test_samples, options.max_length),
        tokenizer.eos_token_id,
        options.batch_size,
        options.max_length,
    )

    def load() -> Any:
        return load_model(options.recipient, dtype=torch.float32)

    rows: list[dict[str, Any]] = []

    def note(model: str, padding: str = "-", rate: float = 0.0, seconds: float = 0.0, **found: float) -> None:
        rows.append({"model": model, "padding": padding, "rate": rate, "seconds": round(seconds), **found})
        print(rows[-1], file=sys.stderr)
        if options.output:
            options.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")

    setting = Setting(load, load().eval().requires_grad_(False), options.count)
    note("untouched", **recipe.measure(setting.shared))
    positions = range(setting.count + 1) if options.positions is None else options.positions
    for padding in ("-", *options.padding):
        donor = _train_alone(setting, recipe, options, padding, note)
        for position in positions:
            spliced = transplant(setting.shared, donor, position=position)
            note(f"{_trained(padding)} layers inserted at {position}", padding, **recipe.measure(spliced))
    for padding in options.padding:
        for method, rates, epochs in (
            ("lora", options.lora_rates, options.lora_epochs),
            ("full", options.full_rates, options.full_epochs),
        ):
            for rate in rates:
                model = METHODS[method].prepare(setting).model
                seconds = recipe.fit(model, rate, epochs, padding == "counted")
                note(f"{METHODS[method].what}, {epochs:g} epochs", padding, rate, seconds, **recipe.measure(model))
    head = ["model", "padding in training", "learning rate", "s", "perplexity of tokens", "with padding"]
    table = [
        [row["model"], row["padding"], f"{row['rate']:g}" if row["rate"] else "-", str(row["seconds"] or "-"),
         f"{row['tokens']:.1f}", f"{row['with padding']:.2f}"]
        for row in rows
    ]  # fmt: skip
    print(report.header(report.facts(torch.get_num_threads())), report.table(head, table), sep="\n\n")


def _train_alone(setting: Setting, recipe: Recipe, options: argparse.Namespace, padding: str, note: Any) -> Donor:
    """Train layers between embeddings and head, and measure them there; with padding "-", do not train them."""
    layers = _layers(setting)
    model, part = with_untrained_donor(
        setting.shared, layers[0], setting.layers, init="copy", start_layers=layers, alone=True
    )
    with PartialRun(model, part.donor, from_embeddings=True):
        rate, seconds = 0.0, 0.0
        if padding != "-":
            rate = options.learning_rate
            seconds = recipe.fit(model, rate, options.epochs, padding == "counted")
        found = recipe.measure(model)
    note(f"layers {layers[0]}-{layers[-1]} alone, {_trained(padding)}", padding, rate, seconds, **found)
    return donor_of(model)


def _layers(setting: Setting) -> list[int]:
    first = setting.count // 3
    return list(range(first, first + setting.layers))


def _trained(padding: str) -> str:
    return "untrained" if padding == "-" else "trained"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipient", help="Hub id or folder")
    parser.add_argument("--train", type=Path, required=True, help="text file, one paragraph a line")
    parser.add_argument("--test", type=Path, required=True, help="the same, to measure on")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--test-samples", type=int, default=100)
    parser.add_argument("--epochs", type=float, default=5)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--count", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--positions", type=int, nargs="*", help="default: all")
    parser.add_argument("--padding", nargs="*", default=["ignored", "counted"], help="in the loss of training")
    parser.add_argument("--lora-rates", type=float, nargs="*", default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--lora-epochs", type=float, default=5)
    parser.add_argument("--full-rates", type=float, nargs="*", default=[3e-5, 1e-4, 3e-4])
    parser.add_argument("--full-epochs", type=float, default=5)
    parser.add_argument("--output", type=Path, help="JSON file for the rows")
    return parser.parse_args()


if __name__ == "__main__":
    with torch.random.fork_rng():
        main()
