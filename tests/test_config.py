"""`DonorSpec` and `TransplantConfig`: what a configuration may say, and what is said when it may not."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from tests.helpers import refused
from transplant_hf import ConfigurationError, DonorSpec, TransplantConfig
from transplant_hf.config import check_format_version, donor_specs

ALL_FIELDS = {
    "donor": "user/law",
    "position": 3,
    "mode": "insert",
    "revision": "v1",
    "subfolder": "inner",
    "name": "law",
    "layers": [1, 2],
    "strength": 0.5,
}


@pytest.mark.parametrize(
    ("donor", "subfolder", "name"),
    [
        ("user/law", None, "law"),
        ("/data/donors/law/", None, "law"),
        ("law", None, "law"),
        (".", None, "donor"),
        ("user/many", "law", "law"),
    ],
)
def test_name_is_the_last_part(donor: str, subfolder: str | None, name: str) -> None:
    assert DonorSpec(donor, 0, subfolder=subfolder).name == name


def test_spec_round_trips_through_json() -> None:
    spec = DonorSpec.from_dict(json.loads(json.dumps(ALL_FIELDS)))
    assert spec.to_dict() == ALL_FIELDS
    assert DonorSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    short = DonorSpec("user/law", 1)
    assert short.to_dict() == {"donor": "user/law", "position": 1, "mode": "insert", "name": "law"}
    assert DonorSpec.from_dict(short.to_dict()) == short


def test_spec_is_frozen_and_hashable() -> None:
    spec = DonorSpec("user/law", 1, layers=[0, 1])
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.position = 2  # type: ignore[misc]
    assert hash(spec) == hash(DonorSpec("user/law", 1, layers=(0, 1)))


def test_unknown_donor_fields_are_all_named() -> None:
    with refused(ConfigurationError, "'posision'", "'sterngth'", "'user/law'", "known fields", "strength"):
        DonorSpec.from_dict({"donor": "user/law", "position": 1, "posision": 2, "sterngth": 1})


def test_missing_donor_fields_are_all_named() -> None:
    with refused(ConfigurationError, "'donor' and 'position'", "strength"):
        DonorSpec.from_dict({"strength": 1.0})
    with refused(ConfigurationError, "lacks 'position'", "user/law"):
        TransplantConfig(recipient="r", donors=[{"donor": "user/law"}])


@pytest.mark.parametrize("position", [-1, 1.0, "1", True])
def test_position_is_a_whole_number_from_zero(position: Any) -> None:
    with refused(ConfigurationError, "position", "'user/law'", str(position)):
        DonorSpec("user/law", position)


@pytest.mark.parametrize("layers", [[0, 2], [2, 1], [], [-1, 0], [True, 2], ["0"], 3, [1, 1]])
def test_layers_are_consecutive(layers: Any) -> None:
    with refused(ConfigurationError, "'user/law'", repr(layers)):
        DonorSpec("user/law", 0, layers=layers)


@pytest.mark.parametrize(
    ("position", "layers", "strength"),
    [
        (np.int64(1), np.arange(2), np.float32(0.5)),
        (torch.tensor(1), torch.tensor([0, 1]), torch.tensor(0.5)),
        (np.array(1), range(2), np.float64(0.5)),
        (np.uint8(1), {1, 0}, torch.tensor(0.5, dtype=torch.bfloat16)),
        (1, [np.int32(0), torch.tensor(1)], 0.5),
    ],
)
def test_numbers_of_numpy_and_torch_become_plain(position: Any, layers: Any, strength: Any) -> None:
    spec = DonorSpec("user/law", position, layers=layers, strength=strength)
    assert json.loads(json.dumps(spec.to_dict())) == spec.to_dict()
    assert spec == DonorSpec("user/law", 1, layers=[0, 1], strength=0.5)


@pytest.mark.parametrize(
    "field",
    [
        {"position": 10**5000},
        {"position": [1.5]},
        {"position": np.True_},
        {"position": torch.tensor([1, 2])},
        {"position": torch.tensor(1, device="meta")},
        {"layers": [0, 10**5000]},
        {"layers": {"0": 1}},
        {"layers": torch.tensor(1)},
        {"layers": [[0], [1]]},
        {"strength": 10**5000},
        {"strength": np.float32("nan")},
        {"strength": [1.0]},
        {"donor": ["user/law"]},
        {"donor": 5},
        {"revision": 5},
        {"revision": ["main"]},
        {"subfolder": 5},
        {"name": ["law"]},
        {"mode": ["insert"]},
        {"mode": {}},
    ],
)
def test_a_field_of_the_wrong_type_is_named(field: dict[str, Any]) -> None:
    with refused(ConfigurationError, *field):
        DonorSpec.from_dict({"donor": "user/law", "position": 1, **field})


@pytest.mark.parametrize(
    "field",
    [
        {"recipient": 5},
        {"recipient": ["user/base"]},
        {"recipient_revision": 5},
        {"recipient_revision": {"sha": "0"}},
        {"composition": ["stacked"]},
        {"format_version": 10**5000},
        {"format_version": [1]},
    ],
)
def test_a_configuration_field_of_the_wrong_type_is_named(field: dict[str, Any]) -> None:
    with refused(ConfigurationError, *field):
        TransplantConfig(**{"recipient": "user/base", "donors": {"user/law": 1}, **field})


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), -float("inf"), "1", True])
def test_strength_is_a_finite_number(strength: Any) -> None:
    with refused(ConfigurationError, "strength", "finite", "'user/law'", repr(strength)):
        DonorSpec("user/law", 0, strength=strength)


def test_replacing_goes_with_full_strength_only() -> None:
    with refused(ConfigurationError, "replace", "0.5", "Use strength 1"):
        DonorSpec("user/law", 0, mode="replace", strength=0.5)
    assert DonorSpec("user/law", 0, mode="replace", strength=1).strength == 1.0


def test_mode_is_one_of_two() -> None:
    with refused(ConfigurationError, "'append'", "insert", "replace", "'user/law'"):
        DonorSpec("user/law", 0, mode="append")


@pytest.mark.parametrize("name", ["", 3, "recipient"])
def test_name_is_usable(name: Any) -> None:
    with refused(ConfigurationError, "name", "user/law", repr(name)):
        donor_specs([{"donor": "user/law", "position": 0, "name": name}])


@pytest.mark.parametrize("name", ["../law", "a/b", "..", "/law", "a\\b", "."])
def test_name_is_no_path(name: str) -> None:
    """A thin repo gives each of several donors a folder of its name."""
    with refused(ConfigurationError, "name", name):
        donor_specs([{"donor": "user/law", "position": 0, "name": name}])


def test_empty_donor_is_refused() -> None:
    with refused(ConfigurationError, "empty", "Hub id"):
        DonorSpec("", 0)


@pytest.mark.parametrize(
    "donors",
    [
        {"user/law": 2},
        {"donor": "user/law", "position": 2},
        DonorSpec("user/law", 2),
        [DonorSpec("user/law", 2)],
        [{"donor": "user/law", "position": 2}],
        ({"donor": "user/law", "position": 2},),
        {Path("user/law"): 2},
    ],
)
def test_every_way_to_name_donors(donors: Any) -> None:
    assert donor_specs(donors) == [DonorSpec("user/law", 2)]


def test_order_of_donors_is_kept() -> None:
    specs = donor_specs({"user/c": 1, "user/a": 1, "user/b": 0})
    assert [spec.name for spec in specs] == ["c", "a", "b"]


@pytest.mark.parametrize(
    "donors",
    ["user/law", Path("user/law"), ["user/law"], {"user/law": None}, DonorSpec("user/law"), [DonorSpec("user/law")]],
)
def test_without_a_position_the_recommended_place_is_meant(donors: Any) -> None:
    (spec,) = donor_specs(donors)
    assert (spec.donor, spec.position, spec.mode, spec.strength) == ("user/law", None, None, None)
    (placed,) = donor_specs({"user/law": 2})
    assert (placed.position, placed.mode, placed.strength) == (2, "insert", 1.0)
    config = TransplantConfig(recipient="user/base", donors=donors)
    assert TransplantConfig(**config.to_dict()).donors == config.donors
    with refused(ConfigurationError, "mode", "'append'"):
        DonorSpec("user/law", mode="append")


def test_a_donor_may_be_in_a_folder_called_donor() -> None:
    assert donor_specs({"donor": 2}) == [DonorSpec("donor", 2)]
    assert donor_specs({"donor": None}) == [DonorSpec("donor")]


def test_a_name_that_was_not_given_stays_open() -> None:
    """The record's name takes its place once the donor is opened."""
    assert "name" in DonorSpec("user/law", 1).defaults
    assert "name" in DonorSpec("user/law", 1).replaced(position=2).defaults
    assert "name" not in DonorSpec("user/law", 1, name="law").replaced(position=2).defaults


@pytest.mark.parametrize("donors", [3, [3], {3: 1}, {"user/law": 1, 4: 2}])
def test_other_ways_to_name_donors(donors: Any) -> None:
    with refused(ConfigurationError, "got 3" if donors != {"user/law": 1, 4: 2} else "got 4", "DonorSpec"):
        donor_specs(donors)


def test_names_are_unique() -> None:
    with refused(ConfigurationError, "'law'", "one/law", "position 1", "two/law", "position 2", "name="):
        donor_specs({"one/law": 1, "two/law": 2})
    renamed = donor_specs([DonorSpec("one/law", 1), DonorSpec("two/law", 2, name="law2")])
    assert [spec.name for spec in renamed] == ["law", "law2"]


def test_config_round_trips_through_a_folder(tmp_path: Path) -> None:
    config = TransplantConfig(
        recipient="user/base", recipient_revision="a" * 40, donors=[ALL_FIELDS, {"donor": "x/y", "position": 0}]
    )
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "transplant"
    assert written["format_version"] == 1
    assert written["donors"][0] == ALL_FIELDS
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is TransplantConfig
    assert (again.recipient, again.recipient_revision) == ("user/base", "a" * 40)
    assert again.donors == config.donors
    assert again.donors[0].layers == (1, 2)
    assert "x/y" in repr(again)


def test_config_without_anything_can_be_built() -> None:
    """Transformers builds an empty configuration to find what differs from it."""
    config = TransplantConfig()
    assert (config.recipient, config.donors, config.architectures) == ("", [], ["TransplantForCausalLM"])


def test_newer_format_names_the_version_needed(tmp_path: Path) -> None:
    """Said before anything else, for a newer format may hold fields that look like mistakes."""
    TransplantConfig(recipient="user/base", donors={"user/law": 1}).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    content["format_version"] = 7
    content["donors"][0]["warp"] = 9
    path.write_text(json.dumps(content))
    with refused(ConfigurationError, "format_version 7", "up to 2", "a newer transplant_hf"):
        AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("version", [0, -1, "1", 1.5, True, [1]])
def test_format_version_is_a_whole_number(version: Any) -> None:
    with refused(ConfigurationError, "format_version", "there.json", repr(version)):
        check_format_version(version, "there.json")


def test_missing_format_version_is_the_first() -> None:
    assert check_format_version(None, "config.json") == 1


def test_code_of_a_repository_is_named_in_its_file_only(tmp_path: Path) -> None:
    """TRL reads `auto_map` of each configuration whose architecture is not in Transformers."""
    config = TransplantConfig(recipient="user/base", donors={"user/law": 1}, auto_map={"AutoConfig": "code.Other"})
    assert dict(config.auto_map) == {}
    config.save_pretrained(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())


# -- Composition -------------------------------------------------------------------------------------------------


def test_composition_is_written_only_where_it_is_not_the_default(tmp_path: Path) -> None:
    for composition in ("stacked", "side_by_side"):
        config = TransplantConfig(recipient="user/base", donors={"user/law": 1}, composition=composition)
        config.save_pretrained(tmp_path)
        assert ("composition" in json.loads((tmp_path / "config.json").read_text())) == (composition != "stacked")
        assert TransplantConfig.from_pretrained(tmp_path).composition == composition


def test_which_donors_run_side_by_side() -> None:
    """Those inserted at one position; one that replaces layers between them parts them."""
    places = [("a", 1, "insert"), ("x", 2, "insert"), ("b", 1, "insert"), ("r", 1, "replace"), ("c", 1, "insert")]
    donors = [DonorSpec("user/law", position, mode, name=name) for name, position, mode in places]
    assert TransplantConfig(recipient="user/base", donors=donors, composition="side_by_side").side_by_side_groups == (
        ("a", "b"),
    )
    assert TransplantConfig(recipient="user/base", donors=donors).side_by_side_groups == ()


def test_donors_that_are_set_later_are_read_in_the_same_way() -> None:
    config = TransplantConfig(recipient="user/model")
    config.donors = {"user/law": 1}  # type: ignore[assignment]
    assert config.donors == [DonorSpec("user/law", 1)]
    with pytest.raises(ConfigurationError, match="got 5"):
        config.donors = 5  # type: ignore[assignment]


def test_a_name_has_no_null_byte() -> None:
    with pytest.raises(ConfigurationError, match="null byte"):
        TransplantConfig(recipient="a\0b")
