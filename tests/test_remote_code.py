"""`trust_remote_code=True` without the import: a few lines in the repository, run only where they are needed."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, pipeline

from tests.helpers import Shelf, edit_json, loaded, logits_of, run_python, two_donors
from tests.hub_server import json_result, run_with_hub
from transplant_hf import AutoModelWithTransplant, Donor
from transplant_hf.donor.entry import AUTO_MAP, CODE_FILE

load = AutoModelWithTransplant.from_pretrained

# Loads by every class that `auto_map` names, and says what was found.
PROBE = """
import json, sys
from transformers import (
    AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification,
    AutoModelForTokenClassification, pipeline,
)
from transformers.utils import logging
logging.disable_progress_bar()
assert "transplant_hf" not in sys.modules
name, options = sys.argv[1], json.loads(sys.argv[2])
only = options.pop("only", None)
found = {}
classes = (AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification,
           AutoModelForTokenClassification)
for class_ in classes:
    if only in (None, class_.__name__):
        loaded = class_.from_pretrained(name, trust_remote_code=True, **options)
        found[class_.__name__] = [type(loaded).__name__, len(getattr(loaded, "layer_map", ()))]
if only in (None, "pipeline"):
    generate = pipeline("text-generation", model=name, trust_remote_code=True, **options)
    assert generate("Hi", do_sample=False)[0]["generated_text"].startswith("Hi")
    found["pipeline"] = [type(generate.model).__name__, len(generate.model.layer_map)]
print(json.dumps(found))
"""
ALL = {
    "AutoConfig": ["TransplantConfig", 0],
    "AutoModel": ["LlamaModel", 6],
    "AutoModelForCausalLM": ["LlamaForCausalLM", 6],
    "AutoModelForSequenceClassification": ["LlamaForSequenceClassification", 6],
    "AutoModelForTokenClassification": ["LlamaForTokenClassification", 6],
    "pipeline": ["LlamaForCausalLM", 6],
}
# As on a machine where nobody installed it; an entry of None in sys.modules would raise something else.
NOT_INSTALLED = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "transplant_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
"""


# Runs code in children, which share what takes seconds to import.
FORKED = """
import os, sys, traceback
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, pipeline

def run(code, offline):
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0
        return
    constants.HF_HUB_OFFLINE = offline  # as the variable does in a new process
    try:
        exec(code, {})
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
"""


def probe(name: object, only: str | None = None, **options: object) -> dict[str, list[object]]:
    printed = run_python(PROBE, str(name), json.dumps({"only": only, **options}))
    return json.loads(printed.splitlines()[-1])


# -- In folders ------------------------------------------------------------------------------------------------------


@pytest.mark.slow  # on the Hub they are tried below
def test_a_donor_repo_by_every_class(tiny_llama: Path) -> None:
    assert probe(tiny_llama / "donor") == ALL


@pytest.mark.slow
@pytest.mark.parametrize("only", ["AutoModelForTokenClassification", "pipeline"])
def test_each_class_may_be_the_first(tiny_llama: Path, only: str) -> None:
    assert probe(tiny_llama / "donor", only) == {only: ALL[only]}


@pytest.mark.slow
def test_other_transplants(tiny_llama: Path, inverse_gpt2: Path, tmp_path: Path) -> None:
    two_donors(tiny_llama).save_pretrained(tmp_path / "two", thin=True)
    assert probe(tmp_path / "two", "pipeline") == {"pipeline": ["LlamaForCausalLM", 7]}
    loaded(inverse_gpt2).save_pretrained(tmp_path / "surgery")
    assert probe(tmp_path / "surgery", "pipeline") == {"pipeline": ["GPT2LMHeadModel", 6]}


@pytest.mark.slow
def test_arguments_mean_the_same_as_with_the_import(tiny_llama: Path) -> None:
    code = """
import sys
{}
from transformers import AutoConfig, AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained(
    sys.argv[1], trust_remote_code=True, num_labels=5, attn_implementation="eager", dtype="bfloat16",
)
config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True, num_labels=5)
other = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], config=config, trust_remote_code=True)
print(model.config.num_labels, other.config.num_labels, model.config._attn_implementation, model.dtype)
print(config.to_dict())
"""
    printed = [
        run_python(code.format(start), tiny_llama / "donor")
        for start in ("import transplant_hf", "import transformers")
    ]
    assert printed[0] == printed[1]
    assert printed[0].startswith("5 5 eager torch.bfloat16")


def test_without_trust_nothing_is_run_and_without_the_package_one_reads_what_to_install(tiny_llama: Path) -> None:
    code = f"""
import sys
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=False)
except ValueError as error:
    assert "trust_remote_code=True" in str(error), error
else:
    raise AssertionError("it was loaded")
assert "transplant_hf" not in sys.modules
{NOT_INSTALLED}
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
except ImportError as error:
    print(error)
"""
    said = run_python(code, tiny_llama / "donor")
    assert "needs the Python package transplant_hf" in said and "from its own sources" in said
    assert "pip install" not in said


def test_with_the_import_the_repositorys_code_is_never_run(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nobody is asked."""
    (family / "donor" / CODE_FILE).write_text("raise RuntimeError('was run')\n")
    monkeypatch.setattr("builtins.input", lambda *question: pytest.fail(f"asked: {question}"))
    for trust in ({}, {"trust_remote_code": True}, {"trust_remote_code": False}):
        AutoConfig.from_pretrained(family / "donor", **trust)
        AutoModelForCausalLM.from_pretrained(family / "donor", **trust)
        pipeline("text-generation", model=str(family / "donor"), **trust)("Hi")


# -- On the Hub ------------------------------------------------------------------------------------------------------


@pytest.mark.hub
def test_on_the_hub_pinned_and_offline(both: Shelf, tmp_path: Path) -> None:
    both.hub.commit(both.law, {CODE_FILE: b"raise RuntimeError('a later commit')\n"})
    pinned = f"import sys\nsys.argv = ['', {both.law!r}, '{json.dumps({'revision': both.law_commit})}']\n{PROBE}"
    newest = f"""
from transformers import AutoConfig
try:
    AutoConfig.from_pretrained({both.law!r}, trust_remote_code=True)
except RuntimeError as error:
    assert "a later commit" in str(error)
else:
    raise AssertionError("the code of the newest commit did not run")
"""
    code = f"{FORKED}\nrun({newest + pinned!r}, offline=False)\nrun({pinned!r}, offline=True)"
    done = run_with_hub(both.hub, code, cache=tmp_path / "cache")
    assert json_result(done) == ALL
    assert [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")] == [ALL, ALL]


# -- What is written -------------------------------------------------------------------------------------------------


def written(folder: Path) -> dict[str, str] | None:
    """The `auto_map` of a folder, all of whose names are in its file of code."""
    found = json.loads((folder / "config.json").read_text()).get("auto_map")
    assert (folder / CODE_FILE).exists() == bool(found)
    if found:
        names = runpy.run_path(str(folder / CODE_FILE))
        assert all(reference.partition(".")[2] in names for reference in found.values())
    return found


@pytest.mark.slow
def test_round_trips_keep_it_right(tiny_llama: Path, tmp_path: Path) -> None:
    """Whoever loaded by it, thin saves name the file beside them, and native ones name none."""
    code = """
import sys
from transformers import AutoConfig, AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
model.save_pretrained(f"{sys.argv[2]}/thin", thin=True)
again = AutoModelForCausalLM.from_pretrained(f"{sys.argv[2]}/thin", trust_remote_code=True)
again.save_pretrained(f"{sys.argv[2]}/again", thin=True)
again.save_pretrained(f"{sys.argv[2]}/full")
AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True).save_pretrained(f"{sys.argv[2]}/config")
"""
    run_python(code, tiny_llama / "donor", tmp_path)
    assert written(tiny_llama / "donor") == written(tmp_path / "thin") == written(tmp_path / "again") == AUTO_MAP
    assert (tmp_path / "thin" / CODE_FILE).read_bytes() == (tmp_path / "again" / CODE_FILE).read_bytes()
    assert written(tmp_path / "full") is None
    assert written(tmp_path / "config") is None, "a configuration alone is no repository"
    assert [path.name for path in (tmp_path / "config").iterdir()] == ["config.json"], "no copy of our own code"
    assert torch.equal(logits_of(load(tmp_path / "again")), logits_of(load(tiny_llama / "donor")))
    full = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    assert not hasattr(full.config, "auto_map")


def test_every_writer(tiny_llama: Path, inverse_gpt2: Path, tmp_path: Path) -> None:
    Donor.from_pretrained(tiny_llama / "donor").save_pretrained(
        tmp_path / "donor", recipient=str(tiny_llama / "recipient")
    )
    loaded(tiny_llama).save_pretrained(tmp_path / "thin", thin=True)
    two_donors(tiny_llama).save_pretrained(tmp_path / "two", thin=True)
    loaded(inverse_gpt2).save_pretrained(tmp_path / "surgery")
    assert all(written(tmp_path / name) == AUTO_MAP for name in ("donor", "thin", "two", "surgery"))
    loaded(tiny_llama).save_pretrained(tmp_path / "thin")
    assert written(tmp_path / "thin") is None


def test_a_foreign_auto_map_is_not_taken_over(family: Path, tmp_path: Path) -> None:
    edit_json(family / "donor" / "config.json", auto_map={"AutoConfig": "evil/repo--code.Config"})
    assert not AutoConfig.from_pretrained(family / "donor").auto_map
    load(family / "donor").save_pretrained(tmp_path / "thin", thin=True)
    assert written(tmp_path / "thin") == AUTO_MAP
