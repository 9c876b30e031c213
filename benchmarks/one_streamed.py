"""One measured training or evaluation of a donor in a fresh process; prints a line of JSON. `streamed.py` starts it."""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from cost import Cost
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from transplant_hf import evaluate
from transplant_hf.model.layers_in_files import LayersInFiles
from transplant_hf.texts import Blocks
from transplant_hf.training import DonorTrainer, DonorTrainingArguments

__all__: list[str] = []


def main() -> None:
    """Train a donor of one layer before the last, or measure it: streamed, or with the whole recipient in memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipient", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--donor", type=Path, help="measure this donor; train one by default")
    parser.add_argument("--resident", action="store_true")
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=1)
    options = parser.parse_args()
    logging.disable_progress_bar()
    warm_up(options.work)
    # By Zipf's law, as in text: few rows of the embeddings are read.
    shares = 1 / (torch.arange(32000) + 10)
    tokens = torch.multinomial(shares, options.blocks * 64, True, generator=torch.Generator().manual_seed(0))
    run, read = train if options.donor is None else measure, bytes_of_layers()
    cost = Cost()
    found = run(options, Blocks(tokens.view(-1, 64)))
    print(json.dumps({**found, **cost.so_far(), "read": [read[number] for number in sorted(read)]}))


def train(options: argparse.Namespace, blocks: Blocks) -> dict[str, Any]:
    """Train a donor and save it."""
    args = DonorTrainingArguments(
        str(options.work / "out"),
        donor_layers=1,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        stream_prefix=not options.resident,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        report_to=[],
    )
    trainer = DonorTrainer(options.recipient, args, blocks, processing_class=no_tokenizer())
    states = {"states_seconds": 0.0, "states_processor_seconds": 0.0}
    fill = trainer.prefix.fill

    def measured(position: int) -> None:
        began, busy = time.perf_counter(), time.process_time()
        fill(position)
        states["states_seconds"] += time.perf_counter() - began
        states["states_processor_seconds"] += time.process_time() - busy

    trainer.prefix.fill = measured  # type: ignore[method-assign]
    result = trainer.train()
    trainer.save_donor(options.work / "donor")
    return {**states, "step_seconds": result.metrics["train_runtime"]}


def measure(options: argparse.Namespace, blocks: Blocks) -> dict[str, Any]:
    """Measure a donor beside its recipient."""
    found = evaluate(
        options.donor, blocks, stream=not options.resident, batch_size=options.batch_size, dtype="auto", quiet=True
    )
    return {"losses": [row.perplexity.nll for row in found.rows if row.perplexity is not None]}


def bytes_of_layers() -> Counter[int]:
    """Return a counter of the bytes that are read of each layer that stays in its files."""
    read: Counter[int] = Counter()
    load = LayersInFiles.load

    def counted(self: LayersInFiles, number: int, device: torch.device) -> None:
        before = self.bytes_read
        load(self, number, device)
        read[number] += self.bytes_read - before

    LayersInFiles.load = counted  # type: ignore[method-assign]
    return read


def warm_up(work: Path) -> None:
    """Train on a tiny model first: what the libraries' own first steps take is not the recipient's."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 128}
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, dtype="bfloat16", **sizes)).save_pretrained(work / "tiny")
    args = DonorTrainingArguments(
        str(work / "tiny-out"), donor_layers=1, max_steps=1, disable_tqdm=True, use_cpu=True, save_strategy="no"
    )
    blocks = Blocks(torch.randint(0, 100, (8, 16)))
    trainer = DonorTrainer(work / "tiny", args, blocks, processing_class=no_tokenizer())
    trainer.train()
    trainer.save_donor(work / "tiny-donor")
    evaluate(work / "tiny-donor", blocks, quiet=True)


def no_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer that is not used: the text is blocks of tokens."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))


if __name__ == "__main__":
    main()
