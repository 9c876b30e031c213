"""`extract`, `train`, `recover` and `compare` from the command line: on a folder, a thin repo and a Hub id."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Run
from tests.helpers import Shelf
from tests.hub_server import ALICE
from transplant_hf import Donor
from transplant_hf.comparison import RunResult

_TRAINED = ("--steps", "4", "--batch-size", "2", "--block-length", "16", "--count", "2", "--json")


def test_train_on_a_folder(family: Path, text: Path, run: Run) -> None:
    words = ("train", family / "recipient", text, family / "new", "--held-out", text, "--license", "mit", *_TRAINED)
    status, out, _ = run(*words, "--general", text, "--mode", "replace")
    found = json.loads(out)
    assert status == 0 and found["steps"] == 4
    assert set(found["perplexity"]) == {"recipient", "with donor"}
    assert found["held_out"] == {"hamlet": found["perplexity"]}
    donor = Donor.from_pretrained(family / "new")
    assert (donor.num_layers, donor.position, donor.mode, donor.name) == (2, 2, "replace", "new")
    assert not (family / "new.training").exists()
    status, out, _ = run(*words[:-1], "--overwrite", "--position", 1, "--cache-prefix", "disk")
    assert status == 0 and ", with donor " in out and "strength            new 0.75" in out
    card = (family / "new" / "README.md").read_text()
    assert "license: mit" in card and "## Training" in card and "claims" not in card


def test_train_on_a_thin_repo_adds_a_donor(family: Path, text: Path, run: Run) -> None:
    status, out, _ = run("train", family / "donor", text, family / "both", *_TRAINED)
    assert status == 0
    assert json.loads(out)["strength"] == {"donor": 1.0, "both": 0.75}
    assert {path.name for path in (family / "both").iterdir() if path.is_dir()} == {"donor", "both"}


@pytest.mark.hub
def test_train_and_recover_on_the_hub(
    shelf: Shelf,
    as_user: Any,
    text: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    as_user(ALICE)
    shelf.put_base()
    new = f"{shelf.law}-trained"
    status, _, _ = run("train", shelf.base, text, "--push-to-hub", new, *_TRAINED)
    assert status == 0 and Donor.from_pretrained(new).record.source_revision == shelf.base_commit
    words = ("--steps", 2, "--batch-size", 2, "--block-length", 16, "--held-out", text, "--json")
    status, out, _ = run("recover", new, text, tmp_path / "recovered", *words)
    assert status == 0 and list(json.loads(out)["perplexity"]) == ["recipient", "before", "after"]
    config = json.loads((tmp_path / "recovered" / "config.json").read_text())
    assert config["recipient_revision"] == shelf.base_commit
    assert sorted(spec["name"] for spec in config["donors"]) == sorted(
        [new.partition("/")[2], "recovered-2", "recovered-3"]
    )


def test_extract(family: Path, run: Run) -> None:
    status, out, _ = run(
        "extract", family / "recipient", family / "taken", "--count", 2, "--init", "identity", "--json"
    )
    assert status == 0 and json.loads(out)
    assert Donor.from_pretrained(family / "taken").layer_indices == [1, 2]


@pytest.mark.parametrize("asked", ["recipient", "donor"])
def test_compare(asked: str, family: Path, text: Path, tmp_path: Path, run: Run) -> None:
    words = ("--general", text, "--methods", "donor", "--learning-rates", 1e-2, "--steps", 2, "--batch-size", 2)
    words += ("--block-length", 16, "--count", 2, "--no-equal-time", "--replay-shares", 0, "--output", tmp_path / "out")
    status, out, _ = run("compare", family / asked, text, *words)
    assert status == 0 and "donor at L-1" in out
    assert ("with donor, as loaded" in out) == (asked == "donor")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "comparison.json",
        "comparison.png",
        "comparison.txt",
        "runs",
    }
    runs = [json.loads(path.read_text()) for path in sorted((tmp_path / "out" / "runs").iterdir())]
    assert [(one["method"], one["view"], one["steps"]) for one in runs] == [("donor", "at 0.75", 2), ("donor", "", 2)]
    assert all(set(one["test"]) == {"domain", "general"} for one in runs)


def test_a_comparison_that_is_stopped_keeps_its_runs(
    family: Path, text: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(method: Any, setting: Any, rate: float, budget: Any, *texts: Any) -> list[RunResult]:
        if rate == 3.0:
            raise KeyboardInterrupt
        test = {"domain": 7.5, "general": 9.0}
        return [RunResult(method.name, "", rate, budget.steps, budget.replay_share, test=test)]

    monkeypatch.setattr("transplant_hf.comparison.study.run_method", trained)
    words = ("compare", family / "recipient", text, "--general", text, "--methods", "donor", "--no-equal-time")
    words += ("--block-length", 16, "--count", 2, "--learning-rates", 1, 2, 3)
    status, out, err = run(*words, "--output", tmp_path / "out")
    assert (status, out) == (130, "") and "Traceback" not in err
    files = sorted((tmp_path / "out" / "runs").iterdir())
    assert [json.loads(path.read_text())["learning_rate"] for path in files] == [1.0, 2.0]
    _, _, err = run(*words)
    assert err.count("domain 7.50, general 9.00") == 2


def test_what_is_refused_is_one_sentence(
    family: Path, text: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    assert run("train", family / "recipient", text)[0] == 2
    short = tmp_path / "short.txt"
    short.write_text("To be")
    for words, told in (
        (("train", family / "recipient", short, tmp_path / "out", *_TRAINED[:-1]), "has 5 tokens"),
        (("train", family / "recipient", tmp_path / "no.txt", tmp_path / "out"), "no.txt"),
        (("train", family / "recipient", text, tmp_path / "out", "--position", 9, *_TRAINED[:-1]), "outside 0..4"),
        (
            ("train", family / "recipient", text, "--push-to-hub", "alice/x", *_TRAINED[:-1]),
            "name a recipient on the Hub",
        ),
        (("train", family / "recipient", text, tmp_path / "out", "--license", "see file"), "such as 'mit'"),
        (("recover", family / "recipient", text, tmp_path / "out", "--block-length", 16), "has no donors"),
    ):
        status, _, err = run(*words)
        assert status == 1 and told in err and "Traceback" not in err, err
    assert set(tmp_path.iterdir()) == before | {short}
