"""Donors beside adapters and fine-tuning."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import copied, plain, refused
from tests.training.helpers import noise
from transplant_hf import ConfigurationError
from transplant_hf.comparison import METHODS, ComparisonReport, RunResult, compare, compare_texts
from transplant_hf.comparison.methods import Setting
from transplant_hf.comparison.study import _next_rate, _rows
from transplant_hf.plots import plot_comparison

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    return copied(tiny_llama, tmp_path_factory.mktemp("comparison") / "family")


FIELDS: dict[str, Any] = {
    "learning_rates": [1e-2],
    "steps": 4,
    "batch_size": 4,
    "replay_shares": [0.25],
    "layers": 2,
    "rank": 2,
    "quiet": True,
}


@pytest.fixture(scope="module")
def report(family: Path) -> ComparisonReport:
    return compare(family / "recipient", noise(60), noise(60, seed=2, name="general"), output=family / "out", **FIELDS)


def test_every_method_is_beside_the_controls(report: ComparisonReport) -> None:
    labels = [row.label for row in report.rows]
    assert labels[:2] == ["recipient, untouched", "untrained copy"]
    for method in METHODS.values():
        assert any(label.startswith(method.what) for label in labels)
    assert sum("standalone" in label for label in labels) == 6, "three views, at equal steps and at equal time"


def test_learning_rates_are_chosen_on_the_validation_text() -> None:
    results = [
        RunResult("donor", view, rate, 4, 0.0, validation=loss, test={"domain": -loss})
        for rate, loss in ((1e-3, 3.0), (1e-2, 2.0), (1e-1, 4.0))
        for view in ("", "at 0.75")
    ]
    rows = _rows([METHODS["donor"]], {"donor": results}, "steps")
    assert [(row.result.learning_rate, row.result.view) for row in rows] == [(1e-2, ""), (1e-2, "at 0.75")]


def test_the_best_learning_rate_is_not_at_the_edge_of_those_tried() -> None:
    def search(best: float, first: float) -> list[float]:
        results: list[RunResult] = []
        rate: float | None = first
        while rate is not None:
            loss = abs(math.log(rate / best))
            failed = "diverged" if rate > best * 20 else None
            # Another view of the same run does not decide.
            results.append(RunResult("donor", "", rate, 4, 0.0, validation=loss, failed=failed))
            results.append(RunResult("donor", "at 0.75", rate, 4, 0.0, validation=-rate, failed=failed))
            rate = _next_rate(results)
        return [result.learning_rate for result in results[::2]]

    assert search(3e-3, 3e-3) == [3e-3, 1e-3, 1e-2]
    assert search(1e-4, 3e-4) == [3e-4, 1e-4, 3e-5]
    assert search(3e-2, 3e-3) == [3e-3, 1e-3, 1e-2, 3e-2, 1e-1]
    assert search(3e-3, 3e-1) == [3e-1, 1e-1, 3e-2, 1e-2, 3e-3, 1e-3]
    assert len(search(1e-9, 1e-2)) == 6


def test_each_method_is_also_measured_with_less_of_what_it_learned(report: ComparisonReport) -> None:
    views = {run.method: run for run in report.runs if (run.view, run.steps) == ("at 0.75", 4)}
    assert set(views) == set(METHODS) - {"standalone"}
    for method, run in views.items():
        key = (method, run.learning_rate, 4, "")
        whole = next(one for one in report.runs if (one.method, one.learning_rate, one.steps, one.view) == key)
        assert run.forgetting != whole.forgetting and run.seconds == whole.seconds


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"standalone"}))
def test_every_method_starts_as_the_recipient(name: str, tiny_llama: Path) -> None:
    recipient, ids = plain(tiny_llama / "recipient").eval(), torch.arange(8)[None]
    prepared = METHODS[name].prepare(Setting(lambda: plain(tiny_llama / "recipient"), recipient, 2, 2))
    with torch.no_grad():
        assert torch.allclose(prepared.model.eval()(ids).logits, recipient(ids).logits, atol=1e-6)


def test_less_of_what_was_learned_lies_between_the_recipient_and_the_whole(tiny_llama: Path) -> None:
    recipient = tiny_llama / "recipient"
    ids = torch.arange(8)[None]
    for name in ("donor", "lora", "full"):
        prepared = METHODS[name].prepare(Setting(lambda: plain(recipient), plain(recipient).eval(), 2, 2))
        model = prepared.model.eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1)
            whole = model(ids).logits
            assert prepared.at_strength is not None
            with prepared.at_strength(0.0) as scaled:
                assert torch.allclose(scaled(ids).logits, plain(recipient)(ids).logits, atol=1e-6), name
            with prepared.at_strength(0.5) as scaled:
                assert not torch.allclose(scaled(ids).logits, whole, atol=1e-3), name
            assert torch.equal(model(ids).logits, whole), name


def test_what_can_be_taken_out_again_is_exact(report: ComparisonReport) -> None:
    for run in report.runs:
        if run.method == "full":
            assert run.removal_error is None
        else:
            assert run.removal_error is not None and run.removal_error < 1e-5


def test_costs_are_measured(report: ComparisonReport) -> None:
    runs = {run.method: run for run in report.runs if run.steps == 4}
    assert all(run.seconds > 0 and run.artifact_bytes > 0 for run in runs.values())
    assert runs["lora"].trainable_parameters < runs["donor"].trainable_parameters < runs["full"].trainable_parameters
    assert runs["donor"].cache_seconds > 0 and runs["lora"].cache_seconds == 0


def test_it_can_be_printed_saved_and_drawn(report: ComparisonReport, tmp_path: Path) -> None:
    table = str(report)
    assert "full fine-tuning" in table and "impossible" in table
    assert table.count("at equal steps, 25% general text replayed:") == table.count("at equal time, 25%") == 1
    assert max(map(len, table.splitlines())) <= 100
    long = dataclasses.replace(report, rows=tuple(dataclasses.replace(row, label=row.label * 3) for row in report.rows))
    assert max(map(len, str(long).splitlines())) <= 100
    hulls = table.partition("\n\n")[2].splitlines()
    assert hulls[0].split() == ["gain", "at", "forgetting", "steps", "replay", "<=", "0.01", "<=", "0.03", "<=", "0.1"]
    full = [run for run in report.runs if (run.method, run.steps) == ("full", 4)]
    gains = [run.gain for run in full if run.gain is not None and run.most_forgotten <= 0.1]
    shown = next(line.split() for line in hulls if line.startswith("full ") and line.split()[1] == "4")
    assert shown[-1] == (f"{max(gains):.3f}" if gains else "none")
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


def test_lora_of_the_last_layers_is_on_all_their_linear_layers(tiny_llama: Path) -> None:
    recipient = plain(tiny_llama / "recipient")
    model = METHODS["lora-last"].prepare(Setting(lambda: recipient, plain(tiny_llama / "recipient"), 2, 2)).model
    adapted = {name.partition(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    assert {name.split("layers.")[1][0] for name in adapted} == {"2", "3"} and len(adapted) == 2 * 7


def test_each_run_is_a_file_and_is_not_made_again(
    report: ComparisonReport, family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [json.loads(path.read_text()) for path in (family / "out" / "runs").iterdir()]
    untouched = report.rows[0].result.test
    for run in files:
        assert run["gain"] == pytest.approx(math.log(untouched["domain"] / run["test"]["domain"]))
        assert run["forgetting"] == pytest.approx(math.log(run["test"]["general"] / untouched["general"]))
        assert {"seconds", "peak_memory_bytes", "trainable_parameters", "artifact_bytes", "seed", "method"} <= set(run)
    assert json.loads((family / "out" / "comparison.json").read_text())["about"]["steps"] == 4
    monkeypatch.setattr("transplant_hf.comparison.study.run_method", lambda *args: pytest.fail("it trained"))
    texts = noise(60), noise(60, seed=2, name="general")
    again = compare(family / "recipient", *texts, output=family / "out", resume=True, **FIELDS)
    assert again.to_dict()["rows"] == report.to_dict()["rows"]
    with refused(ConfigurationError, "another setup: batch_size 4 there, 2 now"):
        compare(family / "recipient", *texts, output=family / "out", resume=True, **{**FIELDS, "batch_size": 2})
    one = copied(family / "out", family.parent / "incomplete")
    next((one / "runs").glob("donor-at-0.75-lr0.01-4steps-*.json")).unlink()
    with pytest.raises(pytest.fail.Exception, match="it trained"):
        compare(family / "recipient", *texts, output=one, resume=True, **FIELDS)


def test_old_names_of_arguments_are_accepted(family: Path) -> None:
    with pytest.warns(FutureWarning, match="batch= is called batch_size= now"), refused(ConfigurationError, "got 0"):
        compare_texts(family / "recipient", noise(), noise(), batch=0)


def test_what_is_refused(tiny_llama: Path) -> None:
    with refused(ConfigurationError, "unknown methods ['prompt']", "donor"):
        compare(tiny_llama / "recipient", noise(), noise(), methods=["prompt"])
    with refused(ConfigurationError, "equal time is that of full fine-tuning", "'full'"):
        compare(tiny_llama / "recipient", noise(), noise(), methods=["donor"])


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"learning_rates": [1e-3, -1.0]}, "finite numbers above 0, got [0.001, -1.0]"),
        ({"learning_rates": [float("nan")]}, "finite numbers above 0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"replay_shares": [1.0]}, "at least 0 and below 1"),
        ({"layers": 9}, "layers=9, but"),
    ],
)
def test_numbers_out_of_range_are_refused_before_any_training(
    wrong: dict[str, Any], told: str, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transplant_hf.comparison.study.run_method", lambda *args: pytest.fail("it trained"))
    with refused(ConfigurationError, told):
        compare(tiny_llama / "recipient", noise(), noise(seed=2), **wrong)


def test_a_library_that_is_missing_is_named_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    for load in ("transplant_hf.comparison.study.load_model", "transplant_hf.comparison.study.model_and_tokenizer"):
        monkeypatch.setattr(load, lambda *args, **kwargs: pytest.fail("a model was loaded"))
    without = "donor donor-end donor-spread replace-spread standalone last full"
    needing = "lora and lora-matched and lora-last needs peft"
    with refused(ConfigurationError, needing, f"compare without: methods {without}"):
        compare("recipient", "text.txt", "general.txt")
