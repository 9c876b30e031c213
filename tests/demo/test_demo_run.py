"""The whole demo at a tiny size: what it writes, what it reports, and that a second run reuses it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from transplant_hf.demo import DemoReport, DemoSettings, run, run_demo
from transplant_hf.errors import ConfigurationError

TINY = DemoSettings(
    train_characters=30_000, test_characters=3_000, vocab_size=300, hidden_size=16, num_layers=3, block_length=32,
    batch_size=4, recipient_steps=3, donor_layers=2, donor_steps=3, new_tokens=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file of the user in it."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "recipient").mkdir()
    (folder / "recipient" / "mine.txt").write_text("precious")
    return folder


@pytest.fixture(scope="module")
def report(folder: Path) -> DemoReport:
    with pytest.raises(ConfigurationError, match="not empty"):
        run_demo(folder, quiet=True, settings=TINY)
    return run_demo(folder, overwrite=True, quiet=True, settings=TINY)


def test_files_of_the_user_stay(report: DemoReport, folder: Path) -> None:
    assert (folder / "recipient" / "mine.txt").read_text() == "precious"


def test_report(report: DemoReport, folder: Path) -> None:
    assert report.recipient_unchanged
    before, after, off = report.perplexities.values()
    assert before == off
    assert before["Python source"] != after["Python source"]
    assert report.donor_parameters > 0
    assert json.loads(json.dumps(report.to_dict()))["donor"] == str(folder / "donor")
    for expected in ("Perplexity on held-out text", report.layer_map, str(folder / "donor"), "equals the recipient"):
        assert expected in str(report)


def test_folder_holds_texts_recipient_and_donor(report: DemoReport, folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["demo.json", "donor", "recipient", "texts"]
    assert AutoTokenizer.from_pretrained(folder / "donor").eos_token_id == 0


def test_second_run_reuses_what_is_finished(report: DemoReport, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []
    monkeypatch.setattr(run, "train_recipient", lambda *args: trained.append("recipient") or 1.0)
    monkeypatch.setattr(run, "_train_donor", lambda *args: trained.append("donor") or 1.0)
    again = run_demo(folder, quiet=True, settings=TINY)
    assert trained == []
    assert again.perplexities == report.perplexities
    assert again.seconds == report.seconds
    monkeypatch.setattr(run, "write_texts", lambda folder, *sizes: {path.stem: path for path in folder.iterdir()})
    monkeypatch.setattr(run, "_measure", lambda *args: None)
    run_demo(folder, quiet=True, settings=TINY, fresh=True)
    assert trained == ["recipient", "donor"]


def test_other_settings_train_again(report: DemoReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = tmp_path / "demo.json"
    record.write_text(json.dumps({"fingerprint": "1", "seconds": {"recipient": 1.0}}))
    assert run._finished(record, "1") == {"recipient": 1.0}
    assert run._finished(record, "2") == {}
    record.write_text("not JSON")
    assert run._finished(record, "1") == {}


def test_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "demo").write_text("")
    with pytest.raises(ConfigurationError, match="is a file"):
        run_demo(tmp_path / "demo", quiet=True, settings=TINY)
