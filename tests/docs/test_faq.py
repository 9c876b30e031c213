"""The FAQ quotes errors as they are raised: each is provoked, and none is left out."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.docs.provoked import PROVOKED, Desk, make_desk
from tests.helpers import copied, edit_json, run_python
from tests.hub_server import HubServer
from transplant_hf import TransplantError

FAQ = (Path(__file__).parents[2] / "docs" / "faq.md").read_text(encoding="utf-8")
QUOTED = dict(re.findall(r"<!-- error: (\w+) -->\n```text\n(.*?)\n```", FAQ, re.DOTALL))
# Raised by Transformers, in a process that does not know this package.
WITHOUT_IMPORT = ("without_the_import", "without_the_import_or_code")


def said(quote: str, message: str) -> bool:
    """Whether a message is what was quoted, `…` standing for what differs from run to run."""
    pattern = ".+?".join(map(re.escape, quote.split("…")))
    return re.fullmatch(pattern, message, re.DOTALL) is not None


def test_every_quoted_error_can_be_provoked() -> None:
    assert set(QUOTED) == {*PROVOKED, *WITHOUT_IMPORT}
    assert len(re.findall("^### ", FAQ, re.MULTILINE)) == FAQ.count("```text") == len(QUOTED)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_desk(tmp_path_factory.mktemp("made"))


@pytest.mark.hub
@pytest.mark.usefixtures("as_user")  # nobody is logged in
@pytest.mark.parametrize("name", PROVOKED)
def test_the_error_is_as_it_is_quoted(
    name: str, made: Path, tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(made, tmp_path / "desk")
    monkeypatch.chdir(folder)
    with pytest.raises(TransplantError) as caught:
        PROVOKED[name](Desk(folder, hub))
    message = str(caught.value).replace(f"{folder}/", "").replace(f"{made}/", "")
    assert said(QUOTED[name], message), f"{name}\nquoted: {QUOTED[name]}\nraised: {message}"


def test_what_transformers_says_without_the_import(tiny_llama: Path, tmp_path: Path) -> None:
    code = """
import json, os, sys
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    os.chdir(folder)
    try:
        AutoModelForCausalLM.from_pretrained("law")
    except ValueError as error:
        print(f"\\n{json.dumps([str(error)])}")  # after a question that Transformers asks
"""
    copied(tiny_llama / "donor", tmp_path / "law")
    edit_json(copied(tiny_llama / "donor", tmp_path / "without" / "law") / "config.json", auto_map=None)
    printed = run_python(code, tmp_path, tmp_path / "without").splitlines()
    messages = [json.loads(line)[0] for line in printed if line.startswith("[")]
    for name, message in zip(WITHOUT_IMPORT, messages, strict=True):
        assert said(QUOTED[name], message.strip()), message
