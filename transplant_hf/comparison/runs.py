"""One run of the comparison: a method, a learning rate and a number of steps; trained and measured."""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments

from ..architecture import eval_mode
from ..errors import TrainingError
from ..evaluation import perplexity
from ..evaluation.models_and_texts import untouched
from ..texts import Blocks
from ..training import CachePlan, PartTrainer, Rows
from .methods import Method, Prepared, Setting

__all__ = ["Budget", "RunResult", "Texts", "measure", "run_method", "train_once"]

PARTIAL_STRENGTH = 0.75  # each method is also measured with this share of what it learned
_AT_PARTIAL_STRENGTH = f"at {PARTIAL_STRENGTH:g}"


@dataclasses.dataclass(frozen=True)
class Texts:
    """The texts of a comparison as blocks."""

    domain: Blocks  # to learn
    general: Blocks  # to replay
    validation: Blocks  # of the domain, on which learning rates are chosen
    test: Mapping[str, Blocks]  # "domain", "general" and other texts, for the reported numbers


@dataclasses.dataclass(frozen=True)
class Budget:
    """How long a run is, and what it reads."""

    steps: int
    batch_size: int = 8
    replay_share: float = 0.0  # of general text
    seed: int = 42  # of the order of the rows
    bf16: bool = False  # whether to train under bfloat16 autocast


@dataclasses.dataclass(frozen=True)
class RunResult:
    """The result of one run, in one view.

    Args:
        method: The method's name.
        view: Which model was measured, for methods with several.
        learning_rate: The peak.
        steps: Optimizer steps.
        replay_share: The share of general text.
        seed: The seed of the run.
        validation: Perplexity of the domain's validation text.
        test: Perplexity by name of text.
        gain: How much lower the loss on the domain's test text is than the untouched recipient's, in nats.
        forgetting: How much higher the loss on the general test text is than the untouched recipient's, in nats.
        forgetting_on: The same for each text that was not trained on, by name.
        seconds: The time of training, without the cache; on a CPU, processor time, which other programs do not change.
        cache_seconds: The time of computing hidden states before the part, in the same way.
        peak_memory_bytes: Peak memory of an accelerator in training; `None` on the CPU.
        trainable_parameters: How many numbers were trained.
        artifact_bytes: The size of the method's weight files.
        removal_error: Largest difference of a logit from the untouched recipient's after removal; `None` where the
            change cannot be removed.
        failed: Why there are no numbers.
    """

    method: str
    view: str
    learning_rate: float
    steps: int
    replay_share: float
    seed: int = 42
    validation: float = math.inf
    test: Mapping[str, float] = dataclasses.field(default_factory=dict)
    gain: float | None = None
    forgetting: float | None = None
    forgetting_on: Mapping[str, float] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    cache_seconds: float = 0.0
    peak_memory_bytes: int | None = None
    trainable_parameters: int = 0
    artifact_bytes: int = 0
    removal_error: float | None = None
    failed: str | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """What is equal in all views of one training, and in no other."""
        return self.method, self.learning_rate, self.steps, self.replay_share, self.seed

    @property
    def curve(self) -> str:
        """The method, and the view where it is not a share of what the method learned."""
        return ", ".join(filter(None, (self.method, "" if self.view == _AT_PARTIAL_STRENGTH else self.view)))

    @property
    def most_forgotten(self) -> float:
        """How much higher the loss is on the other text where it rose most, in nats."""
        return max(self.forgetting_on.values())

    @property
    def whole_seconds(self) -> float:
        """Training and cache together."""
        return self.seconds + self.cache_seconds


class _Clock(TrainerCallback):
    """Measures the steps, and what comes before them, alone."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now, self.began = now, now()
        self.before = self.seconds = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before = self.now() - self.began

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds = self.now() - self.began - self.before


def train_once(
    prepared: Prepared,
    folder: str,
    learning_rate: float,
    budget: Budget,
    domain: Blocks,
    general: Blocks | None,
    *,
    cache: str = "memory",
) -> dict[str, Any]:
    """Train a prepared model, and return the costs by their names in `RunResult`."""
    cuda = torch.cuda.is_available()
    args = TrainingArguments(
        folder,
        max_steps=budget.steps,
        per_device_train_batch_size=budget.batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        save_strategy="no",
        logging_steps=50,
        seed=budget.seed,
        bf16=budget.bf16,
        use_cpu=not cuda,
        disable_tqdm=True,
        dataloader_pin_memory=cuda,
    )
    clock = _Clock(time.perf_counter if cuda else time.process_time)
    trainer = PartTrainer(
        prepared.model,
        args,
        Rows(domain, budget.steps * budget.batch_size, general, budget.replay_share, budget.seed),
        part=prepared.part,
        inner=prepared.inner,
        cache=CachePlan(cache, folder=Path(folder, "prefix-cache")),
        callbacks=[clock],
    )
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    clock.began = clock.now()
    trainer.train()
    return {
        "seconds": clock.seconds,
        "cache_seconds": clock.before if trainer.cache_seconds else 0.0,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "trainable_parameters": trainer.trainable_parameters,
    }


def run_method(
    method: Method, setting: Setting, learning_rate: float, budget: Budget, texts: Texts, untouched: Mapping[str, float]
) -> list[RunResult]:
    """Train once and measure every view."""
    prepared = method.prepare(setting)
    known: dict[str, Any] = {"method": method.name, "learning_rate": learning_rate}
    known |= {"steps": budget.steps, "replay_share": budget.replay_share, "seed": budget.seed}
    with tempfile.TemporaryDirectory() as folder:
        try:
            known |= train_once(prepared, folder, learning_rate, budget, texts.domain, texts.general)
        except TrainingError as error:
            return [RunResult(view=view, failed=str(error), **known) for view in prepared.views]
        prepared.save(Path(folder, "artifact"))
        files = Path(folder, "artifact").rglob("*.safetensors")
        known |= {"artifact_bytes": sum(path.stat().st_size for path in files)}
    known["removal_error"] = _removal_error(prepared, setting, texts)
    views = dict(prepared.views)
    if prepared.at_strength is not None:
        views[_AT_PARTIAL_STRENGTH] = partial(prepared.at_strength, PARTIAL_STRENGTH)
    results = []
    for view, enter in views.items():
        with enter() as model:
            validation, test = perplexity(model, texts.validation, quiet=True).value, measure(model, texts.test)
        lost = {name: math.log(test[name] / untouched[name]) for name in test}
        known |= {"validation": validation, "test": test, "gain": -lost.pop("domain")}
        results.append(RunResult(view=view, forgetting=lost.get("general"), forgetting_on=lost, **known))
    return results


def measure(model: Any, texts: Mapping[str, Blocks]) -> dict[str, float]:
    """Return a model's perplexity on each text."""
    return {name: perplexity(model, blocks, quiet=True).value for name, blocks in texts.items()}


def _removal_error(prepared: Prepared, setting: Setting, texts: Texts) -> float | None:
    """How far the logits are from the recipient's after what was learned is removed again."""
    if not prepared.removable:
        return None
    ids = texts.test["domain"][0]["input_ids"][None].to(setting.shared.device)
    with eval_mode(setting.shared):
        wanted = setting.shared(input_ids=ids, use_cache=False).logits
    with untouched(prepared.model), eval_mode(prepared.model):
        found = prepared.model(input_ids=ids, use_cache=False).logits
    return float((found - wanted).abs().max())
