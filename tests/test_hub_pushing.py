"""Transplants pushed to the Hub: one commit each, and nothing undone that was not ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import (
    HfHubHTTPError,
)
from transformers import AutoModelForCausalLM

from tests.helpers import (
    NUM_LAYERS,
    Shelf,
    loaded,
    logits_of,
    refused,
    refused_by_hub,
    some_ids,
)
from tests.hub_server import ALICE, BOB, HubServer
from transplant_hf import (
    AutoModelWithTransplant,
    ConfigurationError,
    Donor,
    DonorSpec,
    HubError,
)

pytestmark = pytest.mark.hub

load = AutoModelWithTransplant.from_pretrained


def test_push_thin(both: Shelf, as_user: Any) -> None:
    as_user(ALICE)
    model = load(both.base, donors={both.law: 2})
    target = f"{both.law}-thin"
    info = model.push_to_hub(target, thin=True)
    assert len(both.hub.requests.commits()) == 1
    assert info.oid == both.hub.head(target)
    paths = set(both.hub.paths(target))
    assert {"config.json", "donor_config.json", "donor.safetensors", "README.md", "generation_config.json"} <= paths
    assert not {path for path in paths if path.startswith("model") and "safetensors" in path}
    config = json.loads(both.hub.read(target, "config.json"))
    assert (config["recipient"], config["recipient_revision"]) == (both.base, both.base_commit)
    again = load(target)
    assert torch.equal(logits_of(again), logits_of(model))
    assert again.transplant_config.donors[0].revision == info.oid
    assert (
        target in both.hub.read(target, "README.md").decode()
        or target.partition("/")[2] in both.hub.read(target, "README.md").decode()
    )


def test_the_card_of_a_pushed_donor_loads_it_by_its_full_name(both: Shelf, as_user: Any) -> None:
    as_user(ALICE)
    for number, pushed in enumerate((load(both.law), Donor.from_pretrained(both.law))):
        target = f"{both.law}-card{number}"
        pushed.push_to_hub(target, **({"position": 1, "recipient": both.base} if number else {"thin": True}))
        assert f'model="{target}"' in both.hub.read(target, "README.md").decode()


@pytest.mark.parametrize("thin", [True, False])
def test_a_persons_card_on_the_hub_is_kept(both: Shelf, as_user: Any, thin: bool, warned: list[str]) -> None:
    as_user(ALICE)
    model, target = load(both.law), f"{both.law}-mine-{thin}"
    both.hub.add_repo(target, {"README.md": b"mine"})
    model.push_to_hub(target, thin=thin)
    assert both.hub.read(target, "README.md") == b"mine"
    assert [text for text in warned if target in text and "kept" in text]
    both.hub.commit(target, delete=["README.md"])
    for position in (1, 2):
        load(both.base, donors={both.law: position}).push_to_hub(target, thin=thin)
        assert f"position {position}" in both.hub.read(target, "README.md").decode()


def test_push_full(both: Shelf, as_user: Any) -> None:
    as_user(ALICE)
    model = load(both.law)
    target = f"{both.law}-full"
    info = model.push_to_hub(target, commit_message="All of it", private=True)
    assert len(both.hub.requests.commits()) == 1
    assert info.oid == both.hub.head(target)
    assert {"config.json", "model.safetensors", "generation_config.json"} <= set(both.hub.paths(target))
    assert json.loads(both.hub.read(target, "config.json"))["model_type"] == "llama"
    again = AutoModelForCausalLM.from_pretrained(target)
    assert not hasattr(again, "transplant_config")
    assert torch.equal(logits_of(again), logits_of(model))
    with pytest.raises(OSError, match=target):
        AutoModelForCausalLM.from_pretrained(target, token=BOB, force_download=True)


def test_pushing_again_replaces_the_artefact_only(both: Shelf, as_user: Any) -> None:
    as_user(ALICE)
    model, target = load(both.law), f"{both.law}-again"
    model.push_to_hub(target, thin=True)
    both.hub.commit(target, {"notes.txt": b"mine"})
    model.push_to_hub(target)
    assert len(both.hub.requests.commits()) == 2
    paths = set(both.hub.paths(target))
    assert {"model.safetensors", "notes.txt"} <= paths
    assert not {"donor.safetensors", "donor_config.json"} & paths
    assert json.loads(both.hub.read(target, "config.json"))["model_type"] == "llama"


def test_push_to_a_branch(both: Shelf, as_user: Any) -> None:
    as_user(ALICE)
    model, target = load(both.law), f"{both.law}-branch"
    both.hub.add_repo(target, {"notes.txt": b"mine"})
    model.push_to_hub(target, thin=True, revision="next")
    assert both.hub.paths(target, "main") == ["notes.txt"]
    assert "donor.safetensors" in both.hub.paths(target, "next")
    assert len(load(target, revision="next").layer_map) == NUM_LAYERS + 2


def test_save_and_push_in_one_call(both: Shelf, as_user: Any, tmp_path: Path) -> None:
    as_user(ALICE)
    target = f"{both.law}-saved"
    load(both.law).save_pretrained(tmp_path / "out", thin=True, push_to_hub=True, repo_id=target)
    assert len(both.hub.requests.commits()) == 1
    assert (tmp_path / "out" / "donor.safetensors").exists()
    assert "donor.safetensors" in both.hub.paths(target)


def test_push_a_donor(both: Shelf, as_user: Any) -> None:
    as_user(ALICE)
    donor, target = Donor.from_pretrained(both.law), f"{both.law}-donor"
    donor.push_to_hub(target, position=2, recipient=both.base)
    assert len(both.hub.requests.commits()) == 1
    model = load(target)
    assert model.layer_map.layers_of("donor") == [2, 3]
    assert model.transplant_config.recipient_revision == both.base_commit


def test_a_push_that_is_refused(both: Shelf, as_user: Any) -> None:
    model = load(both.law)
    with refused_by_hub("alice/mine", cause=HfHubHTTPError):
        model.push_to_hub("alice/mine", thin=True, token=BOB)
    assert not both.hub.exists("alice/mine")
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(1)
    with refused(ConfigurationError, "embed_tokens", f"{both.base}@{both.base_commit}", "in full"):
        model.push_to_hub("alice/mine", thin=True, token=ALICE)
    assert not both.hub.exists("alice/mine")


def test_a_push_on_top_of_a_push(both: Shelf, as_user: Any) -> None:
    """Someone else's commit in between is not undone silently."""
    as_user(ALICE)
    model, target = load(both.law), f"{both.law}-race"
    model.push_to_hub(target, thin=True)
    both.hub.fail("POST", f"*{target}/commit/*", status=412, message="A commit has happened since.", times=1)
    with refused(HubError, target, "since"):
        model.push_to_hub(target)
    assert "donor.safetensors" in both.hub.paths(target)


def test_surgery_in_full(hub: HubServer, inverse_gpt2: Path, as_user: Any) -> None:
    as_user(ALICE)
    model, target = loaded(inverse_gpt2, 1), "alice/inverse-in-full"
    model.push_to_hub(target)
    assert len(hub.requests.commits()) == 1
    again = AutoModelForCausalLM.from_pretrained(target)
    assert torch.equal(logits_of(again, some_ids()), logits_of(model, some_ids()))
    assert again.layer_map == model.layer_map


def test_several_donors_thin(both: Shelf, as_user: Any) -> None:
    as_user(ALICE)
    specs = [DonorSpec(both.law, 0, name="a"), DonorSpec(both.law, 2, "replace", name="b", layers=[1])]
    model, target = load(both.base, donors=specs), f"{both.law}-two"
    model.push_to_hub(target, thin=True)
    again = load(target)
    assert torch.equal(logits_of(again), logits_of(model))
    assert again.layer_map == model.layer_map
    assert {spec.revision for spec in again.transplant_config.donors} == {both.hub.head(target)}


def test_a_recipient_that_nobody_else_has_is_refused(both: Shelf, as_user: Any) -> None:
    as_user(ALICE)
    folder = str(both.family / "recipient")
    model = load(folder, donors={both.law: 1})
    with refused(ConfigurationError, "names recipient", folder, "Push that first"):
        model.push_to_hub("alice/nowhere", thin=True)
    with refused(ConfigurationError, "names recipient", folder, "Push that first"):
        Donor.from_pretrained(both.law).push_to_hub("alice/nowhere", position=1, recipient=folder)
    assert not both.hub.requests.commits()
    model.push_to_hub("alice/whole")
