"""One run of the comparison: a method, a learning rate and a number of steps; trained, measured, weighed."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments

from ..errors import TrainingError
from ..evaluation import perplexity
from ..texts import Blocks
from ..training import CachePlan, PartTrainer, Rows
from .methods import Method, Prepared, Setting

__all__ = ["Budget", "Held", "RunResult", "Trained", "measure", "run_method", "train_once"]


@dataclasses.dataclass(frozen=True)
class Held:
    """Text that is only measured on.

    Args:
        validation: `{name: blocks}`, on which learning rates are chosen.
        test: The same names, which are reported.
    """

    validation: Mapping[str, Blocks]
    test: Mapping[str, Blocks]


@dataclasses.dataclass(frozen=True)
class Budget:
    """How long a run is and what it reads.

    Args:
        steps: Optimizer steps.
        batch: Rows in each.
        share: The share of general text.
        seed: Of the order of the rows.
        bf16: Whether to train under bfloat16 autocast.
    """

    steps: int
    batch: int = 8
    share: float = 0.0
    seed: int = 0
    bf16: bool = False


@dataclasses.dataclass(frozen=True)
class RunResult:
    """What one run gave, in one view.

    Args:
        method: The method's name.
        view: How it was measured.
        learning_rate: Of the run.
        steps: The same.
        share: The share of general text.
        validation: Perplexity by name of text.
        test: The same.
        seconds: Of training, the cache left out.
        cache_seconds: Of computing hidden states before the part.
        trainable: How many numbers were trained.
        artefact_bytes: What the method ships.
        removal_error: Largest difference of a logit from the untouched recipient's after removal; `None` where there
            is no way back.
        failed: Why there are no numbers.
    """

    method: str
    view: str
    learning_rate: float
    steps: int
    share: float
    validation: Mapping[str, float]
    test: Mapping[str, float]
    seconds: float = 0.0
    cache_seconds: float = 0.0
    trainable: int = 0
    artefact_bytes: int = 0
    removal_error: float | None = None
    failed: str | None = None

    @property
    def whole_seconds(self) -> float:
        """Training and cache together."""
        return self.seconds + self.cache_seconds


class _Clock(TrainerCallback):
    """Measures the steps alone."""

    def __init__(self) -> None:
        self.began = self.seconds = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds = time.perf_counter() - self.began


@dataclasses.dataclass(frozen=True)
class Trained:
    """What training once took.

    Args:
        seconds: Of the steps.
        cache_seconds: Of hidden states before the part.
        trainable: How many numbers were trained.
    """

    seconds: float
    cache_seconds: float
    trainable: int


def train_once(
    prepared: Prepared,
    folder: str,
    learning_rate: float,
    budget: Budget,
    domain: Blocks,
    general: Blocks | None,
    *,
    cache: str = "memory",
    quiet: bool = True,
) -> Trained:
    """Train a prepared model.

    Args:
        prepared: The model and the part of it that learns.
        folder: Where the trainer may write.
        learning_rate: The peak.
        budget: How long.
        domain: Text to learn.
        general: Text to replay.
        cache: Where hidden states before the part are kept.
        quiet: Show no progress bar.

    Raises:
        TrainingError: The loss is not finite.
    """
    clock = _Clock()
    trainer = PartTrainer(
        prepared.model,
        _arguments(folder, learning_rate, budget, quiet),
        Rows(domain, budget.steps * budget.batch, general, budget.share, budget.seed),
        part=prepared.part,
        inner=prepared.inner,
        cache=CachePlan(cache, folder=Path(folder, "prefix-cache")),
        callbacks=[clock],
    )
    trainable = trainer.trainable_parameters
    trainer.train()
    return Trained(clock.seconds, trainer.cache_seconds, trainable)


def run_method(
    method: Method,
    setting: Setting,
    learning_rate: float,
    budget: Budget,
    domain: Blocks,
    general: Blocks | None,
    held: Held,
) -> list[RunResult]:
    """Train once and measure every view.

    Args:
        method: The method.
        setting: What methods share.
        learning_rate: The peak.
        budget: How long.
        domain: Text to learn.
        general: Text to replay.
        held: Text to measure on.

    Returns:
        One result for each view; with `failed` where the loss was not finite.
    """
    prepared = method.prepare(setting)
    known: dict[str, Any] = {
        "method": method.name,
        "learning_rate": learning_rate,
        "steps": budget.steps,
        "share": budget.share,
    }
    with tempfile.TemporaryDirectory() as folder:
        try:
            trained = train_once(prepared, folder, learning_rate, budget, domain, general)
        except TrainingError as error:
            return [RunResult(view=view, validation={}, test={}, failed=str(error), **known) for view in prepared.views]
        prepared.save(Path(folder, "artefact"))
        known |= {
            **dataclasses.asdict(trained),
            "artefact_bytes": _weight_bytes(Path(folder, "artefact")),
            "removal_error": _removal_error(prepared, setting, held),
        }
    results = []
    for view, opened in prepared.views.items():
        with opened() as model:
            validation, test = measure(model, held.validation), measure(model, held.test)
        results.append(RunResult(view=view, validation=validation, test=test, **known))
    return results


def measure(model: Any, texts: Mapping[str, Blocks]) -> dict[str, float]:
    """Return a model's perplexity on each text."""
    return {name: perplexity(model, blocks, quiet=True).value for name, blocks in texts.items()}


def _arguments(folder: str, learning_rate: float, budget: Budget, quiet: bool) -> TrainingArguments:
    return TrainingArguments(
        folder,
        max_steps=budget.steps,
        per_device_train_batch_size=budget.batch,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        save_strategy="no",
        logging_steps=50,
        seed=budget.seed,
        bf16=budget.bf16,
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=quiet,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


@torch.no_grad()
def _removal_error(prepared: Prepared, setting: Setting, held: Held) -> float | None:
    """How far the logits are from the recipient's once what was learnt is taken out again."""
    if prepared.removed is None:
        return None
    blocks = next(iter(held.test.values()))
    ids = blocks[0]["input_ids"][None].to(setting.shared.device)
    wanted = setting.shared.eval()(input_ids=ids, use_cache=False).logits
    with prepared.removed() as model:
        found = model.eval()(input_ids=ids, use_cache=False).logits
    return float((found - wanted).abs().max())
