"""Donors that are spread through the recipient: one donor, one name and one strength at several positions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.helpers import generated, layers_of, loaded, logits_of, plain, refused
from transplant_hf import AutoModelWithTransplant, ConfigurationError, Donor, DonorSpec, check, transplant
from transplant_hf.inspection import inspect
from transplant_hf.model.extracting import extract
from transplant_hf.model.strength import attach_gate

load = AutoModelWithTransplant.from_pretrained
PLACES = (1, 3)


@pytest.fixture
def apart(tiny: Path) -> Any:
    """The two layers of the donor as two donors, at the same positions."""
    specs = [DonorSpec(str(tiny / "donor"), place, layers=(n,), name=f"part-{n}") for n, place in enumerate(PLACES)]
    return load(tiny / "recipient", donors=specs)


def test_it_computes_what_its_parts_compute_as_donors_of_their_own(tiny: Path, apart: Any) -> None:
    model = loaded(tiny, PLACES, name="law")
    assert model.layer_map.layers_of("law") == [1, 4]
    assert [slot.index for slot in model.layer_map if slot.source == "law"] == [1, 2]
    assert torch.equal(logits_of(model), logits_of(apart))
    assert torch.equal(generated(model), generated(apart))
    model.set_strength("law", 0.5)
    for name in ("part-0", "part-1"):
        apart.set_strength(name, 0.5)
    try:
        assert torch.equal(logits_of(model), logits_of(apart))
    finally:
        for name in ("part-0", "part-1"):
            apart.set_strength(name, 1.0)


def test_one_name_switches_all_parts(tiny: Path, apart: Any) -> None:
    model = loaded(tiny, PLACES, name="law")
    recipient = logits_of(plain(tiny / "recipient"))
    with model.disable_transplants("law"):
        assert torch.equal(logits_of(model), recipient)
        assert len(model.layer_map) == len(layers_of(plain(tiny / "recipient")))
    with model.using(rows=["law", None]):
        mixed = logits_of(model)
    # Not to the bit: a batch of another size goes through experts in other pieces.
    torch.testing.assert_close(mixed[1], recipient[1])
    torch.testing.assert_close(mixed[0], logits_of(apart)[0])


def test_it_is_saved_and_recommended_as_it_stands(tiny: Path, tmp_path: Path) -> None:
    model = loaded(tiny, PLACES, name="law")
    model.save_pretrained(tmp_path / "law", thin=True)
    config = json.loads((tmp_path / "law" / "config.json").read_text())
    assert config["donors"] == [{"donor": ".", "position": [1, 3], "mode": "insert", "name": "law"}]
    assert config["format_version"] == 2  # releases that do not know it say what is needed
    donor = Donor.from_pretrained(tmp_path / "law")
    assert donor.position == PLACES
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "law")
    in_memory = transplant(plain(tiny / "recipient"), donor)
    for other in (again, in_memory, load(tiny / "recipient", donors={str(tmp_path / "law"): None})):
        assert torch.equal(logits_of(other), logits_of(model))
    card = (tmp_path / "law" / "README.md").read_text()
    assert "inserted at positions 1, 3." in card
    shown = str(inspect(str(tmp_path / "law")))
    assert "position: 1, 3" in shown


def test_a_full_save_is_a_plain_checkpoint(tiny: Path, tmp_path: Path) -> None:
    model = loaded(tiny, PLACES)
    model.save_pretrained(tmp_path / "full")
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "full")), logits_of(model))


def test_it_is_moved_and_added_to_a_loaded_model(tiny: Path, apart: Any) -> None:
    model = loaded(tiny, 2, name="law")
    model.move_donor("law", PLACES)
    assert torch.equal(logits_of(model), logits_of(apart))
    model.remove_donor("law")
    model.add_donor(str(tiny / "donor"), PLACES, name="law")
    assert torch.equal(logits_of(model), logits_of(apart))
    model.move_donor("law", 2)
    assert torch.equal(logits_of(model), logits_of(loaded(tiny, 2)))


def test_parts_can_replace_layers(tiny: Path) -> None:
    model = loaded(tiny, PLACES, mode="replace", name="law", keep_replaced=True)
    assert [tuple(slot) for slot in model.layer_map] == [
        ("recipient", 0),
        ("law", 1),
        ("recipient", 2),
        ("law", 2),
    ]
    with model.disable_transplants():
        assert torch.equal(logits_of(model), logits_of(plain(tiny / "recipient")))


def test_a_donor_is_made_of_layers_that_are_apart(tiny: Path, tmp_path: Path) -> None:
    recipient = plain(tiny / "recipient")
    donor = Donor.from_model(recipient, [0, 2], name="new", init="identity")
    donor.save_pretrained(tmp_path / "new", position=PLACES, recipient=str(tiny / "recipient"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert model.layer_map.layers_of("new") == [1, 4]
    torch.testing.assert_close(logits_of(model), logits_of(recipient), rtol=0, atol=1e-6)
    taken = Donor.from_model(model, model.layer_map.layers_of("new"))
    assert taken.layer_indices == [0, 2] and taken.position == PLACES
    assert all(torch.equal(tensor, donor.tensors()[name]) for name, tensor in taken.tensors().items())


@pytest.mark.parametrize(("mode", "numbers", "position"), [("insert", [4], 3), ("replace", [1], 1)])
def test_a_part_of_it_goes_back_to_its_own_place(
    tiny: Path, tmp_path: Path, mode: str, numbers: list[int], position: int
) -> None:
    model = loaded(tiny, PLACES, mode, name="law")
    assert Donor.from_model(model, numbers).position == position
    loaded(tiny, PLACES, mode, name="law").save_pretrained(tmp_path / "law", thin=True)
    done = extract(tmp_path / "law", tmp_path / "part", layers=numbers)
    assert done.position == Donor.from_pretrained(tmp_path / "part").position == position
    assert extract(tmp_path / "law", tmp_path / "all", layers=model.layer_map.layers_of("law")).position == PLACES


def test_a_part_of_a_replacing_donor_replaces_the_same_layers(tiny: Path) -> None:
    assert Donor.from_model(loaded(tiny, 1, "replace"), [2]).position == 2
    assert Donor.from_model(loaded(tiny, 1), [2]).position == 1


def test_what_cannot_be_done_is_refused(tiny: Path) -> None:
    donor = str(tiny / "donor")
    with refused(ConfigurationError, "2 layers", "3 parts", "[1, 2, 3]"):
        load(tiny / "recipient", donors={donor: (1, 2, 3)})
    with refused(ConfigurationError, "ascending order", "[3, 1]"):
        DonorSpec(donor, (3, 1))  # type: ignore[arg-type]
    with refused(ConfigurationError, "position 9", "0..4"):
        load(tiny / "recipient", donors={donor: (1, 9)})
    assert not check(str(tiny / "recipient"), donor, (1, 9))
    model = loaded(tiny, PLACES, name="law")
    with refused(ConfigurationError, "positions [1, 3]", "trained"):
        attach_gate(model, "law")
    with refused(ConfigurationError, "side by side"):
        load(tiny / "recipient", donors={donor: PLACES}, composition="side_by_side")
