"""The comparison: every method on the same text, at equal steps and at equal time, each at its best learning rate."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tqdm import tqdm

from ..donor import Donor
from ..errors import ConfigurationError
from ..model.memory import remove_transplants, transplant
from ..model.opening import load_model
from ..texts import Blocks
from ..training.data import as_blocks, model_and_tokenizer
from ..training.records import versions
from .methods import METHODS, Method, Setting
from .report import ComparisonReport, ComparisonRow
from .runs import Budget, Held, RunResult, measure, run_method

__all__ = ["compare", "compare_texts"]

_REFERENCE = "full"


def compare(
    recipient: Any,
    domain: Blocks,
    general: Blocks | None,
    held: Held,
    *,
    methods: Sequence[str] | None = None,
    learning_rates: Sequence[float] | None = None,
    steps: int = 200,
    batch: int = 8,
    shares: Sequence[float] = (0.0, 0.25),
    equal_time: bool = True,
    layers: int = 3,
    rank: int = 16,
    seed: int = 42,
    bf16: bool = False,
    quiet: bool = False,
    on_result: Callable[[RunResult], None] | None = None,
    **model_kwargs: Any,
) -> ComparisonReport:
    """Train donors, adapters and whole models on one text, and report what each learnt, forgot and cost.

    Learning rates are chosen by the perplexity on the domain's validation text; what is reported is measured on the
    test texts, at the chosen learning rate alone.

    Args:
        recipient: Hub id or folder; of a transplant, its recipient is taught, and its donors are one more control.
        domain: Text to learn.
        general: General text to replay.
        held: Text to measure on; its first name is the domain's, the second the general text's.
        methods: Names in `METHODS`; all by default.
        learning_rates: Instead of each method's own.
        steps: Optimizer steps.
        batch: Rows in each.
        shares: Shares of general text; each is a comparison of its own.
        equal_time: Also let each method train for as long as full fine-tuning took.
        layers: k.
        rank: Of LoRA.
        seed: Of everything.
        bf16: Train under bfloat16 autocast.
        quiet: Show no progress bar.
        on_result: Called with each result as it comes.
        **model_kwargs: As in `from_pretrained`.

    Returns:
        The report.

    Raises:
        ConfigurationError: Unknown methods, a share without general text, or equal time without full fine-tuning.
    """
    chosen = checked_methods(methods, equal_time, learning_rates, steps, batch, shares, layers, rank)
    if any(shares) and general is None:
        raise ConfigurationError(f"shares {list(shares)} of general text need general text to replay.")

    def load() -> Any:
        return remove_transplants(load_model(recipient, keep_replaced=True, **model_kwargs))

    setting = Setting(load, load().eval().requires_grad_(False), layers, rank, seed)
    if layers >= setting.count:
        raise ConfigurationError(f"layers={layers}, but {recipient} has {setting.count} layers; choose fewer.")
    rates = {method.name: tuple(learning_rates or method.learning_rates) for method in chosen}
    began = time.perf_counter()
    rows = _controls(setting, held, load_model(recipient, keep_replaced=True, **model_kwargs))
    runs: list[RunResult] = []
    total = len(shares) * (sum(map(len, rates.values())) + (len(chosen) - 1 if equal_time else 0))
    with tqdm(total=total, desc="Comparing", unit="run", disable=quiet) as progress:

        def run(method: Method, rate: float, budget: Budget) -> list[RunResult]:
            progress.set_postfix_str(f"{method.name}, lr {rate:g}, {budget.steps} steps")
            results = run_method(method, setting, rate, budget, domain, general, held)
            for result in results:
                runs.append(result)
                if on_result is not None:
                    on_result(result)
            progress.update()
            return results

        for share in shares:
            budget = Budget(steps, batch, share, seed, bf16)
            at_steps = {
                method.name: [result for rate in rates[method.name] for result in run(method, rate, budget)]
                for method in chosen
            }
            rows += _rows(chosen, at_steps, "steps")
            if equal_time:
                rows += _rows(chosen, _at_equal_time(chosen, at_steps, budget, run), "time")
    about = {
        "recipient": str(recipient),
        "steps": steps,
        "batch": batch,
        "layers": layers,
        "lora_rank": rank,
        "seed": seed,
        "bf16_autocast": bf16,
        "learning_rates": rates,
        "texts": {name: len(blocks) for name, blocks in held.test.items()},
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "seconds": round(time.perf_counter() - began, 1),
    }
    return ComparisonReport(tuple(rows), tuple(runs), about)


def checked_methods(
    methods: Sequence[str] | None = None,
    equal_time: bool = True,
    learning_rates: Sequence[float] | None = None,
    steps: int = 1,
    batch: int = 1,
    shares: Sequence[float] = (0.0,),
    layers: int = 1,
    rank: int = 1,
    **others: Any,
) -> list[Method]:
    """Return the methods that are compared, once all that they need is there: before the hours that they take.

    Raises:
        ConfigurationError: Unknown methods, a library that is missing, or a number out of range.
    """
    for name, least in (("steps", steps), ("batch", batch), ("layers", layers), ("rank", rank)):
        if least < 1:
            raise ConfigurationError(f"{name} must be at least 1, got {least}.")
    wrong = [rate for rate in learning_rates or () if not 0 < rate < math.inf]
    if wrong or (learning_rates is not None and not learning_rates):
        raise ConfigurationError(f"learning rates must be finite numbers above 0, got {learning_rates}.")
    if not shares or not all(0 <= share < 1 for share in shares):
        raise ConfigurationError(f"shares of general text must be at least 0 and below 1, got {list(shares)}.")
    names = list(METHODS) if methods is None else list(methods)
    unknown = [name for name in names if name not in METHODS]
    if unknown or not names:
        raise ConfigurationError(f"unknown methods {unknown}; known are {', '.join(METHODS)}.")
    if equal_time and _REFERENCE not in names:
        raise ConfigurationError(
            f"equal time is that of full fine-tuning: add {_REFERENCE!r} to the methods, or compare at equal "
            "steps only."
        )
    chosen = [METHODS[name] for name in names]
    lacking = [method for method in chosen if method.needs and importlib.util.find_spec(method.needs) is None]
    if lacking:
        without = " ".join(method.name for method in chosen if method not in lacking)
        raise ConfigurationError(
            f"comparing with {' and '.join(method.name for method in lacking)} needs {lacking[0].needs}: pip install "
            f"{lacking[0].needs}, or compare without: methods {without or 'donor'}."
        )
    return chosen


def _controls(setting: Setting, held: Held, loaded: Any) -> list[ComparisonRow]:
    """What there is before anything is learnt: the recipient, copies of its layers in it, and donors it came with."""
    position = setting.count - 1
    copied = Donor.from_model(setting.shared, list(range(position - setting.layers, position)), name="donor")
    known = {
        "recipient, untouched": setting.shared,
        "untrained copy": transplant(setting.shared, copied, position=position).eval(),
    }
    if getattr(loaded, "_transplant", None) is not None:
        known[f"with {', '.join(loaded.strengths)}, as it came"] = loaded.eval()
    return [
        ComparisonRow(
            label, "-", RunResult(label, "", 0, 0, 0, measure(model, held.validation), measure(model, held.test))
        )
        for label, model in known.items()
    ]


def _best(results: Sequence[RunResult]) -> RunResult:
    """The run that did best on the domain's validation text; failed ones only where nothing else is there."""
    well = [result for result in results if result.failed is None]
    if not well:
        return results[0]
    return min(well, key=lambda result: next(iter(result.validation.values())))


def _rows(methods: Sequence[Method], results: dict[str, list[RunResult]], budget: str) -> list[ComparisonRow]:
    rows = []
    for method in methods:
        of_method = results.get(method.name, [])
        for view in dict.fromkeys(result.view for result in of_method):
            best = _best([result for result in of_method if result.view == view])
            rows.append(ComparisonRow(f"{method.what}{f', {view}' if view else ''}", budget, best))
    return rows


def _at_equal_time(
    methods: Sequence[Method],
    at_steps: dict[str, list[RunResult]],
    budget: Budget,
    run: Callable[[Method, float, Budget], list[RunResult]],
) -> dict[str, list[RunResult]]:
    """Train each method, at its best learning rate, for the seconds that full fine-tuning took; the cache counts."""
    reference = _best(at_steps[_REFERENCE])
    results = {_REFERENCE: [reference]}
    for method in methods:
        best = _best(at_steps[method.name])
        if method.name == _REFERENCE or best.failed is not None or reference.failed is not None:
            continue
        steps = round(best.steps * max(reference.whole_seconds - best.cache_seconds, 0) / best.seconds)
        results[method.name] = run(method, best.learning_rate, dataclasses.replace(budget, steps=max(steps, 1)))
    return results


# Of its keyword arguments, those that are not for loading the model.
_OWN = frozenset(inspect.signature(compare).parameters)


def compare_texts(
    recipient: Any,
    text: Any,
    general: Any,
    *,
    tokenizer: Any = None,
    block_length: int | None = None,
    blocks: int | None = None,
    held_out_blocks: int = 192,
    revision: str | None = None,
    **kwargs: Any,
) -> ComparisonReport:
    """Cut two texts into training, validation and test parts (8 : 1 : 1, in this order) and compare on them.

    Args:
        recipient: Hub id or folder.
        text: The text to learn: a `TextSource`, a file or Hub id, or `Blocks`.
        general: General text, likewise.
        tokenizer: The recipient's; by default the one beside it.
        block_length: Tokens in a block.
        blocks: Train on so many blocks, evenly spread over the training part.
        held_out_blocks: Most blocks of each held-out part.
        revision: The recipient's revision.
        **kwargs: As in `compare`.

    Returns:
        The report.
    """
    checked_methods(**{name: value for name, value in kwargs.items() if name in _OWN})
    loading = {name: value for name, value in kwargs.items() if name not in _OWN}
    model, tokenizer, revision = model_and_tokenizer(recipient, tokenizer, revision, loading)
    whole = {
        name: as_blocks(data, model, tokenizer, block_length, name)
        for name, data in (("domain", text), ("general", general))
    }
    del model
    parts = {name: packed.split(8, 1, 1) for name, packed in whole.items()}
    held = Held(
        {name: part[1].part(0, held_out_blocks) for name, part in parts.items()},
        {name: part[2].part(-min(held_out_blocks, len(part[2]))) for name, part in parts.items()},
    )
    domain = parts["domain"][0]
    return compare(
        recipient,
        domain if blocks is None else _spread(domain, blocks),
        parts["general"][0],
        held,
        revision=revision,
        **kwargs,
    )


def _spread(blocks: Blocks, count: int) -> Blocks:
    """Take some blocks from everywhere: the beginning of a text is not like the rest of it."""
    if count >= len(blocks):
        return blocks
    chosen = torch.linspace(0, len(blocks) - 1, count).round().long()
    return Blocks(blocks.tokens[chosen], blocks.name)
