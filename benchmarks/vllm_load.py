"""Load time and tokens per second of a donor in vLLM, beside the same model saved whole, which is served twice.

Each round starts a process with the three engines, in random order, and gives them the same prompts in turn, so that
what else runs on the machine slows all of them. Needs the environment of `make vllm`.

example: .venv-vllm/bin/python benchmarks/vllm_load.py --model llama --folder bench --rounds 5
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # the package beside this folder, installed or not

from models import MODELS, prepare  # noqa: E402
from report import compare, facts, header, table  # noqa: E402

WAYS = ("whole", "whole again", "donor")
_BATCH, _LENGTH, _TOKENS, _TURNS = 4, 64, 32, 10
_RESULT = "result: "
_FORMATS = {"config_format": "transplant", "load_format": "transplant"}


def _seconds(llm: Any, tokens: int) -> float:
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": list(range(n, n + _LENGTH))} for n in range(1, _BATCH + 1)]
    start = time.perf_counter()
    llm.generate(prompts, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False))
    return time.perf_counter() - start


def _round(whole: str, donor: str, order: list[str]) -> None:
    """Start the engines in this order, and let them generate in turn."""
    from vllm import LLM

    options: dict[str, Any] = {"max_model_len": 256, "enforce_eager": True, "skip_tokenizer_init": True}
    options["enable_prefix_caching"] = False
    engines, found = {}, {}
    for way in order:
        start = time.perf_counter()
        engines[way] = LLM(**options, **({"model": donor, **_FORMATS} if way == "donor" else {"model": whole}))
        found[way] = {"start, s": time.perf_counter() - start}
        _seconds(engines[way], _TOKENS)  # kernels are chosen in the first call
    turns: dict[str, list[tuple[float, float]]] = {way: [] for way in order}
    for _ in range(_TURNS):
        for way in order:
            turns[way].append((_seconds(engines[way], 1), _seconds(engines[way], _TOKENS)))
    for way, times in turns.items():
        first = statistics.median(one for one, _ in times)
        rest = statistics.median(everything - one for one, everything in times)
        found[way] |= {"first token, s": first, "tokens/s": _BATCH * (_TOKENS - 1) / rest}
    print(_RESULT + json.dumps(found))


def _measure(whole: Path, donor: Path, order: list[str]) -> dict[str, dict[str, float]]:
    words = [sys.executable, __file__, "--one", json.dumps([str(whole), str(donor), order])]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    run = subprocess.run(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    line = re.search(f"{_RESULT}(.+)", run.stdout)
    weights = re.findall(r"Loading weights took ([\d.]+) seconds", run.stdout)
    if line is None or len(weights) != len(order):
        raise SystemExit(run.stdout[-6000:])
    found: dict[str, dict[str, float]] = json.loads(line[1])
    for way, seconds in zip(order, weights, strict=True):
        found[way]["weights, s"] = float(seconds)
    return found


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("gpt2", "llama"), default="llama")
    parser.add_argument("--folder", type=Path, default=Path("bench-vllm"), help="where the models are written")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        _round(*args.one)
        return
    folders = prepare(MODELS[args.model], args.folder)
    rounds = []
    for number in range(args.rounds):
        order = random.Random(number).sample(WAYS, len(WAYS))
        rounds.append(_measure(folders.whole, folders.donor, order))
        print(rounds[-1], file=sys.stderr)
    print(header(facts(0)), f"vllm-cpu: {metadata.version('vllm-cpu')}", MODELS[args.model].title, sep="\n", end="\n\n")
    rows = [
        [f"{what}: {way}", *compare([one[way][what] for one in rounds], [one[WAYS[0]][what] for one in rounds]).cells]
        for what in rounds[0][WAYS[0]]
        for way in WAYS
    ]
    print(table(["", "median", "low - high", "ratio", "ratio in a round"], rows))


if __name__ == "__main__":
    main()
