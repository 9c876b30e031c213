"""Donors beside adapters and fine-tuning."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers import copied, refused
from tests.training.helpers import noise
from transplant_hf import ConfigurationError
from transplant_hf.comparison import METHODS, ComparisonReport, Held, compare
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
    report.save(tmp_path)
    told = json.loads((tmp_path / "comparison.json").read_text())
    assert len(told["rows"]) == len(report.rows) and told["about"]["steps"] == 4
    pytest.importorskip("matplotlib")
    plot_comparison(report, tmp_path / "comparison.png")
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_refused(tiny_llama: Path) -> None:
    held = Held({"law": noise(4)}, {"law": noise(4)})
    with refused(ConfigurationError, "unknown methods ['prompt']", "donor"):
        compare(tiny_llama / "recipient", noise(), None, held, methods=["prompt"])
    with refused(ConfigurationError, "equal time is that of full fine-tuning", "'full'"):
        compare(tiny_llama / "recipient", noise(), None, held, methods=["donor"])
    with refused(ConfigurationError, "need general text"):
        compare(tiny_llama / "recipient", noise(), None, held)
