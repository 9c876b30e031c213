"""What made a donor: recorded in its metadata, so that it can be made again."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import transformers

from .. import __version__

if TYPE_CHECKING:
    from .donor_trainer import DonorTrainer

__all__ = ["note_in_donors", "record_of_making", "versions"]

_ARGUMENTS = (
    "method",
    "mode",
    "init",
    "learning_rate",
    "weight_decay",
    "warmup_steps",
    "max_grad_norm",
    "distillation",
    "seed",
)


def versions() -> dict[str, str]:
    """Return the versions of what computes."""
    return {
        "transplant_hf": __version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def record_of_making(trainer: DonorTrainer) -> dict[str, Any]:
    """Return everything that made a trainer's donor.

    Args:
        trainer: The trainer; of a run that has not begun it says what would.
    """
    args, state = trainer.args, trainer.state
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    evaluated = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
    made: dict[str, Any] = {
        "made_by": "transplant_hf DonorTrainer",
        "position": trainer.position,
        "strength": trainer.recommended_strength,
        **{name: getattr(args, name) for name in _ARGUMENTS},
        "schedule": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "optimizer": str(getattr(args.optim, "value", args.optim)),
        "steps": state.global_step,
        "batch": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        **trainer.rows.described(),
        "trainable_parameters": trainer.trainable_parameters,
        "prefix_cache_seconds": round(trainer.cache_seconds, 3),
        "versions": versions(),
    }
    seconds = next((entry["train_runtime"] for entry in reversed(state.log_history) if "train_runtime" in entry), None)
    if seconds is not None:
        made["train_seconds"] = round(seconds, 3)
    if losses:
        made["train_loss_last"] = round(losses[-1], 4)
    if trainer.held_out_perplexity:
        made["held_out_perplexity"] = trainer.held_out_perplexity
    if evaluated:
        made["eval_loss_last"] = round(evaluated[-1], 4)
    return made


def note_in_donors(model: Any, notes: Mapping[str, Mapping[str, Any]]) -> None:
    """Add to the metadata that a transplanted model's donors are saved with.

    Args:
        model: The model.
        notes: What to add, by the donors' names.
    """
    state = model._transplant
    state.blueprint = state.blueprint.noted(notes)
