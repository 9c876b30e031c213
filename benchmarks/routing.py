"""Donors that choose themselves, and the cost of donors that each run on their own rows.

Quality: a donor is trained for each domain, where `train` puts it. Rows of held-out text go through the model with
`using("auto")`, and the tokens after the first 32 are measured beside other rules: the nearest signature, the signature
with the threshold 0, the lowest loss on the first 32 tokens, both also where the signature is sure, and each donor
chosen by hand.
Speed: copies of one donor, of which each row of a batch uses another one, in processor seconds of one thread.

    python benchmarks/routing.py --recipient FOLDER --domain shakespeare=shakespeare.txt --domain python=python.txt \
        --general wikitext-2-valid.txt --general-test wikitext-2-test.txt --unseen licenses=licenses.txt
"""

from __future__ import annotations

import argparse
import statistics
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

from transplant_hf import AutoModelWithTransplant, Donor, DonorSpec, train
from transplant_hf.donor.signature import Discriminant, Signature, describe_rows
from transplant_hf.model.routing import odds_of
from transplant_hf.partial import hidden_states
from transplant_hf.texts import Blocks, pack

_SEEN = 32  # tokens that the router looks at
_LENGTHS = (8, 16, 32, 64)


def main() -> None:
    """Measure both and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipient", required=True, help="Hub id or folder")
    parser.add_argument("--domain", action="append", required=True, metavar="NAME=TEXT", help="text of a donor")
    parser.add_argument("--general", required=True, help="general text to sign with and to replay")
    parser.add_argument("--general-test", required=True, help="general text to measure on")
    parser.add_argument("--unseen", action="append", default=[], metavar="NAME=TEXT", help="text of no donor")
    parser.add_argument("--folder", type=Path, help="keep donors here; those that are there are not trained again")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--length", type=int, default=128, help="tokens in a row (default: 128)")
    parser.add_argument("--blocks", type=int, help="rows to read of each text (default: all)")
    parser.add_argument(
        "--rows", type=int, default=128, help="held-out rows of each text (default: 128); 0: speed alone"
    )
    parser.add_argument("--copies", type=int, default=8, help="donors in the measurement of speed (default: 8)")
    parser.add_argument("--runs", type=int, default=5, help="rounds of the measurement of speed; 0 for none")
    options = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    print(report.header(report.facts(1)), end="\n\n")
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        if options.rows:
            print(*quality(options, folder), sep="\n\n", end="\n\n", flush=True)
        if options.runs:
            print(speed(options, folder))


# -- Quality -------------------------------------------------------------------------------------------------------


def quality(options: argparse.Namespace, folder: Path) -> list[str]:
    """Return the tables of perplexity, of accuracy by length, and of text of no donor."""
    tokenizer = AutoTokenizer.from_pretrained(options.recipient)

    def packed(text: Any) -> Blocks:
        return pack(text, tokenizer, options.length, options.blocks, quiet=True)

    general, held = packed(options.general), {}
    specs = []
    for name, text in (one.split("=", 1) for one in options.domain):
        learned, held[name] = packed(text).split(9, 1)
        if not (folder / name).is_dir():
            arguments = {"max_steps": options.steps, "per_device_train_batch_size": 8, "disable_tqdm": True}
            train(options.recipient, learned, folder / name, general=general, **arguments)
        position = Donor.from_pretrained(folder / name).position
        specs.append(DonorSpec(str(folder / name), position, name=name))
    model = AutoModelWithTransplant.from_pretrained(options.recipient, donors=specs).eval()
    held[None] = packed(options.general_test)
    unseen = {name: packed(text) for name, text in (one.split("=", 1) for one in options.unseen)}
    found = {name: _Measured(model, _spread(blocks, options.rows)) for name, blocks in (held | unseen).items()}
    of_domains = {name: found[name] for name in held}
    return [
        _perplexities(model, of_domains),
        _accuracy(model, of_domains),
        _open_set({name: found[name] for name in unseen}),
    ]


def _spread(blocks: Blocks, count: int) -> torch.Tensor:
    numbers = torch.linspace(0, len(blocks) - 1, min(count, len(blocks))).long()
    return blocks.tokens[numbers].long()


class _Measured:
    """What every way to choose a donor costs rows of text.

    Args:
        model: The model with all donors.
        ids: `[rows, tokens]`.
    """

    def __init__(self, model: Any, ids: torch.Tensor) -> None:
        self.ids, self.names = ids, (*model.strengths, None)
        ways = [() if name is None else name for name in self.names]
        self.losses = torch.stack([_losses(model, ids, model.using(way)) for way in ways], 1)  # [rows, ways, tokens]
        routes = [route.donor for route in _routes(model, ids, _SEEN)]
        self.routed = torch.tensor([self.names.index(name) for name in routes])
        signatures = [Donor.from_pretrained(spec.donor).record.signature for spec in model.transplant_config.donors]
        read = [Signature.from_dict(one or {}, "a donor") for one in signatures]
        with torch.no_grad(), model.disable_transplants():
            states = [hidden_states(model, some, [read[0].position])[read[0].position] for some in ids.split(16)]
        # By the signatures alone, as logarithms of odds against general text.
        self.odds, self._unsure, self._excess = odds_of(Discriminant(read), describe_rows(torch.cat(states)))

    @property
    def choices(self) -> dict[str, torch.Tensor]:
        """The number of the chosen way for each row, by rule."""
        none = torch.zeros(len(self.ids), 1)
        capped = self.odds - self._excess
        losses = self.losses[:, :, : _SEEN - 1].sum(2)
        return {
            "nearest": self.odds.argmax(1),
            "signature": torch.cat([self.odds, none], 1).argmax(1),
            "loss": losses.argmin(1),
            "both": (torch.cat([capped, none], 1) - losses).argmax(1),
            "routed": self.routed,
        }

    @property
    def sure(self) -> float:
        """The share of rows whose signatures decide alone."""
        return float((~self._unsure).float().mean())

    def perplexity(self, chosen: torch.Tensor) -> float:
        """Of the tokens after those that the router looks at."""
        return float(self.losses[torch.arange(len(chosen)), chosen, _SEEN - 1 :].mean().exp())

    def always(self, name: str | None) -> float:
        """The perplexity with one donor, or none, for all rows."""
        return self.perplexity(torch.full((len(self.ids),), self.names.index(name)))

    @property
    def best(self) -> float:
        """The perplexity if each row knew what comes."""
        return self.perplexity(self.losses[:, :, _SEEN - 1 :].mean(2).argmin(1))


@torch.no_grad()
def _losses(model: Any, ids: torch.Tensor, block: AbstractContextManager[None]) -> torch.Tensor:
    """The loss of each token but the first, `[rows, tokens - 1]`."""
    with block:
        found = []
        for some in ids.split(16):
            logits = model(some, use_cache=False).logits[:, :-1].float()
            found.append(torch.nn.functional.cross_entropy(logits.transpose(1, 2), some[:, 1:], reduction="none"))
    return torch.cat(found)


def _routes(model: Any, ids: torch.Tensor, length: int) -> list[Any]:
    found: list[Any] = []
    with torch.no_grad(), model.using("auto"):
        for some in ids.split(16):
            model(some[:, :length], use_cache=False)
            found += model.routes
    return found


def _perplexities(model: Any, texts: dict[str | None, _Measured]) -> str:
    rows = []
    for name, found in texts.items():
        stacked = _losses(model, found.ids, model.using(list(model.strengths)))[:, _SEEN - 1 :].mean().exp()
        ways = [f"{found.always(way):.2f}" for way in (None, *found.names[:-1])]
        rules = [f"{found.perplexity(chosen) / found.always(name):.4f}" for chosen in found.choices.values()]
        rows.append([name or "general", *ways, f"{float(stacked):.2f}", *rules[1:]])
    names = [f"donor {name}" for name in found.names[:-1]]
    rules = [f"{rule} / by hand" for rule in ("signature", "loss", "both", "routed")]
    return report.table(["text", "recipient", *names, "stacked", *rules], rows)


def _accuracy(model: Any, texts: dict[str | None, _Measured]) -> str:
    rows = []
    lengths = [length for length in _LENGTHS if length <= next(iter(texts.values())).ids.shape[1]]
    for name, found in texts.items():
        routes = [_routes(model, found.ids, length) for length in lengths]
        right = [sum(route.donor == name for route in some) / len(some) for some in routes]
        rows.append([name or "general", *(f"{share:.1%}" for share in right), f"{found.sure:.1%}"])
    lengths_seen = (f"{n} tokens" for n in lengths)
    return report.table(["rows that go where they belong, after", *lengths_seen, f"sure after {_SEEN}"], rows)


def _open_set(texts: dict[str, _Measured]) -> str:
    rows = []
    for name, found in texts.items():
        routes = Counter(found.names[number] or "recipient" for number in found.routed.tolist())
        where = ", ".join(f"{donor} {count / len(found.ids):.0%}" for donor, count in routes.most_common())
        rules = [f"{found.perplexity(chosen):.1f}" for chosen in found.choices.values()]
        rows.append([name, f"{found.always(None):.1f}", *rules, f"{found.best:.1f}", f"{found.sure:.0%}", where])
    rules = ["nearest", "signature", "loss", "both", "routed", "best", "sure"]
    return report.table(["text of no donor", "recipient", *rules, "routed to"], rows)


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
    ids = _spread(pack(text, tokenizer, options.length, options.blocks, quiet=True), options.copies)
    ways: dict[str, Callable[[], tuple[Any, AbstractContextManager[None]]]] = {
        "one donor loaded, for all rows": lambda: (one, nullcontext()),
        "one donor loaded, chosen by itself": lambda: (one, one.using("auto")),
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
