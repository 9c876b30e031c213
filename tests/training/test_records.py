"""The record of what made a donor belongs to one model, and not to its copies."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import copied
from transplant_hf import AutoModelWithTransplant, Donor
from transplant_hf.training.records import note_in_donors


def metadata(model: Any) -> dict[str, Any]:
    return dict(model._transplant.blueprint.part("donor").donor.metadata)


def test_a_note_reaches_one_model_of_two_copies(tiny_llama: Path, tmp_path: Path) -> None:
    family = copied(tiny_llama, tmp_path / "family")
    model = AutoModelWithTransplant.from_pretrained(family / "donor")
    before, again = metadata(model), copy.deepcopy(model)
    note_in_donors(again, {"donor": {"method": "more training"}})
    assert metadata(again) == {**before, "method": "more training"} and metadata(model) == before
    for one, name in ((model, "original"), (again, "copy")):
        one.save_pretrained(family / name, thin=True)
        assert Donor.from_pretrained(family / name).metadata == metadata(one)


def test_the_configuration_of_a_copy_is_its_own(tiny_llama: Path) -> None:
    model: Any = AutoModelWithTransplant.from_pretrained(tiny_llama / "donor")
    again = copy.deepcopy(model)
    again.transplant_config.donors.clear()
    assert [spec.name for spec in model.transplant_config.donors] == ["donor"]


def test_a_blueprint_never_changes(tiny_llama: Path) -> None:
    blueprint = AutoModelWithTransplant.from_pretrained(tiny_llama / "donor")._transplant.blueprint  # type: ignore[attr-defined]
    with pytest.raises(dataclasses.FrozenInstanceError):
        blueprint.parts = ()
