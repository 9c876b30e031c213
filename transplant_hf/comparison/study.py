"""The comparison: every method on the same text, at equal steps and at equal time, each at its best learning rate."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..display import progress_bar
from ..donor import Donor
from ..errors import ConfigurationError
from ..model.in_memory import remove_transplants, transplant
from ..model.load_any_model import load_model
from ..texts import Blocks
from ..texts.documents import check_texts
from ..training.data import as_blocks, model_and_tokenizer
from ..training.records import versions
from .methods import METHODS, Method, Setting, on_grid
from .report import ComparisonReport, ComparisonRow, Runs, check_comparison_folder
from .runs import Budget, RunResult, Texts, measure, run_method

__all__ = ["compare", "split_texts"]

_MOST_RATES = 6  # for one method
_REFERENCE = "full"  # its time is the time of the comparison at equal time
_OLD_NAMES = {"batch": "batch_size", "shares": "replay_shares"}
_Run = Callable[[Method, float, Budget], list[RunResult]]


def compare(
    recipient: Any,
    text: Any,
    general: Any,
    *,
    others: Sequence[Any] = (),
    output: Path | str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    methods: Sequence[str] | None = None,
    learning_rates: Sequence[float] | None = None,
    steps: int = 200,
    batch_size: int = 8,
    replay_shares: Sequence[float] = (0.0, 0.25),
    equal_time: bool = True,
    layers: int = 3,
    rank: int = 16,
    seed: int = 42,
    bf16: bool = False,
    block_length: int | None = None,
    blocks: int | None = None,
    held_out_blocks: int = 192,
    tokenizer: Any = None,
    revision: str | None = None,
    quiet: bool = False,
    **kwargs: Any,
) -> ComparisonReport:
    """Train donors, adapters and whole models on one text, and report what each learned, forgot and cost.

    Both texts are cut 8 : 1 : 1 into training, validation and test parts, in this order. Learning rates are chosen by
    the perplexity on the domain's validation part; the reported numbers are measured on the test parts, at the chosen
    learning rate alone.

    Args:
        recipient: Hub id or folder; of a transplant, its recipient is trained, and its donors are one more control.
        text: The text to learn: a `TextSource`, a file, a Hub id or `Blocks`.
        general: General text to replay and to measure forgetting on, in the same forms.
        others: Texts that nobody trains on or replays, to measure forgetting on, in the same forms.
        output: A folder for `comparison.json`, `comparison.txt`, and one JSON file in `runs/` as each run ends.
        overwrite: Replace an earlier comparison in that folder.
        resume: Use the runs that are in that folder, measured with the same setup, instead of making them again.
        methods: Names in `METHODS`; all by default.
        learning_rates: Learning rates to try, the same for all methods. By default each method starts at its own, and
            tries neighbors, a factor of about 3 away, until both neighbors of the best are known, up to six rates.
        steps: Optimizer steps.
        batch_size: Blocks in a step.
        replay_shares: Shares of general text in a batch; each is a comparison of its own.
        equal_time: Also let each method train for as long as full fine-tuning took.
        layers: k.
        rank: The rank of LoRA.
        seed: The seed of weights and of the order of the text.
        bf16: Train under bfloat16 autocast.
        block_length: Tokens in a block; by default what the recipient can read, at most 1024.
        blocks: Train on this many blocks, evenly spread over the training part; by default all.
        held_out_blocks: The largest number of blocks of each held-out part.
        tokenizer: The recipient's tokenizer; by default the one beside it.
        revision: The recipient's revision.
        quiet: Show no progress bar, and print no results of runs.
        **kwargs: As in `from_pretrained`.

    Returns:
        The report.

    Raises:
        ConfigurationError: Unknown methods, a missing library, a number out of range, or an output that is not empty.
        DataError: Text that is missing or too short.
    """
    for old in set(_OLD_NAMES) & set(kwargs):
        warnings.warn(f"{old}= is called {_OLD_NAMES[old]}= now.", FutureWarning, stacklevel=2)
    batch_size, replay_shares = kwargs.pop("batch", batch_size), kwargs.pop("shares", replay_shares)
    chosen = _check(methods, equal_time, learning_rates, replay_shares)
    for name, count in (("steps", steps), ("batch_size", batch_size), ("layers", layers), ("rank", rank)):
        if count < 1:
            raise ConfigurationError(f"{name} must be at least 1, got {count}.")
    if output is not None:
        check_comparison_folder(Path(output), overwrite or resume)
    check_texts(text, general, *others)
    began = time.perf_counter()
    model, tokenizer, revision = model_and_tokenizer(recipient, tokenizer, revision, kwargs)
    texts = split_texts(text, general, others, model, tokenizer, block_length, blocks, held_out_blocks)

    def load() -> Any:
        return remove_transplants(load_model(recipient, revision=revision, keep_replaced=True, **kwargs))

    setting = Setting(load, load().eval().requires_grad_(False), layers, rank, seed)
    if layers >= setting.count:
        raise ConfigurationError(
            f"layers={layers}, but {recipient} has {setting.count} layers; choose fewer (--count)."
        )
    setup = {
        "recipient": str(recipient),
        "revision": revision,
        "text_sha256": [texts.domain.fingerprint, texts.general.fingerprint],
        "batch_size": batch_size,
        "layers": layers,
        "lora_rank": rank,
        "bf16_autocast": bf16,
    }
    runs = Runs(None if output is None else Path(output), setup, resume)
    rows = _controls(setting, texts, model)
    untouched = rows[0].result.test
    total = len(replay_shares) * (len(chosen) * len(learning_rates or range(3)) + (len(chosen) - 1) * equal_time)
    with progress_bar(total, "Comparing", unit="run", quiet=quiet) as bar:

        def run(method: Method, rate: float, budget: Budget) -> list[RunResult]:
            bar.set_postfix_str(f"{method.name}, lr {rate:g}, {budget.steps} steps")
            key = (method.name, rate, budget.steps, budget.replay_share, seed)
            if not runs.find(key):
                runs.add(run_method(method, setting, rate, budget, texts, untouched))
                for result in runs.find(key) if runs.folder is None and not quiet else ():
                    bar.write(_line(result), file=sys.stderr)
            bar.update()
            return runs.find(key)

        for share in replay_shares:
            budget = Budget(steps, batch_size, share, seed, bf16)
            at_steps: dict[str, list[RunResult]] = {}
            for method in chosen:
                tried = learning_rates or [method.first_learning_rate(setting.shared)]
                results = [result for rate in tried for result in run(method, rate, budget)]
                while not learning_rates and (following := _next_rate(results)) is not None:
                    results += run(method, following, budget)
                at_steps[method.name] = results
            rows += _rows(chosen, at_steps, "steps")
            if equal_time:
                rows += _rows(chosen, _at_equal_time(chosen, at_steps, budget, run), "time")
    about = {
        **setup,
        "seed": seed,
        "steps": steps,
        "learning_rates": {
            method.name: sorted({run.learning_rate for run in runs.all if run.method == method.name})
            for method in chosen
        },
        "texts": {name: len(part) for name, part in texts.test.items()},
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "seconds": round(time.perf_counter() - began, 1),
    }
    report = ComparisonReport(tuple(rows), runs.all, about)
    if output is not None:
        report.save(Path(output), overwrite=True)  # its own runs are there
    return report


def _check(
    methods: Sequence[str] | None,
    equal_time: bool,
    learning_rates: Sequence[float] | None,
    replay_shares: Sequence[float],
) -> list[Method]:
    """Return the methods, after a check that everything they need is there: before hours of work."""
    wrong = [rate for rate in learning_rates or () if not 0 < rate < math.inf]
    if wrong or (learning_rates is not None and not learning_rates):
        raise ConfigurationError(f"learning rates must be finite numbers above 0, got {learning_rates}.")
    if not replay_shares or not all(0 <= share < 1 for share in replay_shares):
        raise ConfigurationError(f"shares of general text must be at least 0 and below 1, got {list(replay_shares)}.")
    names = list(METHODS) if methods is None else list(methods)
    unknown = [name for name in names if name not in METHODS]
    if unknown or not names:
        raise ConfigurationError(f"unknown methods {unknown}; known are {', '.join(METHODS)}.")
    if equal_time and _REFERENCE not in names:
        raise ConfigurationError(
            f"equal time is that of full fine-tuning: add {_REFERENCE!r} to the methods, or compare at equal steps "
            "only, with equal_time=False (--no-equal-time)."
        )
    chosen = [METHODS[name] for name in names]
    missing = [method for method in chosen if method.needs and importlib.util.find_spec(method.needs) is None]
    if missing:
        others = " ".join(method.name for method in chosen if method not in missing)
        raise ConfigurationError(
            f"comparing with {' and '.join(method.name for method in missing)} needs {missing[0].needs}: pip install "
            f"{missing[0].needs}, or compare without: methods {others or 'donor'}."
        )
    return chosen


def split_texts(
    text: Any,
    general: Any,
    others: Sequence[Any],
    model: Any,
    tokenizer: Any,
    block_length: int | None,
    blocks: int | None,
    held_out: int,
) -> Texts:
    """Cut the two texts into training, validation and test parts; the others are for the test."""
    parts = {
        name: as_blocks(data, model, tokenizer, block_length, name).split(8, 1, 1)
        for name, data in (("domain", text), ("general", general))
    }
    domain = parts["domain"][0]
    if blocks is not None and blocks < len(domain):
        # From the whole text: its beginning differs from the rest.
        chosen = torch.linspace(0, len(domain) - 1, blocks).round().long()
        domain = Blocks(domain.tokens[chosen], domain.name)
    test = {name: test.part(-min(held_out, len(test))) for name, (_, _, test) in parts.items()}
    for number, data in enumerate(others):
        unseen = as_blocks(data, model, tokenizer, block_length, f"other text {number + 1}")
        if unseen.name in test:
            raise ConfigurationError(f"two texts to measure on are called {unseen.name!r}; give one another name.")
        test[unseen.name] = unseen.part(-min(held_out, len(unseen)))
    return Texts(domain, parts["general"][0], parts["domain"][1].part(0, held_out), test)


def _controls(setting: Setting, texts: Texts, loaded: Any) -> list[ComparisonRow]:
    """What is measured without training: the recipient, copies of its layers in it, and donors it came with."""
    position = setting.count - 1
    copied = Donor.from_model(setting.shared, list(range(position - setting.layers, position)), name="donor")
    models = {
        "recipient, untouched": setting.shared,
        "untrained copy": transplant(setting.shared, copied, position=position).eval(),
    }
    if getattr(loaded, "strengths", None):
        models[f"with {', '.join(loaded.strengths)}, as loaded"] = loaded.eval()
    return [
        ComparisonRow(label, "-", RunResult(label, "", 0, 0, 0, test=measure(model, texts.test)))
        for label, model in models.items()
    ]


def _best(results: Sequence[RunResult]) -> RunResult:
    """The best run on the validation text, in a method's usual view; a failed one only where there is no other."""
    usual = [result for result in results if result.view == results[0].view]
    succeeded = [result for result in usual if result.failed is None]
    return min(succeeded, key=lambda result: result.validation, default=usual[-1])


def _next_rate(results: Sequence[RunResult]) -> float | None:
    """The next learning rate to try: a neighbor of the best so far, until both neighbors are known."""
    best, tried = _best(results).learning_rate, {result.learning_rate for result in results}
    missing = [rate for rate in (on_grid(best, -1), on_grid(best, 1)) if rate not in tried]
    return missing[0] if missing and len(tried) < _MOST_RATES else None


def _rows(methods: Sequence[Method], results: dict[str, list[RunResult]], budget: str) -> Iterator[ComparisonRow]:
    for method in methods:
        of_method = results.get(method.name, [])
        for view in dict.fromkeys(result.view for result in of_method):
            best = _best([result for result in of_method if result.view == view])
            yield ComparisonRow(f"{method.what}{f', {view}' if view else ''}", budget, best)


def _at_equal_time(
    methods: Sequence[Method], at_steps: dict[str, list[RunResult]], budget: Budget, run: _Run
) -> dict[str, list[RunResult]]:
    """Train each method at its best learning rate for the seconds of full fine-tuning; the cache counts."""
    reference = _best(at_steps[_REFERENCE])
    results = {_REFERENCE: [reference]}
    for method in methods:
        best = _best(at_steps[method.name])
        if method.name == _REFERENCE or best.failed is not None or reference.failed is not None:
            continue
        steps = round(best.steps * max(reference.whole_seconds - best.cache_seconds, 0) / best.seconds)
        results[method.name] = run(method, best.learning_rate, dataclasses.replace(budget, steps=max(steps, 1)))
    return results


def _line(result: RunResult) -> str:
    found = result.failed or ", ".join(f"{text} {value:.2f}" for text, value in result.test.items())
    name = ", ".join(filter(None, (result.method, result.view)))
    return f"{name}, replay {result.replay_share:g}, lr {result.learning_rate:g}, {result.steps} steps: {found}"
