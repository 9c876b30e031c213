"""From names to a saved donor: what is checked first, what is measured, and what stays when it is stopped."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.helpers import Shelf, copied, refused
from tests.hub_server import ALICE
from transplant_hf import CheckpointError, ConfigurationError, DataError, Donor, HubError
from transplant_hf.cli import main
from transplant_hf.evaluation import evaluate
from transplant_hf.evaluation.losses import perplexity_of_windows
from transplant_hf.model.load_any_model import load_model
from transplant_hf.training import PartTrainer, TrainingReport, recover_transplant, train_donor

SHORT: dict[str, Any] = {
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "block_length": 16,
    "disable_tqdm": True,
    "use_cpu": True,
}


@pytest.fixture
def family(tiny_llama: Path, tmp_path: Path) -> Path:
    folder = copied(tiny_llama, tmp_path / "family")
    (folder / "text.txt").write_text("To be, or not to be, that is the question. " * 40)
    (folder / "other.txt").write_text("Whether 'tis nobler in the mind to suffer. " * 20)
    return folder


def train(family: Path, **fields: Any) -> Any:
    known = {**SHORT, "donor_layers": 1, "donor_name": "new", **fields}
    return train_donor(family / "recipient", str(family / "text.txt"), family / "new", **known)


def test_every_line_of_the_summary_has_a_value() -> None:
    report = TrainingReport("out", "", 4, 2.0, 1.0, 0.0, 10, 1e-2, {"new": 1.0}, {})
    for texts in (["law"], ["law", "general"]):
        held_out = {text: {"recipient": 20.0, "with donor": 10.0} for text in texts}
        lines = str(dataclasses.replace(report, held_out=held_out)).splitlines()[2:]
        assert len(lines) == 6 + len(texts) and all(re.match(r".{19} \S", line) for line in lines), lines
    assert "perplexity          general: recipient 20.00, with donor 10.00" in lines


# -- First -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"learning_rate": -1.0}, "learning_rate must be a finite number above 0, got -1.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number above 0"),
        ({"max_steps": 0}, "max_steps must be at least 1, or -1"),
        ({"max_steps": -2}, "max_steps must be at least 1, or -1"),
        ({"max_steps": -1, "num_train_epochs": 0}, "num_train_epochs must be above 0, got 0"),
        ({"held_out_blocks": 0}, "held_out_blocks must be at least 1, got 0"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1, got 0"),
        ({"prefix_cache_limit": "many"}, "many"),
    ],
)
def test_numbers_are_refused_before_a_model_is_loaded(
    wrong: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("transplant_hf.training.data.model_to_measure", lambda *a, **k: pytest.fail("it was loaded"))
    for run in (train_donor, recover_transplant):
        with refused(ConfigurationError, told):
            run("recipient", "text.txt", tmp_path / "out", **{**SHORT, **wrong})


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--steps", "0"], "must be at least 1, got 0"),
        (["--learning-rate", "-1"], "must be a finite number above 0, got -1"),
        (["--private"], "--private goes with --push-to-hub"),
        (["--replay-share", "0.5"], "--replay-share goes with --general"),
        (["--held-out-blocks", "3"], "--held-out-blocks goes with --held-out"),
    ],
)
def test_wrong_usage(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("train", "recover"):
        try:
            status = main([command, "model", "text.txt", "out", *words])
        except SystemExit as error:
            status = int(str(error.code))
        assert status == 2 and told in capsys.readouterr().err


def test_nothing_is_measured_for_a_run_that_cannot_be_resumed(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "transplant_hf.training.runs.perplexity_of_windows", lambda *args, **kwargs: pytest.fail("measured")
    )
    with refused(ConfigurationError, "no complete checkpoint"):
        train(family, held_out=str(family / "other.txt"), resume=True)


@pytest.mark.hub
def test_nothing_is_trained_that_nobody_may_push(
    shelf: Shelf, as_user: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("To be, or not to be, that is the question. " * 40)
    monkeypatch.setattr(PartTrainer, "train", lambda *args, **kwargs: pytest.fail("it trained"))
    as_user(ALICE)
    shelf.put_base()
    monkeypatch.delenv("HF_TOKEN")
    for token, told in ((None, "nobody is logged in"), ("wrong", "The token is not valid")):
        with refused(HubError, f"{shelf.law}-new", told):
            push = {"push_to": f"{shelf.law}-new", "push_kwargs": {"token": token}}
            train_donor(shelf.base, "text.txt", None, **push, donor_layers=1, **SHORT)


# -- Measured ----------------------------------------------------------------------------------------------------------


def test_what_was_measured_is_in_the_record_and_on_the_card(family: Path) -> None:
    texts = {"law": str(family / "text.txt"), "general": str(family / "other.txt")}
    report = train(family, held_out=texts, held_out_blocks=5, strength=0.5)
    assert list(report.held_out) == ["law", "general"]
    assert report.perplexity == report.held_out["law"]
    donor = Donor.from_pretrained(family / "new")
    assert donor.metadata["held_out_perplexity"] == {
        text: {state: round(value, 4) for state, value in numbers.items()} for text, numbers in report.held_out.items()
    }
    card = (family / "new" / "README.md").read_text()
    law = report.held_out["law"]
    assert f"- `law`: recipient {law['recipient']:.2f}, with donor {law['with donor']:.2f}" in card
    assert "held_out_perplexity" not in card
    # The numbers of `evaluate` on as much text, at the strength that the donor was saved with.
    again = evaluate(family / "new", texts, block_length=16, max_tokens=5 * 16)
    assert load_model(family / "new").strengths == {"new": 0.5}
    assert again.of("recipient", "law").tokens == 5 * 16 - 1
    for text, numbers in report.held_out.items():
        assert again.of("recipient", text).value == pytest.approx(numbers["recipient"], rel=1e-6)
        assert again.of("with new", text).value == pytest.approx(numbers["with donor"], rel=1e-6)


def test_other_donors_are_in_the_name_of_what_is_measured_before(family: Path) -> None:
    train(family)
    report = train_donor(
        family / "new", str(family / "text.txt"), family / "newer", held_out=str(family / "other.txt"), **SHORT
    )
    assert list(report.perplexity) == ["with new", "with donor"]


@pytest.mark.parametrize("name", ["empty.txt", "missing.txt"])
@pytest.mark.parametrize("argument", ["text", "general", "held_out"])
def test_text_is_there_before_a_model_is_loaded(
    argument: str, name: str, family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (family / "empty.txt").touch()
    monkeypatch.setattr("transplant_hf.training.data.model_to_measure", lambda *args, **kwargs: pytest.fail("loaded"))
    texts = {"text": str(family / "text.txt"), argument: str(family / name)}
    with refused(DataError, name):
        train_donor(family / "recipient", texts.pop("text"), family / "new", **texts, **SHORT)


def test_another_strength_of_replaced_layers_takes_no_training(family: Path) -> None:
    words = (family / "recipient", str(family / "text.txt"), family / "new")
    known = {**SHORT, "mode": "replace", "position": 1, "keep_checkpoints": True}
    whole = train_donor(*words, **known)
    learned = Donor.from_pretrained(family / "new").tensors()
    half = train_donor(*words, **{**known, "resume": True, "strength": 0.5})
    assert (whole.interpolation, half.interpolation, whole.steps) == (1.0, 0.5, half.steps)
    assert "interpolated        0.5 of the training" in str(half)
    assert half.train_loss is None and "mean loss" not in str(half) and "mean loss" in str(whole)
    assert "train_seconds" not in Donor.from_pretrained(family / "new").metadata
    recipient = AutoModelForCausalLM.from_pretrained(family / "recipient")
    before = Donor.from_model(recipient, [1, 2, 3]).tensors()
    for name, tensor in Donor.from_pretrained(family / "new").tensors().items():
        torch.testing.assert_close(tensor, torch.lerp(before[name], learned[name], 0.5))


def test_what_recovery_measured_is_in_the_record_and_on_the_card(family: Path) -> None:
    held_out = {"law": str(family / "text.txt")}
    report = recover_transplant(
        family / "donor", str(family / "text.txt"), family / "recovered", held_out=held_out, **SHORT
    )
    assert list(report.perplexity) == ["recipient", "before", "after"]
    records = [json.loads(path.read_text()) for path in (family / "recovered").rglob("donor_config.json")]
    found = [record["metadata"]["recovered"]["held_out_perplexity"]["law"] for record in records]
    assert found and all(one["after"] == round(report.perplexity["after"], 4) for one in found)
    assert f"before {report.perplexity['before']:.2f}" in (family / "recovered" / "README.md").read_text()


def test_a_perplexity_without_end_does_not_keep_a_donor_from_being_saved(
    family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Endless:
        value = float("inf")

    monkeypatch.setattr("transplant_hf.training.runs.perplexity_of_windows", lambda *args, **kwargs: Endless)
    train(family, held_out=str(family / "other.txt"))
    held = Donor.from_pretrained(family / "new").metadata["held_out_perplexity"]
    assert held == {"other": {"recipient": None, "with donor": None}}
    assert "- `other`: recipient too large, with donor too large" in (family / "new" / "README.md").read_text()


def test_a_measurement_that_fails_loses_no_training(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails_with_donor(model: Any, *args: Any, **kwargs: Any) -> Any:
        if model.layer_map.layers_of("new"):
            raise CheckpointError("the loss is nan")
        return perplexity_of_windows(model, *args, **kwargs)

    monkeypatch.setattr("transplant_hf.training.runs.perplexity_of_windows", fails_with_donor)
    with refused(CheckpointError, "the loss is nan"):
        train(family, held_out=str(family / "other.txt"))
    assert Donor.from_pretrained(family / "new").metadata["steps"] == 4


def test_an_untrained_donors_card_says_so(family: Path) -> None:
    assert (
        main(["extract", str(family / "recipient"), str(family / "start"), "--count", "1", "--init", "identity"]) == 0
    )
    untrained = (family / "start" / "README.md").read_text()
    assert "`start` is not trained yet" in untrained and "were trained inside" not in untrained
    train(family)
    assert "is not trained yet" not in (family / "new" / "README.md").read_text()


# -- Stopped -----------------------------------------------------------------------------------------------------------


def test_a_run_that_is_stopped_says_how_to_go_on(
    family: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", family / "recipient", family / "text.txt", family / "new", "--layers", 1, "--batch-size", 2]
    words = [*map(str, words), "--block-length", "16", "--save-steps", "2"]
    step = PartTrainer.training_step

    def stop_at(last: int) -> None:
        def stopped(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step == last:
                raise KeyboardInterrupt
            return step(self, *args, **kwargs)

        monkeypatch.setattr(PartTrainer, "training_step", stopped)

    for at, told in (
        (1, "no checkpoint was written"),
        (3, "checkpoint-2 is complete: continue from it with resume=True"),
    ):
        stop_at(at)
        assert main([*words, "--steps", "4"]) == 130
        err = capsys.readouterr().err
        assert "transplant-hf: training was stopped; " in err and told in err and "Traceback" not in err
    monkeypatch.undo()
    assert main([*words, "--steps", "6", "--resume", "--keep-checkpoints"]) == 0
    assert Donor.from_pretrained(family / "new").metadata["steps"] == 6
    assert (family / "new.training" / "checkpoint-6").is_dir()
    assert main([*words, "--steps", "8", "--resume"]) == 0  # over its own result, without --overwrite
    assert Donor.from_pretrained(family / "new").metadata["steps"] == 8
    assert main([*words, "--steps", "10", "--resume"]) == 1
    assert "--keep-checkpoints" in capsys.readouterr().err
