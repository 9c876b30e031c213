"""Commands with an output: one that is there is refused before any work, and `--overwrite` replaces only ours."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli.conftest import Run
from tests.helpers import digest_of, layers_of, plain
from transplant_hf import Donor
from transplant_hf.training import DonorTrainer

TRAINED = ("--steps", "2", "--batch-size", "2", "--block-length", "16", "--count", "1")
Words = Callable[[Path], list[Any]]


def convert(family: Path) -> list[Any]:
    path = family / "layers.pt"
    if not path.exists():
        torch.save([layer.state_dict() for layer in layers_of(plain(family / "source"))[1:3]], path)
    words = ["convert", path, family / "out", "--recipient", family / "recipient", "--layers", 1, 2, "--position", 1]
    return [*words, "--name", "taken"]


def extract(family: Path) -> list[Any]:
    return ["extract", family / "recipient", family / "out", "--layers", 1, 2, "--name", "taken"]


def export(family: Path) -> list[Any]:
    return ["export", family / "donor", family / "out", "--no-verify"]


def train(family: Path) -> list[Any]:
    return ["train", family / "recipient", text_in(family), family / "out", *TRAINED, "--name", "taken"]


def recover(family: Path) -> list[Any]:
    words = ("--steps", 1, "--batch-size", 2, "--block-length", 16, "--parts", "donor")
    return ["recover", family / "donor", text_in(family), family / "out", *words]


def compare(family: Path) -> list[Any]:
    words = ("--methods", "donor", "--learning-rates", 1e-2, "--steps", 1, "--batch-size", 2, "--block-length", 16)
    words = (*words, "--count", 1, "--no-equal-time", "--replay-shares", 0, "--output", family / "out")
    return ["compare", family / "recipient", text_in(family), "--general", text_in(family), *words]


COMMANDS: list[Words] = [convert, extract, export, train, recover, compare]


def text_in(family: Path) -> Path:
    path = family / "hamlet.txt"
    path.write_text("To be, or not to be, that is the question. " * 40)
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_files_of_the_user_are_refused_and_kept(family: Path, command: Words, run: Run) -> None:
    words = command(family)
    (family / "out").mkdir()
    (family / "out" / "mine.txt").write_text("precious")
    before = digest_of(family)
    status, _, err = run(*words)
    assert status == 1 and "is not empty" in err and "mine.txt" in err and "--overwrite" in err, err
    assert digest_of(family) == before
    status, _, err = run(*words, "--overwrite")
    assert status == 0, err
    assert (family / "out" / "mine.txt").read_text() == "precious"
    # What was written by the command itself is refused, and replaced when that is asked for.
    before = digest_of(family)
    status, _, err = run(*words)
    assert status == 1 and "is not empty" in err and digest_of(family) == before
    status, _, err = run(*words, "--overwrite")
    assert status == 0, err
    assert (family / "out" / "mine.txt").read_text() == "precious"


@pytest.mark.parametrize("command", COMMANDS[:-1])
def test_a_model_that_we_did_not_write_is_never_replaced(family: Path, command: Words, run: Run) -> None:
    words = command(family)
    shutil.copytree(family / "source", family / "out")
    before = digest_of(family)
    status, _, err = run(*words, "--overwrite")
    assert status == 1 and "config.json, model.safetensors" in err and "no record of writing" in err, err
    assert digest_of(family) == before


def test_an_export_over_a_trained_donor(family: Path, run: Run) -> None:
    assert run(*extract(family))[0] == 0
    (family / "out" / "mine.txt").write_text("precious")
    before = digest_of(family / "out")
    assert run(*export(family))[0] == 1
    assert digest_of(family / "out") == before
    assert run(*export(family), "--overwrite")[0] == 0
    names = {path.name for path in (family / "out").iterdir()}
    assert {"mine.txt", "model.safetensors"} <= names and not {"donor.safetensors", "donor_config.json"} & names


def test_no_work_is_done_before_the_refusal(family: Path, run: Run) -> None:
    (family / "out").mkdir()
    (family / "out" / "mine.txt").write_text("precious")
    for command in (convert, extract, export, train, recover):
        words = command(family)
        words[1] = family / "nowhere"  # would be an error of its own as soon as anything is opened
        status, _, err = run(*words)
        assert status == 1 and "is not empty" in err, err
    status, _, err = run("compare", "no/where", "none.txt", "--general", "none.txt", "--output", family / "out")
    assert status == 1 and "is not empty" in err, err


@pytest.mark.parametrize("command", ["sweep", "evaluate"])
def test_a_picture_that_exists(family: Path, command: str, run: Run) -> None:
    picture = family / "plot.png"
    words = [command, family / "donor", "--text", text_in(family), "--block-length", 16, "--plot", picture]
    words += ["--positions", 1] if command == "sweep" else ["--text", f"other={text_in(family)}", "--strengths", 0, 1]
    picture.write_text("mine")
    status, _, err = run("sweep" if command == "sweep" else command, "no/where", *words[2:])
    assert status == 1 and "plot.png exists" in err and "--overwrite" in err, err
    assert picture.read_text() == "mine"
    status, _, err = run(*words, "--overwrite")
    assert status == 0 and picture.read_bytes().startswith(b"\x89PNG"), err


@pytest.mark.parametrize("command", [train, recover])
def test_checkpoints_of_an_earlier_run(family: Path, command: Words, run: Run) -> None:
    words = command(family)
    work = family / "out.training"
    stopped = work / "checkpoint-1"
    stopped.mkdir(parents=True)
    (stopped / "transplant_run.json").write_text("{}")
    (work / "mine.txt").write_text("precious")
    before = digest_of(family)
    status, _, err = run(*words)
    assert status == 1 and "checkpoints of an earlier run" in err and "--resume" in err and "--overwrite" in err, err
    assert digest_of(family) == before
    assert run(*words, "--overwrite")[0] == 0
    assert [path.name for path in work.iterdir()] == ["mine.txt"]


def test_resuming_is_no_overwriting(family: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    words = [*train(family), "--save-steps", 1]
    with monkeypatch.context() as patched:
        patched.setattr(DonorTrainer, "save", interrupted)
        assert run(*words)[0] == 130
    assert (family / "out.training" / "checkpoint-2").is_dir() and not (family / "out").exists()
    status, _, err = run(*words, "--resume")
    assert status == 0, err
    assert Donor.from_pretrained(family / "out").name == "taken" and not (family / "out.training").exists()


def test_the_demo_keeps_to_its_own_files(tmp_path: Path, run: Run) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    status, _, err = run("demo", "--folder", tmp_path)
    assert status == 1 and "is not empty" in err and "mine.txt" in err
