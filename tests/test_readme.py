"""What README and docs show works as it stands there, with stand-ins for the names of real repositories."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from tests.helpers import tiny_gpt2_model, write_tokenizer
from tests.hub_server import ALICE, HubServer
from transplant_hf import Donor, cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LAYERS = range(4, 7)


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a `.pt` donor in it, and the recipient it came from."""
    source = tiny_gpt2_model(seed=5, n_layer=12, n_positions=512)
    torch.save([source.transformer.h[n].state_dict() for n in LAYERS], tmp_path / "donor_layers.pt")
    tiny_gpt2_model(seed=6, n_layer=12, n_positions=512).save_pretrained(tmp_path / "recipient")
    write_tokenizer(tmp_path / "recipient")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def snippet(name: str) -> str:
    found = re.search(rf"<!-- snippet: {name} -->\n```python\n(.*?)```", README, re.DOTALL)
    assert found, f"README has no snippet {name}"
    return found[1]


@pytest.mark.hub
def test_the_first_screen(desk: Path, hub: HubServer, as_user: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """The first snippet prints the layer map that is shown below it, with the rows of the donor marked."""
    as_user(ALICE)
    hub.add_repo("openai-community/gpt2", desk / "recipient")
    donor = Donor.from_model(tiny_gpt2_model(seed=5, n_layer=12, n_positions=512), layers=LAYERS, name="gpt2-law")
    donor.save_pretrained(desk / "gpt2-law", position=10, recipient="openai-community/gpt2")
    hub.add_repo("alice/gpt2-law", desk / "gpt2-law")
    code = snippet("load").replace("user/", "alice/")
    assert len([line for line in code.splitlines() if line.strip()]) == 4
    exec(compile(code, "README", "exec"), {})  # noqa: S102 - our own README
    shown = re.search(r"```text\n(.*?)```", README, re.DOTALL)
    assert shown is not None and capsys.readouterr().out.startswith(shown[1])
    assert sum("|" in line for line in shown[1].splitlines()) == len(LAYERS)


def test_the_markers_of_the_two_commands_are_there() -> None:
    """CI reads and runs what follows them."""
    assert re.findall(r"<!-- command: (\w+) -->\n```bash\npython3 -m venv", README) == ["demo", "test"]


def test_it_is_short() -> None:
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    assert len(prose.replace("|", " ").split()) < 900


@pytest.mark.hub
def test_convert_push_pull_and_pipeline_in_ten_lines(
    desk: Path, hub: HubServer, as_user: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    as_user(ALICE)
    commit = hub.add_repo("openai-community/gpt2", desk / "recipient")
    code = snippet("share").replace("user/gpt2-law", "alice/gpt2-law-readme")
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    known: dict[str, Any] = {}
    exec(compile(code, "README", "exec"), known)  # noqa: S102 - our own README
    assert isinstance(known["model"], GPT2LMHeadModel)
    assert known["model"].config.n_layer == 15
    assert known["model"].transplant_config.recipient_revision == commit
    assert known["model"].layer_map[1] == ("gpt2-law-readme", 4)
    assert "The court" in capsys.readouterr().out
    assert json.loads((desk / "gpt2-law" / "config.json").read_text())["recipient_revision"] == commit


def test_the_commands_that_are_shown(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = [
        line for line in README.splitlines() if line.startswith(("transplant-hf convert", "transplant-hf inspect"))
    ]
    assert len(shown) == 2
    for line in shown:
        words = shlex.split(line.replace("openai-community/gpt2", "recipient"), comments=True)
        assert cli.main(words[1:]) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert "layer 0 gives equal outputs" in printed
    assert AutoModelForCausalLM.from_pretrained(desk / "gpt2-law").config.n_layer == 15


def run_script(*options: str, monkeypatch: pytest.MonkeyPatch) -> int:
    script = ROOT / "conversion_scripts" / "convert_not_checkpoints.py"
    monkeypatch.setattr(sys, "argv", [str(script), "donors", *options])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    return int(str(ended.value.code))


def test_the_script_for_the_authors_donors(
    desk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (desk / "checkpoints" / "gpt2").mkdir(parents=True)
    shutil.copy(desk / "donor_layers.pt", desk / "checkpoints" / "gpt2")
    metadata = {"layer_indices": [4, 5, 6], "perplexity": 21.5, "method": "in place"}
    (desk / "checkpoints" / "gpt2" / "donor_metadata.json").write_text(json.dumps(metadata))
    options = ["--source", "checkpoints", "--only", "gpt2", "--recipient", "gpt2=recipient", "--verify", "--json"]
    assert run_script(*options, monkeypatch=monkeypatch) == 0
    assert json.loads(capsys.readouterr().out)[0]["layer_indices"] == [4, 5, 6]
    record = json.loads((desk / "donors" / "not-gpt2" / "donor_config.json").read_text())
    assert record["metadata"] == metadata
    assert record["name"] == "not-gpt2"
    config = json.loads((desk / "donors" / "not-gpt2" / "config.json").read_text())
    assert config["donors"][0]["position"] == 1


@pytest.mark.parametrize("recipient", ["gpt9=x", "gpt2"])
def test_the_script_refuses_unknown_recipients(
    recipient: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_script("--recipient", recipient, monkeypatch=monkeypatch) == 2
    assert f"must be one of gpt2, tinyllama, gptoss, then = and a model; got {recipient!r}" in capsys.readouterr().err


def test_the_script_says_what_is_missing(
    desk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_script("--source", "recipient", monkeypatch=monkeypatch) == 1
    assert "gpt2/donor_layers.pt" in capsys.readouterr().err
    assert not (desk / "donors").exists()


def test_every_file_that_is_linked_is_there() -> None:
    for page in (
        ROOT / "README.md",
        *(ROOT / "docs").glob("*.md"),
        *ROOT.glob("[A-Z]*.md"),
        ROOT / "benchmarks" / "README.md",
    ):
        for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_test_that_docs_name_is_there() -> None:
    text = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text)
    assert named
    for path, test in named:
        assert (ROOT / path).exists(), path
        assert not test or f"def {test}(" in (ROOT / path).read_text(encoding="utf-8"), f"{path}::{test}"
