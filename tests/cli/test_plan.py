"""`plan` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import Run
from tests.helpers import loaded


def test_as_text(tiny_gpt_oss: Path, run: Run) -> None:
    donor = f"{tiny_gpt_oss / 'donor'}@1"
    words = ("--donor", donor, "--devices", 2, "--memory", "1MiB", "--context", 20)
    status, out, _ = run("plan", tiny_gpt_oss / "recipient", *words)
    assert status == 0
    lines = out.splitlines()
    assert "GptOssForCausalLM) in float32, 2 devices of 1.0 MiB; batch size 1, context 20" in lines[0]
    assert lines[1].strip().startswith("donor: layers 1, 2 of its source at position 1, ")
    table = {line.strip().split("  ")[0]: line.split() for line in lines[3:]}
    assert table["layers"][1:] == ["4", "6", "+50.0%"]
    assert table["cache"][-1].startswith("+")
    assert {"sliding attention, window 4", "full attention", "per token", "largest share"} <= set(table)
    assert [line for line in lines if line.startswith("  device ")]


def test_as_json(tiny_llama: Path, run: Run) -> None:
    status, out, _ = run("plan", tiny_llama / "donor", "--json")
    found = json.loads(out)
    assert status == 0
    model = loaded(tiny_llama)
    assert found["after"]["weights"] == {"float32": sum(p.numel() * 4 for p in model.parameters())}
    assert found["layer_map"] == [list(slot) for slot in model.layer_map]


def test_a_donor_without_a_position_goes_where_it_recommends(tiny_llama: Path, run: Run) -> None:
    status, out, _ = run("plan", tiny_llama / "recipient", "--donor", tiny_llama / "donor", "--json")
    assert status == 0
    _, alone, _ = run("plan", tiny_llama / "donor", "--json")
    assert json.loads(out)["layer_map"] == json.loads(alone)["layer_map"]


def test_what_does_not_fit_fails(tiny_llama: Path, run: Run) -> None:
    status, out, _ = run("plan", tiny_llama / "recipient", "--count", 1, "--memory", "4KiB")
    assert status == 1
    assert "problem: " in out


def test_what_is_refused_is_one_sentence(tiny_llama: Path, run: Run) -> None:
    status, out, err = run("plan", tiny_llama / "recipient", "--donor", f"{tiny_llama / 'donor'}@x")
    assert (status, out) == (1, "")
    assert "DONOR or DONOR@POSITION" in err and "donor@x" in err
    status, out, _ = run("plan", tiny_llama / "recipient", "--count", 2, "--memory", "much", "--json")
    assert status == 1
    assert json.loads(out)["error"] == "ConfigurationError"


def test_the_memory_of_a_training_run(tiny_llama: Path, run: Run) -> None:
    words = ("--train", "--count", 2, "--context", 16, "--batch-size", 2, "--blocks", 10, "--optim", "adafactor")
    status, out, _ = run("plan", tiny_llama / "recipient", *words)
    assert status == 0
    assert "training with adafactor: 10 blocks, batches of 2 x 16 tokens" in out
    assert "streamed prefix" in out
    status, out, _ = run("plan", tiny_llama / "recipient", *words, "--json", "--memory", "1MiB")
    found = json.loads(out)
    assert (status, found["ok"]) == (1, False)  # the allocator alone keeps more
    assert found["training"]["resident"] > found["training"]["streamed"]
