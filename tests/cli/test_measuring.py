"""`evaluate` and `sweep` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import Run


def test_evaluate(tiny_llama: Path, text: Path, run: Run) -> None:
    words = ("evaluate", tiny_llama / "donor", "--text", text, "--text", f"again={text}", "--block-length", 16)
    status, out, _ = run(*words, "--stride", 8, "--dtype", "float32")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()] == ["perplexity", "recipient", "with", "change", "tokens"]
    status, out, _ = run(*words, "--max-tokens", 20, "--json")
    found = json.loads(out)
    assert status == 0
    assert {(row["model"], row["text"], row["tokens"]) for row in found["rows"]} == {
        (model, name, 19) for model in ("recipient", "with donor") for name in ("hamlet", "again")
    }


def test_strengths_without_donors(tiny_llama: Path, text: Path, run: Run) -> None:
    status, _, err = run(
        "evaluate", tiny_llama / "recipient", "--text", text, "--block-length", 16, "--strengths", 0, 1
    )
    assert status == 1 and "the strength of donors cannot be set" in err and "--donor" in err


def test_sweep(tiny_llama: Path, text: Path, run: Run) -> None:
    words = ("sweep", tiny_llama / "recipient", tiny_llama / "donor", "--text", text, "--block-length", 16)
    status, out, _ = run(*words, "--strengths", 1, 0.5)
    assert status == 0
    assert out.count("*") == 2
    assert [line.split()[0] for line in out.splitlines()[2:]] == ["0", "1", "2", "3", "4", "recipient"]
    status, out, _ = run(*words, "--positions", 1, 3, "--mode", "replace", "--json")
    found = json.loads(out)
    # Two layers at 3 of 4 cannot all be replaced.
    assert [(row["position"], row["perplexity"] is None) for row in found["rows"]] == [(1, False), (3, True)]
    assert found["mode"] == "replace"
    assert status == 0
    status, out, _ = run(*words, "--positions", 9)
    assert status == 1
    assert "donor cannot go to position 9: position 9 of donor 'donor' is outside 0..4" in out


def test_options_of_texts_reach_those_that_they_apply_to(tiny_llama: Path, text: Path, run: Run) -> None:
    words = ("evaluate", tiny_llama / "donor", "--text", text, "--block-length", 16, "--column", "body")
    status, _, err = run(*words)
    assert status == 2 and f"--column applies to none of the texts: {text}" in err
    table = text.with_name("rows.jsonl")
    table.write_text(json.dumps({"title": "x", "body": text.read_text()}))
    status, out, _ = run(*words, "--text", table, "--json")
    rows = json.loads(out)["rows"]
    assert status == 0 and len({row["perplexity"] for row in rows if row["model"] == "recipient"}) == 1


def test_what_is_refused_is_one_sentence(tiny_llama: Path, text: Path, run: Run) -> None:
    status, out, err = run("evaluate", tiny_llama / "donor", "--text", text, "--text", text)
    assert (status, out) == (1, "")
    assert "two texts are named 'hamlet'" in err
    status, out, _ = run("evaluate", tiny_llama / "donor", "--text", text.with_name("no.txt"), "--json")
    assert status == 1
    assert json.loads(out)["error"] == "DataError"
