"""Forward and generate of four models in one process, interleaved; prints one line of JSON. Started by `load.py`.

A transplant is compared with the same model saved whole, and a transplant that is switched off with the recipient.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from models import MODELS, Folders
from one_load import input_tokens
from routes import ROUTES
from tqdm import tqdm
from transformers.utils import logging

__all__ = ["ACTIONS", "measure"]

_INPUT_TOKENS = 64
_NEW_TOKENS = 32


def forward(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """One forward of 64 tokens."""
    return model(tokens).logits


def generate(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Greedy decoding of 32 tokens, with a cache."""
    return model.generate(
        tokens, max_new_tokens=_NEW_TOKENS, min_new_tokens=_NEW_TOKENS, do_sample=False, pad_token_id=0
    )


ACTIONS: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {"forward": forward, "generate": generate}


def measure(model: str, actions: list[str], folder: Path, runs: int) -> dict[str, Any]:
    """Time actions of every model, each round in another order, after one round that is not counted.

    Args:
        model: A name in `MODELS`.
        actions: Names in `ACTIONS`.
        folder: The work folder.
        runs: Rounds.

    Returns:
        For each action and each model, the seconds of every round; and whether results that should be equal are.
    """
    shape, folders = MODELS[model], Folders(folder / model)
    loaded = {name: ROUTES[name](shape, folders)() for name in ("whole", "recipient", "thin")}
    spliced = loaded["thin"]
    variants: dict[str, tuple[Any, Callable[[], Any]]] = {
        "whole": (loaded["whole"], nullcontext),
        "whole-again": (loaded["whole"], nullcontext),
        "transplant": (spliced, nullcontext),
        "recipient": (loaded["recipient"], nullcontext),
        "disabled": (spliced, spliced.disable_transplants),
    }
    tokens = input_tokens(shape.build_config().vocab_size, _INPUT_TOKENS)
    found: dict[str, Any] = {}
    bar = tqdm(total=len(actions) * (runs + 1), desc=f"{model}: {', '.join(actions)}", unit="round", file=sys.stderr)
    for action in actions:
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        results: dict[str, torch.Tensor] = {}
        for number in range(runs + 1):
            for name in random.sample(list(variants), len(variants)):
                chosen, switch = variants[name]
                with switch(), torch.no_grad():
                    start = time.perf_counter()
                    results[name] = ACTIONS[action](chosen, tokens)
                    elapsed = time.perf_counter() - start
                if number:
                    seconds[name].append(elapsed)
            bar.update()
        pairs = (("transplant", "whole"), ("disabled", "recipient"))
        found[action] = {"seconds": seconds, "equal": all(torch.equal(results[a], results[b]) for a, b in pairs)}
    bar.close()
    return found


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, epilog="example: python benchmarks/one_speed.py gpt2 FOLDER")
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("folder", type=Path, help="the work folder of load.py")
    parser.add_argument("--actions", nargs="+", choices=ACTIONS, default=list(ACTIONS))
    parser.add_argument("--runs", type=int, default=7, help="rounds (default: 7)")
    args = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    print(json.dumps(measure(args.model, args.actions, args.folder, args.runs)))


if __name__ == "__main__":
    main()
