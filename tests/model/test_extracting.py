"""Layers taken out of a model by its name: from a folder, a transplant, or the Hub, into a repo that loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoTokenizer

from tests.helpers import Shelf, copied, digest_of, layers_of, loaded, logits_of, plain, refused, tiny_llama_model
from tests.hub_server import ALICE
from transplant_hf import AutoModelWithTransplant, ConfigurationError, Donor, HubError
from transplant_hf.model.extracting import extract

load = AutoModelWithTransplant.from_pretrained


# -- A folder --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["copy", "identity"])
def test_a_folder(tiny: Path, tmp_path: Path, init: Any) -> None:
    done = extract(tiny / "recipient", tmp_path / "new", init=init, name="fresh")
    assert (done.layer_indices, done.position, done.init) == ((1, 2, 3), 4, init)
    assert (done.source, done.recipient, done.recipient_revision) == (*[str(tiny / "recipient")] * 2, None)
    donor = Donor.from_pretrained(tmp_path / "new")
    assert (donor.name, donor.layer_indices, donor.position) == ("fresh", [1, 2, 3], 4)
    assert donor.metadata == ({"init": "identity"} if init == "identity" else {})
    model, recipient = load(tmp_path / "new"), plain(tiny / "recipient")
    assert torch.equal(logits_of(model), logits_of(recipient)) == (init == "identity")
    assert ModelCard.load(tmp_path / "new" / "README.md").text
    AutoTokenizer.from_pretrained(tmp_path / "new")


def test_the_layers_and_place_that_were_asked_for(tiny_llama: Path, tmp_path: Path) -> None:
    done = extract(tiny_llama / "recipient", tmp_path / "a", layers=[2], position=0)
    assert (done.layer_indices, done.position) == ((2,), 0)
    done = extract(tiny_llama / "recipient", tmp_path / "b", count=2)
    assert (done.layer_indices, done.position) == ((1, 2), 3)
    assert Donor.from_pretrained(tmp_path / "b").name == "b"


def test_dtypes_are_the_checkpoints_unless_said(tiny_llama: Path, tmp_path: Path) -> None:
    plain(tiny_llama / "recipient", dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    for dtype, wanted in (({}, torch.bfloat16), ({"dtype": "float32"}, torch.float32)):
        extract(tmp_path / "half", tmp_path / "donor", overwrite=True, **dtype)
        found = {tensor.dtype for tensor in Donor.from_pretrained(tmp_path / "donor").tensors().values()}
        assert found == {wanted}


def test_what_it_says(tiny_llama: Path, tmp_path: Path) -> None:
    done = extract(tiny_llama / "recipient", tmp_path / "new", init="identity")
    size = (tmp_path / "new" / "donor.safetensors").stat().st_size
    for fact in (f"-> {tmp_path / 'new'}", "3 layers (llama): 1, 2, 3", "add nothing", "position 4", f"{size:,} bytes"):
        assert fact in str(done)
    as_json = json.loads(json.dumps(done.to_dict()))
    assert as_json["layer_indices"] == [1, 2, 3]
    assert as_json["files"]["donor.safetensors"]["size"] == size


# -- A transplant ------------------------------------------------------------------------------------------------------


@pytest.fixture
def thin(tiny_llama: Path, tmp_path: Path) -> Path:
    """A thin repo of six layers: recipient 0, donor 1 and 2, recipient 1, 2 and 3."""
    loaded(tiny_llama, position=1).save_pretrained(tmp_path / "thin", thin=True)
    return tmp_path / "thin"


def test_a_donor_out_of_a_thin_repo(thin: Path, tiny_llama: Path, tmp_path: Path) -> None:
    """It goes back to where it was."""
    done = extract(thin, tmp_path / "new", layers=[1, 2])
    assert (done.layer_indices, done.position, done.recipient) == ((1, 2), 1, str(tiny_llama / "recipient"))
    assert torch.equal(logits_of(load(tmp_path / "new")), logits_of(load(thin)))
    assert Donor.from_pretrained(tmp_path / "new").name == "donor"


def test_a_donor_repo_is_a_transplant(tiny_llama: Path, tmp_path: Path) -> None:
    done = extract(tiny_llama / "donor", tmp_path / "new", layers=[2], init="identity")
    assert (done.layer_indices, done.position) == ((2,), 1)
    assert torch.equal(logits_of(load(tmp_path / "new")), logits_of(plain(tiny_llama / "recipient")))


def test_recipient_layers_out_of_a_thin_repo(thin: Path, tiny_llama: Path, tmp_path: Path) -> None:
    """Named by their running numbers; the position is in the recipient's numbering."""
    done = extract(thin, tmp_path / "new", layers=[3, 4], init="identity")
    assert (done.layer_indices, done.position, done.recipient) == ((1, 2), 3, str(tiny_llama / "recipient"))
    assert torch.equal(logits_of(load(tmp_path / "new")), logits_of(plain(tiny_llama / "recipient")))


def test_the_layers_by_default_are_the_recipients(thin: Path, tmp_path: Path) -> None:
    assert extract(thin, tmp_path / "new").layer_indices == (1, 2, 3)


def test_layers_of_two_sources(thin: Path, tmp_path: Path) -> None:
    with refused(ConfigurationError, "[2, 3]", "one source"):
        extract(thin, tmp_path / "new", layers=[2, 3])
    assert not (tmp_path / "new").exists()


# -- What is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", [-1, 5])
def test_no_such_position(tiny_llama: Path, tmp_path: Path, position: int) -> None:
    with refused(ConfigurationError, f"position {position}", "0..4", str(tiny_llama / "recipient")):
        extract(tiny_llama / "recipient", tmp_path / "new", position=position)
    assert not (tmp_path / "new").exists()


def test_nowhere_to_write_to(tiny_llama: Path) -> None:
    with refused(ConfigurationError, "name a folder", "push_to"):
        extract(tiny_llama / "recipient")


def test_no_model(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "abacus"}))
    with refused(ConfigurationError, str(tmp_path / "model"), "abacus"):
        extract(tmp_path / "model", tmp_path / "new")


def test_the_models_own_folder(tiny_llama: Path, tmp_path: Path) -> None:
    folder = copied(tiny_llama / "recipient", tmp_path / "model")
    before = digest_of(folder)
    with refused(ConfigurationError, "no record of writing"):
        extract(folder, folder, overwrite=True)
    assert digest_of(folder) == before


# -- The Hub -----------------------------------------------------------------------------------------------------------


@pytest.mark.hub
def test_a_model_on_the_hub_is_pinned(both: Shelf, tmp_path: Path) -> None:
    """To the commit that was asked for, wherever its branch goes, and with the tokenizer of that commit."""
    both.hub.tag(both.base, "v1")
    moved = both.hub.commit(both.base, {"model.safetensors": both.family / "source" / "model.safetensors"})
    for revision, commit in (("v1", both.base_commit), (None, moved)):
        target = tmp_path / str(revision)
        done = extract(both.base, target, init="identity", revision=revision)
        assert (done.source, done.recipient, done.recipient_revision) == (f"{both.base}@{commit}", both.base, commit)
        config = json.loads((target / "config.json").read_text())
        assert (config["recipient"], config["recipient_revision"]) == (both.base, commit)
        record = Donor.from_pretrained(target).record
        assert (record.source_id, record.source_revision) == (both.base, commit)
        assert commit in ModelCard.load(target / "README.md").text
        AutoTokenizer.from_pretrained(target)
    for target, family in (("v1", "recipient"), ("None", "source")):
        wanted = layers_of(plain(both.family / family))[1].self_attn.q_proj.weight
        found = Donor.from_pretrained(tmp_path / target).tensors()["layers.0.self_attn.q_proj.weight"]
        assert torch.equal(found, wanted)
        assert torch.equal(logits_of(load(tmp_path / target)), logits_of(plain(both.family / family)))


@pytest.mark.hub
def test_a_cache_of_ones_own(both: Shelf, tmp_path: Path) -> None:
    """The tokenizer that goes along is looked for there too."""
    extract(both.base, tmp_path / "new", cache_dir=str(tmp_path / "cache"))
    assert AutoTokenizer.from_pretrained(tmp_path / "new").eos_token == "<|endoftext|>"


@pytest.mark.hub
def test_a_donor_on_the_hub(both: Shelf, tmp_path: Path) -> None:
    done = extract(both.law, tmp_path / "new", layers=[1])
    assert (done.source, done.recipient) == (f"{both.law}@{both.law_commit}", both.base)
    assert (done.recipient_revision, done.position) == (both.base_commit, 1)
    model = load(tmp_path / "new")
    wanted = layers_of(tiny_llama_model(seed=2))[1].state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in layers_of(model)[1].state_dict().items())


@pytest.mark.hub
def test_a_push(both: Shelf, as_user: Any, tmp_path: Path) -> None:
    """One commit with the donor's files, and none of the user's that lie beside them."""
    as_user(ALICE)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "diary.txt").write_text("mine")
    done = extract(both.base, tmp_path / "out", overwrite=True, init="identity", push_to="alice/new-pushed")
    assert done.commit and done.folder == str(tmp_path / "out")
    paths = set(both.hub.paths("alice/new-pushed"))
    assert {"config.json", "donor_config.json", "donor.safetensors", "README.md", "tokenizer.json"} <= paths
    assert "diary.txt" not in paths
    assert torch.equal(logits_of(load("alice/new-pushed")), logits_of(plain(both.family / "recipient")))
    only = extract(both.base, init="identity", push_to="alice/new-only")
    assert (only.folder, json.loads(both.hub.read("alice/new-only", "donor_config.json"))["name"]) == (None, "new-only")


@pytest.mark.hub
def test_a_pushed_donor_names_no_folder(both: Shelf, as_user: Any) -> None:
    as_user(ALICE)
    with refused(ConfigurationError, str(both.family / "recipient"), "is a folder", "recipient on the Hub"):
        extract(both.family / "recipient", push_to="alice/new-homeless")
    assert not both.hub.requests.commits()


@pytest.mark.hub
def test_a_model_that_is_not_there(both: Shelf, tmp_path: Path) -> None:
    with refused(HubError, "alice/nothing"):
        extract("alice/nothing", tmp_path / "new")
