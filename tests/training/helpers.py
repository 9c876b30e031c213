"""Small trainings that take a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from tests.helpers import BUILDERS
from transplant_hf.texts import Blocks
from transplant_hf.training import DonorTrainer, DonorTrainingArguments

__all__ = ["StopAt", "arguments", "losses", "noise", "recipient", "trainer"]


def noise(count: int = 24, length: int = 16, seed: int = 0, name: str = "law") -> Blocks:
    """Blocks that can be learnt: each repeats a few tokens of its own alphabet."""
    generator = torch.Generator().manual_seed(seed)
    return Blocks(
        torch.randint(seed * 40, seed * 40 + 20, (count, length), generator=generator).to(torch.int32), name=name
    )


def recipient(family: str = "llama", **fields: Any) -> Any:
    """A tiny recipient."""
    return BUILDERS[family](seed=1, **fields)


def arguments(folder: Path, **fields: Any) -> DonorTrainingArguments:
    """Eight steps on the CPU, nothing shown."""
    known: dict[str, Any] = {
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "donor_layers": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return DonorTrainingArguments(str(folder), **{**known, **fields})


def trainer(folder: Path, model: Any = None, **fields: Any) -> DonorTrainer:
    """A trainer of a donor on noise."""
    given = {name: fields.pop(name) for name in ("train_dataset", "replay_dataset", "eval_dataset") if name in fields}
    given.setdefault("train_dataset", noise())
    return DonorTrainer(recipient() if model is None else model, arguments(folder, **fields), **given)


def losses(made: DonorTrainer) -> list[float]:
    """The loss of each step."""
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


class StopAt(TrainerCallback):
    """Stops a run after a step, as Ctrl-C does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        if state.global_step == self.step:
            raise KeyboardInterrupt
