"""A donor's repo says how the donor is meant to be used: position, mode and strength."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import (
    DONOR_LAYERS,
    NUM_LAYERS,
    Graft,
    Shelf,
    edit_json,
    generated,
    loaded,
    logits_of,
    plain,
    reference_logits,
    refused,
)
from tests.hub_server import ALICE
from transplant_hf import AutoModelWithTransplant, ConfigurationError, Donor, check_compatibility
from transplant_hf.inspection import inspect

load = AutoModelWithTransplant.from_pretrained


def saved(family: Path, folder: Path, **place: Any) -> Path:
    Donor.from_pretrained(family / "donor").save_pretrained(folder, recipient=str(family / "recipient"), **place)
    return folder


def spec_in(folder: Path) -> dict[str, Any]:
    [spec] = json.loads((folder / "config.json").read_text())["donors"]
    return {name: value for name, value in spec.items() if name not in ("donor", "name")}


@pytest.mark.parametrize(
    ("place", "graft"),
    [
        ({"position": 2, "strength": 0.5}, Graft(None, DONOR_LAYERS, 2, strength=0.5)),  # type: ignore[arg-type]
        ({"position": 1, "mode": "replace"}, Graft(None, DONOR_LAYERS, 1, replace=True)),  # type: ignore[arg-type]
    ],
)
def test_the_repo_loads_as_it_is_meant(tiny: Path, tmp_path: Path, place: dict[str, Any], graft: Graft) -> None:
    repo = saved(tiny, tmp_path / "law", **place)
    assert spec_in(repo) == {"mode": "insert", **place}
    donor = Donor.from_pretrained(repo)
    meant = (donor.position, donor.mode, donor.strength)
    assert meant == (place["position"], place.get("mode", "insert"), place.get("strength", 1.0))
    graft = Graft(plain(tiny / "source"), graft.layers, graft.position, graft.replace, graft.strength)
    torch.testing.assert_close(logits_of(load(repo)), reference_logits(plain(tiny / "recipient"), [graft]))


@pytest.mark.parametrize("place", [{"position": 2, "strength": 0.5}, {"position": 1, "mode": "replace"}])
def test_kept_when_saved_again(tiny_gpt2: Path, tmp_path: Path, place: dict[str, Any]) -> None:
    repo = saved(tiny_gpt2, tmp_path / "law", **place)
    once = spec_in(repo)
    donor = Donor.from_pretrained(repo)
    recipient = str(tiny_gpt2 / "recipient")
    donor.save_pretrained(tmp_path / "again", recipient=recipient)
    assert spec_in(tmp_path / "again") == once
    part = donor.part([0])
    assert (part.position, part.mode, part.strength) == (donor.position, donor.mode, donor.strength)
    load(repo).save_pretrained(tmp_path / "thin", thin=True)
    assert spec_in(tmp_path / "thin") == once
    model = load(repo)
    Donor.from_model(model, model.layer_map.layers_of("donor")).save_pretrained(tmp_path / "taken", recipient=recipient)
    assert spec_in(tmp_path / "taken") == once
    donor.save_pretrained(tmp_path / "other", recipient=recipient, mode="insert", strength=0.25)
    assert spec_in(tmp_path / "other") == {**once, "mode": "insert", "strength": 0.25}


def test_a_recipient_with_donors_named_keeps_plain_defaults(tiny: Path, tmp_path: Path) -> None:
    repo = saved(tiny, tmp_path / "law", position=2, strength=0.5)
    model = load(tiny / "recipient", donors={str(repo): 1})
    assert model.strengths == {"law": 1.0}
    assert torch.equal(logits_of(model), logits_of(loaded(tiny, 1)))
    replacing = saved(tiny, tmp_path / "code", position=1, mode="replace")
    assert len(load(tiny / "recipient", donors={str(replacing): 1}).layer_map) == NUM_LAYERS + 2


def test_keep_replaced_by_the_repos_name(tiny: Path, tmp_path: Path) -> None:
    """End to end: loaded by name, switched off, exactly the recipient; and without, a refusal that says how."""
    repo = saved(tiny, tmp_path / "law", position=1, mode="replace")
    model, recipient = load(repo, keep_replaced=True), plain(tiny / "recipient")
    assert torch.equal(logits_of(model), logits_of(loaded(tiny, 1, "replace")))
    for names in (None, "donor"):
        with model.disable_transplants(names):
            assert torch.equal(logits_of(model), logits_of(recipient))
            assert torch.equal(generated(model), generated(recipient))
    assert torch.equal(logits_of(model), logits_of(loaded(tiny, 1, "replace")))
    with refused(ConfigurationError, "'donor'", "keep_replaced=True"), load(repo).disable_transplants():
        pass


def test_the_card_says_it(tiny_gpt2: Path, tmp_path: Path) -> None:
    card = (saved(tiny_gpt2, tmp_path / "law", position=2, strength=0.5) / "README.md").read_text()
    assert "- `donor`: 2, at strength 0.5" in card
    card = (saved(tiny_gpt2, tmp_path / "code", position=1, mode="replace") / "README.md").read_text()
    assert "- `donor`: 1, replacing 2 of the recipient's layers" in card
    assert "of the recipient from position 1" in card


def test_inspect_says_it(tiny_gpt2: Path, tmp_path: Path) -> None:
    found = inspect(saved(tiny_gpt2, tmp_path / "law", position=2, strength=0.5))
    assert (found.mode, found.strength, found.to_dict()["strength"]) == ("insert", 0.5, 0.5)
    assert "strength: 0.5" in str(found)
    replacing = saved(tiny_gpt2, tmp_path / "code", position=1, mode="replace")
    found = inspect(replacing)
    assert "mode: replace" in str(found)
    assert len(found.layer_map) == NUM_LAYERS
    against = inspect(replacing, recipient=str(tiny_gpt2 / "recipient"))
    assert (bool(against), len(against.layer_map)) == (True, NUM_LAYERS)


def test_compatibility_is_checked_as_it_is_meant(tiny_gpt2: Path, tmp_path: Path) -> None:
    repo = saved(tiny_gpt2, tmp_path / "law", position=2, mode="replace")
    edit_json(repo / "config.json", donors=[{"donor": ".", "position": 3, "mode": "replace", "name": "law"}])
    assert "is outside 0..2" in str(check_compatibility(tiny_gpt2 / "recipient", repo))
    assert check_compatibility(tiny_gpt2 / "recipient", repo, 3)
    assert len(check_compatibility(tiny_gpt2 / "recipient", repo, 2, "replace").layer_map) == NUM_LAYERS
    assert len(check_compatibility(tiny_gpt2 / "recipient", repo, 2).layer_map) == NUM_LAYERS + 2


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ({"position": 77}, ("position 77", "outside 0..4", "has 4 layers")),
        ({"position": 3, "mode": "replace"}, ("position 3", "outside 0..2", "2 are replaced")),
    ],
)
@pytest.mark.parametrize("itself", [True, False], ids=["its own model", "another recipient"])
def test_a_position_that_the_recipient_does_not_have_is_refused(
    tiny: Path, tmp_path: Path, place: dict[str, Any], words: tuple[str, ...], itself: bool
) -> None:
    donor = Donor.from_pretrained(tiny / "donor")
    donor = donor.replaced(record=dataclasses.replace(donor.record, source_id="user/model"))
    recipient = None if itself else str(tiny / "recipient")
    with refused(ConfigurationError, *words):
        donor.save_pretrained(tmp_path / "law", recipient=recipient, **place)
    assert not (tmp_path / "law").exists()


@pytest.mark.hub
def test_pushed(shelf: Shelf, as_user: Any) -> None:
    as_user(ALICE)
    shelf.put_base()
    donor = Donor.from_pretrained(shelf.family / "donor")
    donor.push_to_hub(shelf.law, position=2, strength=0.5, recipient=shelf.base)
    again = Donor.from_pretrained(shelf.law)
    assert (again.position, again.mode, again.strength) == (2, "insert", 0.5)
    assert load(shelf.law).strengths == {"donor": 0.5}


def test_refusals(tiny_gpt2: Path, tmp_path: Path) -> None:
    for place, facts in (
        ({"mode": "replace", "strength": 0.5}, ("replaces recipient layers", "0.5")),
        ({"mode": "swap"}, ("mode", "'swap'")),
        ({"strength": float("nan")}, ("strength", "finite", "nan")),
    ):
        with refused(ConfigurationError, *facts):
            saved(tiny_gpt2, tmp_path / "law", position=1, **place)
    assert not (tmp_path / "law").exists()
