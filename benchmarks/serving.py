"""Requests with different donors in one batch, beside the same batch with one donor for all, and one after another.

The requests go to what `transplant-hf serve` generates with, each in a thread, as those of a server do. Weights are
random, in the shape of SmolLM2-135M. Times are of one torch thread: processor seconds, and those of the clock.

    python benchmarks/serving.py
    python benchmarks/serving.py --layers 4 --rounds 1 --new 8  # to try it
"""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from report import compare, facts, header, table
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from transplant_hf import Donor, transplant
from transplant_hf.serving.server import DonorModels

_DONORS = 4
_SHAPE = {
    **{"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3},
    **{"vocab_size": 49152, "max_position_embeddings": 2048, "tie_word_embeddings": True},
}


def main() -> None:
    """Measure and print a table for each size of donors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30, help="layers of the recipient (default: 30)")
    parser.add_argument("--donor-layers", type=int, nargs="+", default=[1, 3], help="default: 1 3")
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt (default: 32)")
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer (default: 64)")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    print(header(facts(1)))
    for k in options.donor_layers:
        print(f"\n{_measured(options, k)}", flush=True)


def _measured(options: argparse.Namespace, k: int) -> str:
    models = DonorModels(_model(options.layers, k), None, "base")
    names = [f"d{number % _DONORS}" for number in range(options.requests)]
    ways = {"one donor for all": ["d0"] * len(names), "four donors": names, "four donors, one after another": names}
    clocks = {"processor": time.process_time, "clock": time.perf_counter}
    rates: dict[str, dict[str, list[float]]] = {clock: {way: [] for way in ways} for clock in clocks}
    prompts = torch.randint(1, 49152, (len(names), 1, options.prompt), generator=torch.Generator().manual_seed(0))
    answers: dict[str, list[list[int]]] = {}
    for number in tqdm(range(options.rounds + 1), desc=f"donors of {k} layers", unit="round", file=sys.stderr):
        for way, donors in ways.items():
            with ThreadPoolExecutor(1 if way.endswith("another") else len(names)) as clients:
                began = {clock: read() for clock, read in clocks.items()}
                found = list(clients.map(lambda *one: _answer(models, options.new, *one), donors, prompts))
                for clock, read in clocks.items() if number else ():
                    rates[clock][way].append(len(names) * options.new / (read() - began[clock]))
            answers[way] = [ids[0].tolist() for ids in found]
    alike = [one == other for one, other in zip(answers["four donors"], answers[way], strict=True)]
    rows = [
        [f"{way}, {clock}", *compare(found, of_ways["one donor for all"]).cells]
        for clock, of_ways in rates.items()
        for way, found in of_ways.items()
    ]
    bound = (options.layers + k) / (options.layers + _DONORS * k)
    title = (
        f"{len(names)} requests of {options.prompt} + {options.new} tokens, {options.layers} layers, donors of {k}; "
        f"the bound of the ratio where reading weights takes the time: (L + k) / (L + {_DONORS} k) = {bound:.2f}; "
        f"answers that are the same in a batch and alone: {sum(alike)} of {len(alike)}"
    )
    return f"{title}\n\n{table(['requests', 'tokens/s', 'spread', 'ratio', 'paired'], rows)}"


def _model(layers: int, k: int) -> Any:
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**_SHAPE, num_hidden_layers=layers, pad_token_id=0)).eval()
    model.generation_config.eos_token_id = None
    donors = [Donor.from_model(model, range(n, n + k), name=f"d{n}") for n in range(_DONORS)]
    for donor in donors:
        model = transplant(model, donor, layers - 2)
    return model


def _answer(models: DonorModels, new: int, name: str, prompt: torch.Tensor) -> torch.Tensor:
    model, _ = models.load_model_and_processor(name)
    settings = GenerationConfig(max_new_tokens=new, do_sample=False, pad_token_id=0)
    return model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)


if __name__ == "__main__":
    main()
