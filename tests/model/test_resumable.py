"""Checkpoints of `Trainer` in the transplant format: found again, to go on and to take the best model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers.utils import logging as transformers_logging

from tests.helpers import loaded, logits_of, plain, two_donors
from tests.model.test_folded_strength import neox, scaled
from tests.model.test_training import freeze_recipient, trainer
from transplant_hf import AutoModelWithTransplant
from transplant_hf.model.strength import attach_gate

load = AutoModelWithTransplant.from_pretrained
WEIGHTS = "model-00001-of-00001.safetensors"
Make = Callable[[Path], Any]


def with_a_gate(family: Path) -> Any:
    model = loaded(family, 1, strength=0.5)
    attach_gate(model, "donor")
    return model


def frozen(family: Path) -> Any:
    model = loaded(family, 1, strength=0.5)
    freeze_recipient(model)
    return model


MAKES: dict[str, Make] = {
    "strength": lambda family: loaded(family, 1, strength=0.5),
    "two donors": lambda family: two_donors(family, strength=0.5),
    "side by side": lambda family: side_by_side(family),
    "gate": with_a_gate,
    "frozen recipient": frozen,
    # Its strength could go into the weights, and would be applied twice then.
    "parallel layers": lambda family: scaled(neox, 0.5),
}


def side_by_side(family: Path) -> Any:
    model = two_donors(family)
    model.set_composition("side_by_side")
    model.move_donor("b", 0)
    return model


@pytest.fixture
def complaints() -> Any:
    """What Transformers warns of."""
    seen: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    logger = transformers_logging.get_logger("transformers")
    logger.addHandler(handler)
    yield seen
    logger.removeHandler(handler)


def names(*slow: str) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow if name in slow else ()) for name in MAKES]


STEPS = {"save_strategy": "steps", "save_steps": 1, "seed": 5}


@pytest.mark.parametrize("name", names("strength", "two donors", "side by side", "frozen recipient"))
def test_the_best_model_is_taken(tiny_llama: Path, tmp_path: Path, name: str, complaints: list[str]) -> None:
    """With the largest loss as the best, which the last model never has."""
    model = MAKES[name](tiny_llama)
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    run = trainer(model, tmp_path, **STEPS, **best, eval_strategy="steps", eval_steps=1, max_steps=3)
    run.train()
    model.eval()
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    assert torch.equal(logits_of(model), logits_of(load(tmp_path / "checkpoint-1")))
    assert not torch.equal(logits_of(model), logits_of(load(tmp_path / "checkpoint-3")))
    assert not [text for text in complaints if "locate" in text or "keys" in text]


@pytest.mark.parametrize("name", names("strength", "two donors"))
def test_a_run_goes_on(tiny_llama: Path, tmp_path: Path, name: str, complaints: list[str]) -> None:
    whole, again = MAKES[name](tiny_llama), MAKES[name](tiny_llama)
    trainer(whole, tmp_path, **STEPS, max_steps=3).train()
    trainer(again, tmp_path, **STEPS, max_steps=3).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.strengths == whole.strengths
    assert torch.equal(logits_of(again.eval()), logits_of(whole.eval()))
    assert not [text for text in complaints if "keys" in text]


def test_frozen_weights_are_written_once(tiny_llama: Path, tmp_path: Path) -> None:
    model = frozen(tiny_llama)
    model.save_pretrained(tmp_path / "checkpoint-7")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert load_file(tmp_path / "checkpoint-7" / WEIGHTS).keys() == trained
    assert torch.equal(logits_of(load(tmp_path / "checkpoint-7")), logits_of(model))


def test_only_a_checkpoint_of_trainer_holds_them(tiny_llama: Path, tmp_path: Path) -> None:
    loaded(tiny_llama, 1, strength=0.5).save_pretrained(tmp_path / "full")
    loaded(tiny_llama, 1).save_pretrained(tmp_path / "checkpoint-1")
    assert not (tmp_path / "full" / WEIGHTS).exists()
    assert not (tmp_path / "checkpoint-1" / WEIGHTS).exists()
    loaded(tiny_llama, 1, strength=0.5).save_pretrained(tmp_path / "checkpoint-1")
    assert not (tmp_path / "checkpoint-1" / "model.safetensors").exists()
    loaded(tiny_llama, 1).save_pretrained(tmp_path / "checkpoint-1")
    assert not (tmp_path / "checkpoint-1" / WEIGHTS).exists()
    assert torch.equal(logits_of(plain(tmp_path / "checkpoint-1")), logits_of(loaded(tiny_llama, 1)))


def test_gathered_weights_are_what_is_written(tiny_llama: Path, tmp_path: Path) -> None:
    model = loaded(tiny_llama, 1, strength=0.5)
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "checkpoint-1", state_dict=state)
    found = load_file(tmp_path / "checkpoint-1" / WEIGHTS)
    assert all(torch.equal(found[name], state[name]) for name, _ in model.named_parameters())
