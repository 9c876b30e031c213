"""What goes through a whole model, to save or copy it, finds one set of donors while other threads switch them."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import loaded, logits_of, plain, refused
from tests.model.test_calls import beside, toggle
from transplant_hf import ConfigurationError
from transplant_hf.model import calls, save


def pickled(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", ["save_pretrained", "deepcopy", "pickle"])
def test_the_whole_model_beside_a_switch(tiny_llama: Path, tmp_path: Path, way: str) -> None:
    model = loaded(tiny_llama, 1)
    sides = [logits_of(model), logits_of(plain(tiny_llama / "recipient"))]
    one_at_a_time = threading.Lock()

    def saved() -> Any:
        folder = tmp_path / str(uuid.uuid4())
        model.save_pretrained(folder)
        with one_at_a_time:  # two loads at once, by Transformers itself, leave its patches of torch behind
            return plain(folder)

    again = {"save_pretrained": saved, "deepcopy": lambda: copy.deepcopy(model), "pickle": lambda: pickled(model)}[way]
    for found in beside(lambda: logits_of(again()), toggle(model), calls=4):
        if isinstance(found, ConfigurationError) and way != "save_pretrained":
            assert "cannot be copied inside" in str(found) or "while this model was pickled" in str(found)
        else:
            assert any(torch.equal(found, side) for side in sides)


def test_weights_beside_a_switch(tiny_llama: Path) -> None:
    model = loaded(tiny_llama, 1)
    sides = [set(model.state_dict()), set(plain(tiny_llama / "recipient").state_dict())]
    assert all(found in sides for found in beside(lambda: set(model.state_dict()), toggle(model)))


def test_a_switch_waits_for_a_save(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "LONGEST_WAIT", 0.1)
    monkeypatch.setattr(calls, "_POLL_SECONDS", 0.05)
    model, errors = loaded(tiny_llama, 1), []

    def companions(*_: Any) -> None:
        with ThreadPoolExecutor(1) as pool:
            errors.append(pool.submit(toggle(model)).exception())

    monkeypatch.setattr(save, "copy_model_companions", companions)
    model.save_pretrained(tmp_path / "saved")
    assert "calls of 1 other threads" in str(errors[0])
    assert torch.equal(logits_of(plain(tmp_path / "saved")), logits_of(model))


@pytest.mark.parametrize("way", [pickled, pickle.dumps, copy.deepcopy])
def test_a_model_switched_off_is_not_copied(tiny_llama: Path, way: Callable[[Any], Any]) -> None:
    model = loaded(tiny_llama, 1)
    with (
        model.disable_transplants(),
        refused(ConfigurationError, "cannot be copied inside disable_transplants(); copy it outside"),
    ):
        way(model)
    way(model)


def test_a_switch_while_pickling(tiny_llama: Path) -> None:
    """A pickler does not say when it ends."""
    model = loaded(tiny_llama, 1)

    class Switching:
        def __reduce__(self) -> Any:
            toggle(model)()
            return int, ()

    model.config.switching = Switching()
    with refused(ConfigurationError, "switched or changed donors while this model was pickled", "Try again"):
        pickle.dumps(model)
