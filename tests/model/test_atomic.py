"""No save is half a save, and none writes outside its folder."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import (
    copied,
    digest_of,
    edit_json,
    loaded,
    logits_of,
    plain,
    refused,
)
from transplant_hf import (
    AutoModelWithTransplant,
    CheckpointError,
    ConfigurationError,
    Donor,
)

load = AutoModelWithTransplant.from_pretrained


# -- Whole or not at all ---------------------------------------------------------------------------------------------


def fail_in(monkeypatch: pytest.MonkeyPatch, *places: str) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    for place in places:
        monkeypatch.setattr(place, full)


@pytest.fixture
def target(tiny_gpt2: Path, tmp_path: Path) -> Path:
    """A folder in use: an old artefact, and files of the user's own."""
    folder = tmp_path / "place" / "model"
    loaded(tiny_gpt2, 4).save_pretrained(folder, thin=True)
    (folder / "notes.txt").write_text("mine")
    (folder / "runs").mkdir()
    (folder / "runs" / "log.txt").write_text("mine")
    return folder


@pytest.mark.parametrize("thin", [False, True])
def test_a_save_that_fails_leaves_the_old_one(
    tiny_gpt2: Path, target: Path, monkeypatch: pytest.MonkeyPatch, thin: bool
) -> None:
    model, before = loaded(tiny_gpt2, 1), digest_of(target.parent)
    fail_in(monkeypatch, "transplant_hf.donor.save.save_file", "transformers.modeling_utils.safe_save_file")
    with refused(CheckpointError, str(target), "disk is full", "unchanged"):
        model.save_pretrained(target, thin=thin)
    assert digest_of(target.parent) == before
    assert [path.name for path in target.parent.iterdir()] == ["model"]
    assert load(target).layer_map[4] == ("donor", 1)


@pytest.mark.parametrize(
    "place", ["transplant_hf.model.save_parts.write_entry", "transplant_hf.model.save_parts.write_card"]
)
def test_a_save_that_fails_late(tiny_gpt2: Path, target: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    before = digest_of(target.parent)
    fail_in(monkeypatch, place)
    with refused(CheckpointError, str(target), "disk is full", "unchanged"):
        loaded(tiny_gpt2, 1).save_pretrained(target, thin=True)
    assert digest_of(target.parent) == before


@pytest.mark.parametrize("thin", [False, True])
def test_files_of_the_users_own_survive(tiny_gpt2: Path, target: Path, thin: bool) -> None:
    loaded(tiny_gpt2, 1).save_pretrained(target, thin=thin)
    assert (target / "notes.txt").read_text() == "mine"
    assert (target / "runs" / "log.txt").read_text() == "mine"
    model = load(target) if thin else plain(target)
    assert torch.equal(logits_of(model), logits_of(loaded(tiny_gpt2, 1)))
    assert [path.name for path in target.parent.iterdir()] == ["model"]


def test_what_a_killed_save_left_is_swept(tiny_gpt2: Path, target: Path) -> None:
    stale = target.parent / ".model.0a1b2c3d.tmp"
    stale.mkdir()
    (stale / "donor.safetensors").write_bytes(b"half")
    loaded(tiny_gpt2, 1).save_pretrained(target, thin=True)
    assert [path.name for path in target.parent.iterdir()] == ["model"]


KILLED = """
import os, sys
import torch
torch.set_num_threads(1)
from transplant_hf import AutoModelWithTransplant, DonorSpec
from transformers.utils import logging
logging.disable_progress_bar()
family, target, thin = sys.argv[1], sys.argv[2], sys.argv[3] == "thin"
models = [
    AutoModelWithTransplant.from_pretrained(f"{family}/recipient", donors=[DonorSpec(f"{family}/donor", p)])
    for p in (1, 3)
]
print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        while True:
            for model in models:
                model.save_pretrained(target, thin=thin)
    print(child, flush=True)
    os.waitpid(child, 0)
    print("gone", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("thin", ["full", "thin"])
def test_killed_at_any_moment(tiny_gpt2: Path, tmp_path: Path, thin: str) -> None:
    """A process that saves two models in turn into one folder is killed; the folder is one or the other."""
    target = tmp_path / "place" / "model"
    whole = []
    for position in (1, 3):
        loaded(tiny_gpt2, position).save_pretrained(target, thin=thin == "thin")
        whole.append(digest_of(target))
    assert whole[0] != whole[1]
    chance = random.Random(3)
    command = [sys.executable, "-c", KILLED, str(tiny_gpt2), str(target), thin]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        for _ in range(12):
            process.stdin.write("next\n")
            process.stdin.flush()
            child = int(process.stdout.readline())
            time.sleep(0.02 + 0.3 * chance.random())
            os.kill(child, signal.SIGKILL)
            assert process.stdout.readline() == "gone\n"
            assert digest_of(target) in whole
        process.stdin.close()
    loaded(tiny_gpt2, 1).save_pretrained(target, thin=thin == "thin")
    assert [path.name for path in target.parent.iterdir()] == ["model"]


# -- Names that lead out ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../escaped", "a/b", ".."])
def test_a_hostile_name_writes_nothing_elsewhere(tiny_gpt2: Path, tmp_path: Path, name: str) -> None:
    """The name may come from a stranger's donor_config.json."""
    family = copied(tiny_gpt2, tmp_path / "family")
    edit_json(family / "donor" / "donor_config.json", name=name)
    edit_json(family / "donor" / "config.json", donors=[{"donor": ".", "position": 1}])
    other = {"donor": str(family / "donor"), "position": 2, "name": "other"}
    edit_json(family / "donor" / "config.json", donors=[{"donor": ".", "position": 1}, other])
    with refused(ConfigurationError, "name", name):
        load(family / "donor").save_pretrained(tmp_path / "out" / "thin", thin=True)
    assert not list(tmp_path.rglob("escaped"))


def test_donor_layers_are_whole_after_a_round_trip_of_everything(tiny: Path, tmp_path: Path) -> None:
    """Thin, then full, then taken out again: the same bytes."""
    original = Donor.from_pretrained(tiny / "donor").tensors()
    loaded(tiny, 3).save_pretrained(tmp_path / "thin", thin=True)
    load(tmp_path / "thin").save_pretrained(tmp_path / "full")
    taken = Donor.from_model(plain(tmp_path / "full"), [3, 4]).tensors()
    assert taken.keys() == original.keys()
    assert all(torch.equal(taken[name], original[name]) for name in original)
