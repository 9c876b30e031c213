"""Donors beside adapters and fine-tuning."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import copied, plain, refused
from tests.training.helpers import noise
from transplant_hf import ConfigurationError
from transplant_hf.comparison import METHODS, ComparisonReport, Held, compare, compare_texts
from transplant_hf.comparison.methods import Setting
from transplant_hf.plots import plot_comparison

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> ComparisonReport:
    folder = copied(tiny_llama, tmp_path_factory.mktemp("comparison") / "family")
    domain, general = noise(24).split(4, 1, 1), noise(24, seed=2, name="general").split(4, 1, 1)
    held = Held({"law": domain[1], "general": general[1]}, {"law": domain[2], "general": general[2]})
    return compare(
        folder / "recipient",
        domain[0],
        general[0],
        held,
        learning_rates=[1e-3, 1e-2],
        steps=4,
        batch=4,
        shares=[0.25],
        layers=2,
        rank=2,
        quiet=True,
    )


def test_every_method_is_beside_the_controls(report: ComparisonReport) -> None:
    labels = [row.label for row in report.rows]
    assert labels[:2] == ["recipient, untouched", "untrained copy"]
    for method in METHODS.values():
        assert any(label.startswith(method.what) for label in labels)
    assert sum("standalone" in label for label in labels) == 6, "three views, at equal steps and at equal time"


def test_learning_rates_are_chosen_on_the_validation_text(report: ComparisonReport) -> None:
    for row in report.rows:
        if row.budget == "steps":
            others = [
                run
                for run in report.runs
                if (run.method, run.view, run.steps) == (row.result.method, row.result.view, 4)
            ]
            assert row.result.validation["law"] == min(run.validation["law"] for run in others)


def test_what_can_be_taken_out_again_is_exact(report: ComparisonReport) -> None:
    for run in report.runs:
        if run.method == "full":
            assert run.removal_error is None
        else:
            assert run.removal_error is not None and run.removal_error < 1e-5


def test_costs_are_measured(report: ComparisonReport) -> None:
    runs = {run.method: run for run in report.runs if run.steps == 4}
    assert all(run.seconds > 0 and run.artefact_bytes > 0 for run in runs.values())
    assert runs["lora"].trainable < runs["donor"].trainable < runs["full"].trainable
    assert runs["donor"].cache_seconds > 0 and runs["lora"].cache_seconds == 0


def test_it_can_be_printed_saved_and_drawn(report: ComparisonReport, tmp_path: Path) -> None:
    table = str(report)
    assert "full fine-tuning" in table and "no way back" in table
    assert table.count("at equal steps, 25% general text replayed:") == table.count("at equal time, 25%") == 1
    assert max(map(len, table.splitlines())) <= 100
    long = dataclasses.replace(report, rows=tuple(dataclasses.replace(row, label=row.label * 3) for row in report.rows))
    assert max(map(len, str(long).splitlines())) <= 100
    report.save(tmp_path)
    told = json.loads((tmp_path / "comparison.json").read_text())
    assert len(told["rows"]) == len(report.rows) and told["about"]["steps"] == 4
    pytest.importorskip("matplotlib")
    plot_comparison(report, tmp_path / "comparison.png")
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_adapters_are_drawn_from_the_seed_alone(tiny_llama: Path) -> None:
    def drawn(seed: int) -> list[torch.Tensor]:
        setting = Setting(lambda: plain(tiny_llama / "recipient"), plain(tiny_llama / "recipient"), 2, 2, seed)
        parameters = METHODS["lora"].prepare(setting).model.named_parameters()
        return [parameter for name, parameter in parameters if ".lora_A." in name]

    first, again, other = drawn(0), drawn(0), drawn(1)
    assert first and all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first, other))


def test_what_is_refused(tiny_llama: Path) -> None:
    held = Held({"law": noise(4)}, {"law": noise(4)})
    with refused(ConfigurationError, "unknown methods ['prompt']", "donor"):
        compare(tiny_llama / "recipient", noise(), None, held, methods=["prompt"])
    with refused(ConfigurationError, "equal time is that of full fine-tuning", "'full'"):
        compare(tiny_llama / "recipient", noise(), None, held, methods=["donor"])
    with refused(ConfigurationError, "need general text"):
        compare(tiny_llama / "recipient", noise(), None, held)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"learning_rates": [1e-3, -1.0]}, "finite numbers above 0, got [0.001, -1.0]"),
        ({"learning_rates": [float("nan")]}, "finite numbers above 0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"shares": [1.0]}, "at least 0 and below 1"),
        ({"layers": 9}, "layers=9, but"),
    ],
)
def test_numbers_out_of_range_are_refused_before_any_training(
    wrong: dict[str, Any], told: str, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transplant_hf.comparison.study.run_method", lambda *args: pytest.fail("it trained"))
    held = Held({"law": noise(4)}, {"law": noise(4)})
    with refused(ConfigurationError, told):
        compare(tiny_llama / "recipient", noise(), noise(seed=2), held, **wrong)


def test_a_library_that_is_missing_is_named_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    for load in ("transplant_hf.comparison.study.load_model", "transplant_hf.comparison.study.model_and_tokenizer"):
        monkeypatch.setattr(load, lambda *args, **kwargs: pytest.fail("a model was loaded"))
    without = "donor donor-end standalone last full"
    with refused(ConfigurationError, "lora and lora-last needs peft", f"compare without: methods {without}"):
        compare_texts("recipient", "text.txt", "general.txt")
