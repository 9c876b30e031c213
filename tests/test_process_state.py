"""No call changes what all threads share, not even for a moment: another one may be building, writing or logging."""

from __future__ import annotations

import contextlib
import copy
import locale
import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from tests.helpers import tiny_llama_model
from transplant_hf import AutoModelWithTransplant, Donor, check_compatibility, remove_transplants, transplant
from transplant_hf.conversion import convert
from transplant_hf.evaluation import evaluate, sweep
from transplant_hf.exporting import export
from transplant_hf.planning import plan
from transplant_hf.training import train_donor

RECIPIENT = tiny_llama_model(1)
STREAM = torch.arange(64) % 16


def _load(family: Path, place: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(family / "donor", dtype=torch.bfloat16)


def _switch(family: Path, place: Path) -> None:
    model = _load(family, place)
    with model.disable_transplants():
        pass
    with model.using(()):
        pass
    model.set_strength("donor", 0.5)


def _change(family: Path, place: Path) -> None:
    model = _load(family, place)
    model.add_donor(str(family / "donor"), 3, name="two")
    model.move_donor("two", 2)
    model.swap_donor("two", str(family / "donor"), new_name="three")
    model.remove_donor("three")


def _in_memory(family: Path, place: Path) -> None:
    model = transplant(RECIPIENT, str(family / "donor"))
    Donor.from_model(model, layers=[1, 2], name="new")
    remove_transplants(copy.deepcopy(model))


def _save(family: Path, place: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(family / "donor")
    model.save_pretrained(place / "full")
    model.save_pretrained(place / "thin", thin=True)


def _convert(family: Path, place: Path) -> None:
    layers = RECIPIENT.model.layers[1:3]
    torch.save([layer.state_dict() for layer in layers], place / "layers.pt")
    convert(place / "layers.pt", family / "source", place / "donor", layers=[1, 2], position=1, verify=True)


def _train(family: Path, place: Path) -> None:
    (place / "text.txt").write_text("To be, or not to be, that is the question. " * 20)
    numbers: dict[str, Any] = {"max_steps": 1, "per_device_train_batch_size": 2, "block_length": 16}
    how: dict[str, Any] = {"donor_layers": 1, "disable_tqdm": True, "use_cpu": True}
    train_donor(family / "recipient", str(place / "text.txt"), place / "new", **numbers, **how)


ENTRIES: dict[str, Callable[[Path, Path], Any]] = {
    "load": _load,
    "from_config": lambda family, _: AutoModelWithTransplant.from_config(AutoConfig.from_pretrained(family / "donor")),
    "switch": _switch,
    "change": _change,
    "in_memory": _in_memory,
    "check": lambda family, _: check_compatibility(str(family / "recipient"), str(family / "donor"), 1),
    "save": _save,
    "export": lambda family, place: export(family / "donor", place / "plain", verify=False),
    "verified export": lambda family, place: export(family / "donor", place / "plain"),
    "convert": _convert,
    "evaluate": lambda family, _: evaluate(str(family / "donor"), {"noise": STREAM}, block_length=8, quiet=True),
    "sweep": lambda family, _: sweep(str(family / "donor"), None, STREAM, [1, 2], block_length=8, quiet=True),
    "plan": lambda family, _: plan(str(family / "donor"), memory="1GB", devices=2),
    "train": _train,
}
# Trainer seeds the process and sets the verbosity of Transformers.
OF_TRAINER = {"train": {"manual_seed was called", "set_verbosity was called"}}


def _state() -> dict[str, Any]:
    """What all threads share."""
    names = [None, "transformers", "transplant_hf", "huggingface_hub", "accelerate", "accelerate.utils.modeling"]
    return {
        "torch.nn.init": {name: one for name, one in vars(nn.init).items() if callable(one)},
        "linear's init": nn.modules.linear.init.kaiming_uniform_,
        "torch.linspace": torch.linspace,
        "tie_weights": PreTrainedModel.tie_weights,
        "init_weights": PreTrainedModel.init_weights,
        "default dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "logging": [logging.getLogger(name).level for name in names],
        "bars": transformers_logging.is_progress_bar_enabled(),
        "warnings": list(warnings.filters),
        "environment": dict(os.environ),
        "folder": Path.cwd(),
        "locale": locale.setlocale(locale.LC_ALL),
    }


# What sets one of them. A call is a fault, even where it is taken back at once.
_SETTERS = (
    (torch, "set_default_dtype"),
    (torch, "set_num_threads"),
    (torch, "manual_seed"),
    (os, "umask"),
    (os, "chdir"),
    (transformers_logging, "set_verbosity"),
    (transformers_logging, "disable_progress_bar"),
)


@contextlib.contextmanager
def _watching(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Note calls of setters, and look at the state again and again from another thread."""
    seen: list[str] = []
    for owner, name in _SETTERS:
        monkeypatch.setattr(owner, name, lambda *_, name=name, **__: seen.append(f"{name} was called"))
    before, done = _state(), threading.Event()

    def look() -> None:
        while not done.wait(0.001):
            compare()

    def compare() -> None:
        after = _state()
        seen.extend(f"{name} changed" for name in before if before[name] != after[name])

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield seen
    finally:
        done.set()
        watcher.join()
        compare()
        monkeypatch.undo()


@pytest.mark.parametrize("entry", ENTRIES)
def test_nothing_is_changed_for_the_process(
    entry: str, family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors: list[BaseException] = []

    def work(number: int) -> None:
        (tmp_path / str(number)).mkdir()
        try:
            ENTRIES[entry](family, tmp_path / str(number))
        except BaseException as error:  # noqa: BLE001 - told in the main thread
            errors.append(error)

    with _watching(monkeypatch) as seen:
        count = 1 if entry in OF_TRAINER else 2
        threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    assert sorted(set(seen) - OF_TRAINER.get(entry, set())) == []


def test_loading_draws_no_random_numbers(tiny_llama: Path) -> None:
    state = torch.random.get_rng_state()
    _switch(tiny_llama, tiny_llama)
    assert torch.equal(torch.random.get_rng_state(), state)
