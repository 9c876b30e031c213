"""Donors that choose themselves, and the cost of donors that each run on their own rows.

Quality: a donor is trained for each domain, at one position, and signed. Rows of held-out text go through the model
with `using("auto")`, and the tokens after the first 32 are measured beside the recipient and each donor chosen by hand.
Speed: copies of one donor, of which each row of a batch uses another one, in processor seconds of one thread.

    python benchmarks/routing.py --recipient FOLDER --domain shakespeare=shakespeare.txt --domain python=python.txt \
        --general wikitext-2-valid.txt --general-test wikitext-2-test.txt --unseen licenses=licenses.txt
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import report
import torch
from transformers import AutoTokenizer
from transformers.utils import logging

from transplant_hf import AutoModelWithTransplant, Donor, DonorSpec, sign, train
from transplant_hf.model.load_any_model import load_model
from transplant_hf.texts import Blocks, pack

_SEEN, _LENGTH = 32, 128  # tokens that the router looks at, and in a row
_LENGTHS = (8, 16, 32, 64)


def main() -> None:
    """Measure both and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipient", required=True, help="Hub id or folder")
    parser.add_argument("--domain", action="append", required=True, metavar="NAME=TEXT", help="text of a donor")
    parser.add_argument("--general", required=True, help="general text to sign with and to replay")
    parser.add_argument("--general-test", required=True, help="general text to measure on")
    parser.add_argument("--unseen", action="append", default=[], metavar="NAME=TEXT", help="text of no donor")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=128, help="held-out rows of each text (default: 128)")
    parser.add_argument("--copies", type=int, default=8, help="donors in the measurement of speed (default: 8)")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    print(report.header(report.facts(1)), end="\n\n")
    with tempfile.TemporaryDirectory() as scratch:
        print(*quality(options, Path(scratch)), sep="\n\n", end="\n\n", flush=True)
        print(speed(options, Path(scratch)))


# -- Quality -------------------------------------------------------------------------------------------------------


def quality(options: argparse.Namespace, folder: Path) -> list[str]:
    """Return the tables of perplexity, of accuracy by length, and of text of no donor."""
    tokenizer = AutoTokenizer.from_pretrained(options.recipient)

    def packed(text: Any) -> Blocks:
        return pack(text, tokenizer, _LENGTH, quiet=True)

    general, held = packed(options.general), {}
    specs = []
    position = load_model(options.recipient).config.get_text_config(decoder=True).num_hidden_layers - 1
    for name, text in (one.split("=", 1) for one in options.domain):
        learned, held[name] = packed(text).split(9, 1)
        arguments = {"max_steps": options.steps, "per_device_train_batch_size": 8, "disable_tqdm": True}
        train(options.recipient, learned, folder / name, general=general, position=position, **arguments)
        signed = sign(folder / name, learned.tokens.flatten(), general.tokens.flatten(), quiet=True)
        print(signed, file=sys.stderr, flush=True)
        specs.append(DonorSpec(str(folder / name), position, name=name))
    model = AutoModelWithTransplant.from_pretrained(options.recipient, donors=specs).eval()
    held[None] = packed(options.general_test)
    texts = {name: _spread(blocks, options.rows) for name, blocks in held.items()}
    unseen = dict(one.split("=", 1) for one in options.unseen)
    unseen = {name: _spread(packed(text), options.rows) for name, text in unseen.items()}
    return [_perplexities(model, texts), _accuracy(model, texts), _unseen(model, unseen)]


def _spread(blocks: Blocks, count: int) -> torch.Tensor:
    numbers = torch.linspace(0, len(blocks) - 1, min(count, len(blocks))).long()
    return blocks.tokens[numbers].long()


def _perplexities(model: Any, texts: dict[str | None, torch.Tensor]) -> str:
    names = [name for name in texts if name is not None]
    ways: dict[str, Any] = {"recipient": (), **{f"donor {name}": name for name in names}, "stacked": names}
    rows = []
    for name, ids in texts.items():
        found = {way: _perplexity(model, ids, model.using(choice)) for way, choice in ways.items()}
        by_hand = found["recipient"] if name is None else found[f"donor {name}"]
        routed = _perplexity(model, ids, model.using("auto"))
        cells = [f"{value:.2f}" for value in (*found.values(), routed)]
        rows.append([name or "general", *cells, f"{routed / by_hand:.4f}"])
    return report.table(["text", *ways, "routed", "routed / by hand"], rows)


@torch.no_grad()
def _perplexity(model: Any, ids: torch.Tensor, block: AbstractContextManager[None]) -> float:
    """Of the tokens after those that the router looks at."""
    losses = []
    with block:
        for some in ids.split(16):
            logits = model(some, use_cache=False).logits[:, _SEEN - 1 : -1]
            losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), some[:, _SEEN:].flatten()))
    return float(torch.stack(losses).mean().exp())


def _routes(model: Any, ids: torch.Tensor, length: int) -> list[Any]:
    found: list[Any] = []
    with torch.no_grad(), model.using("auto"):
        for some in ids.split(16):
            model(some[:, :length], use_cache=False)
            found += model.routes
    return found


def _accuracy(model: Any, texts: dict[str | None, torch.Tensor]) -> str:
    rows = []
    for name, ids in texts.items():
        right = [sum(route.donor == name for route in _routes(model, ids, length)) / len(ids) for length in _LENGTHS]
        rows.append([name or "general", *(f"{share:.1%}" for share in right)])
    return report.table(["rows that go where they belong, after", *(f"{n} tokens" for n in _LENGTHS)], rows)


def _unseen(model: Any, texts: dict[str, torch.Tensor]) -> str:
    rows = []
    for name, ids in texts.items():
        routes = Counter(route.donor or "recipient" for route in _routes(model, ids, _SEEN))
        ways = (_perplexity(model, ids, model.using(choice)) for choice in ((), "auto"))
        where = ", ".join(f"{donor} {count / len(ids):.0%}" for donor, count in routes.most_common())
        rows.append([name, where, *(f"{value:.1f}" for value in ways)])
    return report.table(["text of no donor", "goes to", "recipient", "routed"], rows)


# -- Speed ---------------------------------------------------------------------------------------------------------


def speed(options: argparse.Namespace, folder: Path) -> str:
    """Return the table of processor seconds, for a prompt of 128 tokens and for 16 tokens generated after it."""
    name, text = options.domain[0].split("=", 1)
    donor = Donor.from_pretrained(folder / name)
    names = [f"d{number}" for number in range(options.copies)]
    specs = [DonorSpec(str(folder / name), donor.position, name=one) for one in names]
    many = AutoModelWithTransplant.from_pretrained(options.recipient, donors=specs).eval()
    one = AutoModelWithTransplant.from_pretrained(options.recipient, donors=specs[:1]).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.recipient)
    ids = _spread(pack(text, tokenizer, _LENGTH, quiet=True), options.copies)
    ways: dict[str, Callable[[], tuple[Any, AbstractContextManager[None]]]] = {
        "one donor loaded, for all rows": lambda: (one, nullcontext()),
        "one donor loaded, chosen by itself": lambda: (one, one.using("auto", threshold=-1e9)),
        f"{options.copies} loaded, one for all rows": lambda: (many, many.using("d0")),
        f"{options.copies} loaded, another for each row": lambda: (many, many.using(rows=names)),
        f"{options.copies} loaded, none": lambda: (many, many.using(())),
        f"{options.copies} loaded, all for all rows": lambda: (many, nullcontext()),
    }
    seconds: dict[str, tuple[list[float], list[float]]] = {way: ([], []) for way in ways}
    for number in range(options.runs + 1):
        for way, make in ways.items():
            model, block = make()
            with block:
                prompt = _seconds(lambda: model(ids, use_cache=False))  # noqa: B023
                tokens = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
                whole = _seconds(lambda: model.generate(ids, **tokens))  # noqa: B023
            if number:
                seconds[way][0].append(prompt)
                seconds[way][1].append(whole - prompt)
    first = next(iter(seconds.values()))
    rows = []
    for way, found in seconds.items():
        cells = [f"{statistics.median(part):.3f}" for part in found]
        ratios = [f"{report.compare(part, reference).paired:.2f}" for part, reference in zip(found, first, strict=True)]
        rows.append([way, cells[0], ratios[0], cells[1], ratios[1]])
    return report.table([f"{len(ids)} rows", "prompt, s", "ratio", "16 tokens, s", "ratio"], rows)


@torch.no_grad()
def _seconds(call: Callable[[], Any]) -> float:
    began = time.process_time()
    call()
    return time.process_time() - began


if __name__ == "__main__":
    main()
