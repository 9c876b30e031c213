"""One measured training in a fresh process; prints one line of JSON. Started by `training.py`."""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from pathlib import Path

import torch
from one_load import PeakAnonymous
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig
from transformers.utils import logging

from transplant_hf.comparison import METHODS
from transplant_hf.comparison.methods import Setting
from transplant_hf.comparison.runs import Budget, train_once
from transplant_hf.texts import Blocks

__all__ = ["SHAPES"]

SHAPES: dict[str, PreTrainedConfig] = {
    "gpt2": GPT2Config(),
    "llama-5m": LlamaConfig(
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=9,
        num_attention_heads=4,
        vocab_size=3072,
        tie_word_embeddings=True,
        max_position_embeddings=256,
    ),
}


def main() -> None:
    """Train a few steps by one method."""
    parser = argparse.ArgumentParser()
    parser.add_argument("shape", help=f"{', '.join(sorted(SHAPES))}, or a recipient's folder")
    parser.add_argument("method", choices=sorted(METHODS))
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--layers", type=int, default=3)
    options = parser.parse_args()
    logging.disable_progress_bar()
    config = SHAPES.get(options.shape) or AutoConfig.from_pretrained(options.shape)
    # What the imports and the libraries' own first steps take is not the method's.
    METHODS["full"].prepare(Setting(lambda: AutoModelForCausalLM.from_config(_tiny(config)), None))
    tokens = torch.randint(0, 500, (64, 128), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        recipient = options.shape
        if options.shape in SHAPES:
            recipient = Path(folder, "recipient")
            AutoModelForCausalLM.from_config(config).save_pretrained(recipient)
        with PeakAnonymous() as peak:
            load = lambda: AutoModelForCausalLM.from_pretrained(recipient)  # noqa: E731
            frozen = options.method != "full" and not options.method.startswith("lora")
            shared = load().eval() if frozen else _outline(config)
            prepared = METHODS[options.method].prepare(Setting(load, shared, options.layers))
            budget = Budget(options.steps, options.batch_size)
            train_once(prepared, folder, 1e-4, budget, Blocks(tokens), None, cache="disk")
    print(json.dumps({"mib": peak.mib, "whole_mib": peak.mib + peak.before_mib}))


def _tiny(config: PreTrainedConfig) -> PreTrainedConfig:
    tiny = copy.deepcopy(config)
    tiny.vocab_size, tiny.num_hidden_layers = 500, 1
    return tiny


def _outline(config: PreTrainedConfig) -> torch.nn.Module:
    """A recipient without memory: methods that change their own copy need no second one."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


if __name__ == "__main__":
    main()
