"""The whole demo with a tiny budget: what it leaves, what it reports, and that a second run reuses it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

import transplant_hf.demo.run as run
from transplant_hf.demo import DemoBudget, DemoReport, print_report, run_demo
from transplant_hf.demo.donor import with_untrained_donor
from transplant_hf.demo.stages import STAMP, clear_stage, run_stage
from transplant_hf.errors import ConfigurationError, TransplantError

TINY = DemoBudget(
    english_characters=30_000, source_characters=30_000, held_out_characters=3_000, vocabulary_size=300,
    hidden_size=16, intermediate_size=32, recipient_layers=3, attention_heads=2, context=32, batch_size=4,
    recipient_steps=3, donor_layers=2, donor_position=2, donor_steps=3, new_tokens=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def report(folder: Path) -> DemoReport:
    return run_demo(folder, quiet=True, budget=TINY)


def test_report(report: DemoReport, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [source for source, _ in report.layers] == ["recipient"] * 2 + ["python-source"] * 2 + ["recipient"]
    assert report.position == 2
    assert report.recipient_unchanged
    assert report.perplexities[0].source != report.perplexities[1].source
    assert not any(stage.reused for stage in report.stages)
    assert json.loads(json.dumps(report.to_dict()))["donor"] == str(folder / "donor")
    print_report(report)
    printed = capsys.readouterr().out
    for expected in (
        "Perplexity on held-out text",
        report.layer_map,
        str(folder / "donor"),
        "equals the recipient",
    ):
        assert expected in printed


def test_folder_holds_recipient_and_donor_only(report: DemoReport, folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["donor", "recipient"]
    assert AutoTokenizer.from_pretrained(folder / "donor").eos_token_id == 0


def test_second_run_reuses(report: DemoReport, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(run, "build_recipient", refuse)
    monkeypatch.setattr(run, "build_donor", refuse)
    again = run_demo(folder, quiet=True, budget=TINY)
    assert all(stage.reused for stage in again.stages)
    # Not to the last bit: the number of threads may be another one this time.
    for row, first in zip(again.perplexities, report.perplexities, strict=True):
        assert (row.english, row.source) == pytest.approx((first.english, first.source), rel=1e-4)


def test_untrained_donor_is_identity_and_alone_trainable(report: DemoReport, folder: Path) -> None:
    recipient = LlamaForCausalLM.from_pretrained(folder / "recipient")
    before = {name: tensor.clone() for name, tensor in recipient.state_dict().items()}
    model = with_untrained_donor(recipient, TINY)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=tokens).logits, recipient(input_ids=tokens).logits)
    trainable = {name.split(".")[2] for name, tensor in model.named_parameters() if tensor.requires_grad}
    assert trainable == {"2", "3"}
    for name, tensor in recipient.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "demo").write_text("")
    with pytest.raises(ConfigurationError, match="is a file"):
        run_demo(tmp_path / "demo", quiet=True, budget=TINY)


def test_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / "recipient" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("precious")
    for fresh in (False, True):
        with pytest.raises(TransplantError, match="left alone"):
            run_demo(tmp_path, fresh=fresh, overwrite=True, quiet=True, budget=TINY)
    assert mine.read_text() == "precious"


def test_stage_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(place: Path) -> None:
        (place / "half").write_text("")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage(tmp_path, "stage", "1", fail, in_place=False)
    assert list(tmp_path.iterdir()) == []


def test_stage_is_made_again_when_its_inputs_change(tmp_path: Path) -> None:
    made = []

    def build(place: Path) -> None:
        made.append(place)

    stages = [run_stage(tmp_path, "stage", print_, build, in_place=False) for print_ in ("1", "1", "2")]
    assert [stage.reused for stage in stages] == [False, True, False]
    assert len(made) == 2
    (tmp_path / "stage" / "mine.txt").write_text("precious")
    with pytest.raises(TransplantError, match=r"mine\.txt, which the demo did not write"):
        run_stage(tmp_path, "stage", "3", build, in_place=False)
    (tmp_path / "stage" / "mine.txt").unlink()
    assert (tmp_path / "stage" / STAMP).exists()
    clear_stage(tmp_path, "stage")
    assert list(tmp_path.iterdir()) == []
