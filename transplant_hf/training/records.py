"""The record of a donor's training: its metadata, with which it can be trained again."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import transformers

from .. import __version__
from ..cards import TRAINED_HERE
from .data import rows_per_step

if TYPE_CHECKING:
    from .donor_trainer import DonorTrainer

__all__ = ["note_in_donors", "quantization_record", "run_settings", "training_record", "versions"]

_METHOD = ("method", "mode", "init", "distillation")
_SETTINGS = ("learning_rate", "weight_decay", "warmup_steps", "max_grad_norm", "seed")


def versions() -> dict[str, str]:
    """Return the versions of what computes."""
    return {
        "transplant_hf": __version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def run_settings(args: Any) -> dict[str, Any]:
    """Return the settings that all runs have, and that change what is learned."""
    return {
        **{name: getattr(args, name) for name in _SETTINGS},
        "schedule": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "optimizer": str(getattr(args.optim, "value", args.optim)),
        "batch": rows_per_step(args),
    }


def training_record(trainer: DonorTrainer) -> dict[str, Any]:
    """Return the metadata of a trainer's donor; before the run, of the run as planned."""
    args, state = trainer.args, trainer.state
    record: dict[str, Any] = {
        "made_by": TRAINED_HERE,
        "position": trainer.position,
        "strength": trainer.recommended_strength,
        **({"interpolation": trainer.interpolation} if trainer.interpolation != 1 else {}),
        **{name: getattr(args, name) for name in _METHOD},
        **run_settings(args),
        "steps": state.global_step,
        **trainer.rows.described(),
        **quantization_record(trainer.quantization, trainer.started_from),
        "trainable_parameters": trainer.trainable_parameters,
        "prefix_cache_seconds": round(trainer.cache_seconds, 3),
        "versions": versions(),
    }
    logged = {name: value for entry in state.log_history for name, value in entry.items()}  # the last of each
    if trainer.resumed:
        logged.pop("train_runtime", None)  # of the last part alone
    for key, name, digits in (
        ("train_seconds", "train_runtime", 3),
        ("train_loss_last", "loss", 4),
        ("eval_loss_last", "eval_loss", 4),
    ):
        if name in logged:
            record[key] = round(logged[name], digits)
    if trainer.held_out_perplexity:
        record["held_out_perplexity"] = trainer.held_out_perplexity
    return record


def quantization_record(fields: Mapping[str, Any] | None, started_from: str | None = None) -> dict[str, Any]:
    """Return how the recipient of a training was quantized, and what the donor started from; empty if it was not."""
    known = {"recipient_quantization": fields, "started_from": started_from}
    return {name: value for name, value in known.items() if value}


def note_in_donors(model: Any, notes: Mapping[str, Mapping[str, Any]]) -> None:
    """Add to the metadata that a transplanted model's donors are saved with."""
    state = model._transplant
    state.blueprint = state.blueprint.with_metadata(notes)
