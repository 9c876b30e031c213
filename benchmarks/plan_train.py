"""Memory of training a donor as `plan --train` says it, beside what a run takes.

Each run trains a donor in a fresh process: the peak of its resident memory, mapped pages included, above what it held
after training a tiny model, which imports everything.

    python benchmarks/plan_train.py
    python benchmarks/plan_train.py --shapes gpt2 --dtypes float32 --optim adafactor --gradient-checkpointing
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import report
import torch
from cost import Cost
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from transplant_hf import DonorTrainer, DonorTrainingArguments, plan
from transplant_hf.texts import Blocks

SHAPES: dict[str, PreTrainedConfig] = {
    # TinyLlama's 1.1B at half the width and half the depth: 190M parameters.
    "llama": LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=11,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=32000,
        tie_word_embeddings=False,
    ),
    "gpt2": GPT2Config(),
}
_TINY = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, vocab_size=64)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), default=sorted(SHAPES))
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--optim", default="adamw_torch")
    parser.add_argument("--count", type=int, default=1, help="layers of the donor")
    parser.add_argument("--position", type=int)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256, help="tokens in a block")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--ways", nargs="+", choices=("resident", "streamed"), default=["resident", "streamed"])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(_train(Path(options.one), options)))
        return
    print(report.header(report.facts(1)), end="\n\n")
    rows = []
    for shape in options.shapes:
        for dtype in options.dtypes:
            with tempfile.TemporaryDirectory() as folder:
                _save(SHAPES[shape], dtype, Path(folder))
                planned = plan(folder, train=_arguments(options, folder)).training
                assert planned is not None and planned.resident is not None
                for way in options.ways:
                    command = [sys.executable, *sys.argv, "--ways", way, "--one", folder]
                    done = subprocess.run(command, capture_output=True, text=True, check=False)
                    if done.returncode:
                        raise SystemExit(done.stderr)
                    peak = json.loads(done.stdout.splitlines()[-1])["peak"]
                    expected = getattr(planned, way)
                    mib = [f"{size / 2**20:.0f}" for size in (expected, peak)]
                    rows.append([f"{shape}, {dtype}, {way}", *mib, f"{expected / peak:.2f}"])
                    print(rows[-1], file=sys.stderr)
                print(planned, file=sys.stderr)
    print(report.table(["run", "planned MiB", "measured MiB", "ratio"], rows))


def _arguments(options: argparse.Namespace, folder: str, **changes: Any) -> DonorTrainingArguments:
    fields: dict[str, Any] = {
        "max_steps": options.steps,
        "per_device_train_batch_size": options.batch_size,
        "block_length": options.tokens,
        "donor_layers": options.count,
        "position": options.position,
        "optim": options.optim,
        "gradient_checkpointing": options.gradient_checkpointing,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return DonorTrainingArguments(folder, **{**fields, **changes})


def _save(config: PreTrainedConfig, dtype: str, folder: Path) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).save_pretrained(folder)


def _train(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as tiny:
        _save(_TINY, AutoConfig.from_pretrained(folder).dtype.__repr__().removeprefix("torch."), Path(tiny))
        changes = {"max_steps": 2, "block_length": 16, "position": None}
        _run(tiny, _arguments(options, f"{tiny}/run", **changes), options.ways[0])
    cost = Cost()
    _run(str(folder), _arguments(options, str(folder / "run")), options.ways[0])
    return cost.so_far()


def _run(folder: str, args: DonorTrainingArguments, way: str) -> None:
    vocab_size = AutoConfig.from_pretrained(folder).vocab_size
    rows = args.max_steps * args.per_device_train_batch_size
    blocks = Blocks(torch.randint(0, vocab_size, (rows, args.block_length)), name="noise")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>")))
    args.stream_prefix = way == "streamed"
    DonorTrainer(folder, args, blocks, processing_class=tokenizer).train()


if __name__ == "__main__":
    main()
