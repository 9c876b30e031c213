"""One measured training of a donor in a fresh process; prints one line of JSON. Started by `streamed.py`."""

from __future__ import annotations

import argparse
import json
import threading
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from transplant_hf.texts import Blocks
from transplant_hf.training import DonorTrainer, DonorTrainingArguments

__all__: list[str] = []


def main() -> None:
    """Train a donor of one layer before the last layer, streamed or with the whole recipient in memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipient", type=Path)
    parser.add_argument("work", type=Path)
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
    with Peak() as peak:
        began = time.perf_counter()
        trainer = DonorTrainer(options.recipient, args, Blocks(tokens.view(-1, 64)), processing_class=no_tokenizer())
        result = trainer.train()
        seconds = time.perf_counter() - began
        trainer.save_donor(options.work / "donor")
    held = trainer.model._layers_in_files
    print(
        json.dumps(
            {
                "imports": peak.before,
                "peak": peak.after,
                "seconds": seconds,
                "cache_seconds": trainer.cache_seconds,
                "step_seconds": result.metrics["train_runtime"],
                "read": held.bytes_read if held is not None else None,
                "donor": sum(tensor.nbytes for tensor in trainer.donor.tensors().values()),
            }
        )
    )


class Peak:
    """The largest resident memory of this process, mapped pages included, sampled."""

    def __init__(self) -> None:
        self.before = self.after = resident_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.004):
            self.after = max(self.after, resident_bytes())


def resident_bytes() -> int:
    """Return the resident memory of this process, mapped pages included."""
    with open("/proc/self/status") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))


def warm_up(work: Path) -> None:
    """Train on a tiny model first: what the libraries' own first steps take is not the recipient's."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "vocab_size": 128}
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, dtype="bfloat16", **sizes)).save_pretrained(work / "tiny")
    args = DonorTrainingArguments(
        str(work / "tiny-out"), donor_layers=1, max_steps=1, disable_tqdm=True, use_cpu=True, save_strategy="no"
    )
    blocks = Blocks(torch.randint(0, 100, (8, 16)))
    DonorTrainer(work / "tiny", args, blocks, processing_class=no_tokenizer()).train()


def no_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer that is not used: the text is blocks of tokens."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))


if __name__ == "__main__":
    main()
