"""What a donor is called and where it goes: one rule, in every call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import copied, edit_json, logits_of, plain, refused, some_ids
from transplant_hf import (
    AutoModelWithTransplant,
    CheckpointError,
    ConfigurationError,
    Donor,
    DonorSpec,
    check,
    check_compatibility,
    sweep,
    transplant,
)
from transplant_hf.exporting import export
from transplant_hf.inspection import inspect
from transplant_hf.planning import plan

PLACE = [(2, "insert", 0.5)]


def places(model: Any) -> list[tuple[Any, ...]]:
    return [(spec.name, spec.position, spec.mode, spec.strength) for spec in model.transplant_config.donors]


@pytest.fixture(scope="module")
def family(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A donor in a folder of another name, which recommends a strength too."""
    folder = copied(tiny_llama, tmp_path_factory.mktemp("place") / "family")
    donor = Donor.from_model(plain(folder / "source"), [1, 2], name="law")
    donor.save_pretrained(folder / "llama-law", position=2, strength=0.5, recipient=str(folder / "recipient"))
    return folder


@pytest.mark.parametrize("way", ["bare", "list", "none", "path", "spec", "object", "objects", "loaded", "add"])
def test_a_donor_goes_where_it_recommends(family: Path, way: str) -> None:
    folder = str(family / "llama-law")
    ways: dict[str, Any] = {
        "bare": folder,
        "list": [folder],
        "none": {folder: None},
        "path": {Path(folder): None},
        "spec": DonorSpec(folder),
        "object": {Donor.from_pretrained(folder): None},
        "objects": [Donor.from_pretrained(folder)],
    }
    if way == "loaded":
        model = transplant(plain(family / "recipient"), folder)
    elif way == "add":
        model = transplant(plain(family / "recipient"), folder, in_place=True)
    else:
        model = AutoModelWithTransplant.from_pretrained(family / "recipient", donors=ways[way])
    assert [place[1:] for place in places(model)] == PLACE
    by_reference = way in ("bare", "list", "none", "path", "spec")
    assert places(model)[0][0] == ("llama-law" if by_reference else "law")
    assert torch.equal(logits_of(model), logits_of(AutoModelWithTransplant.from_pretrained(folder)))


def test_what_is_given_goes_before_what_is_recommended(family: Path) -> None:
    folder = str(family / "llama-law")
    donors = [DonorSpec(folder, strength=0.25), DonorSpec(folder, 3, name="again")]
    model = AutoModelWithTransplant.from_pretrained(family / "recipient", donors=donors)
    assert places(model) == [("llama-law", 2, "insert", 0.25), ("again", 3, "insert", 1.0)]
    named = AutoModelWithTransplant.from_pretrained(family / "recipient", donors=[DonorSpec(folder, name="law")])
    assert places(named) == [("law", 2, "insert", 0.5)]


def test_a_position_alone_warns_of_another_recommendation(
    family: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Mode and strength are then "insert" and 1; what was given, or stands in a file, is meant."""
    law, code = family / "llama-law", tmp_path / "code"
    Donor.from_pretrained(law).save_pretrained(code, position=1, mode="replace", strength=1.0)
    model = AutoModelWithTransplant.from_pretrained(family / "recipient", donors={str(law): 3, str(code): 1})
    assert places(model) == [("llama-law", 3, "insert", 1.0), ("code", 1, "insert", 1.0)]
    first, second = (record.getMessage() for record in caplog.records)
    assert "'llama-law' recommends strength 0.5, and runs with strength 1.0" in first
    assert "'code' recommends mode replace, and runs with mode insert" in second
    caplog.clear()
    model.save_pretrained(tmp_path / "thin", thin=True)
    AutoModelWithTransplant.from_pretrained(tmp_path / "thin")
    given = DonorSpec(str(law), 3, "insert", strength=1.0)
    AutoModelWithTransplant.from_pretrained(family / "recipient", donors=[given]).add_donor(str(law), name="other")
    assert [record for record in caplog.records if "recommends" in record.getMessage()] == []


def test_a_spread_donor_at_its_own_positions_runs_as_recommended(
    family: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Donor.from_pretrained(family / "llama-law").save_pretrained(tmp_path / "apart", position=(1, 3), strength=0.5)
    apart = str(tmp_path / "apart")
    model = AutoModelWithTransplant.from_pretrained(family / "recipient", donors={apart: (1, 3)})
    assert places(model) == [("apart", (1, 3), "insert", 0.5)] and "recommends" not in caplog.text
    given = DonorSpec(apart, (1, 3), strength=0.25)
    model = AutoModelWithTransplant.from_pretrained(family / "recipient", donors=[given])
    assert places(model) == [("apart", (1, 3), "insert", 0.25)] and "recommends" not in caplog.text
    model = AutoModelWithTransplant.from_pretrained(family / "recipient", donors=[f"{apart}@2,3"])
    assert places(model) == [("apart", (2, 3), "insert", 1.0)]
    assert "on the command line DONOR instead of DONOR@POSITION" in caplog.text


def test_a_donor_in_memory_may_be_given_to_from_pretrained(family: Path) -> None:
    source = plain(family / "source")
    donor = Donor.from_model(source, [1, 2], name="law")
    model = AutoModelWithTransplant.from_pretrained(family / "recipient", donors={donor: 3})
    assert places(model) == [("law", 3, "insert", 1.0)]
    expected = AutoModelWithTransplant.from_pretrained(family / "recipient", donors={str(family / "llama-law"): 3})
    assert torch.equal(logits_of(model), logits_of(expected))
    with torch.no_grad():
        source.model.layers[1].mlp.up_proj.weight.zero_()
    assert torch.equal(logits_of(model), logits_of(expected))


def test_two_donors_of_one_recorded_name_are_called_after_their_folders(family: Path, tmp_path: Path) -> None:
    copied(family / "llama-law", tmp_path / "one")
    copied(family / "llama-law", tmp_path / "two")
    donors = {str(tmp_path / "one"): 1, str(tmp_path / "two"): None}
    model = AutoModelWithTransplant.from_pretrained(family / "recipient", donors=donors)
    assert [place[:2] for place in places(model)] == [("one", 1), ("two", 2)]


def test_headers_alone_say_the_same(family: Path, tmp_path: Path) -> None:
    folder = str(family / "llama-law")
    report = check_compatibility(family / "recipient", folder)
    planned = plan(family / "recipient", {folder: None})
    assert report.position == planned.donors[0].position == 2
    assert report.layer_map == inspect(folder).layer_map
    assert report.layer_map.layers_of("law") == planned.layer_map.layers_of("llama-law") == [2, 3]
    done = export(family / "recipient", tmp_path / "full", [DonorSpec(folder, strength=1.0)], verify=False)
    assert done.layer_map == planned.layer_map


def test_a_donor_that_recommends_no_position_needs_one(family: Path, tmp_path: Path) -> None:
    folder = copied(family / "llama-law", tmp_path / "loose")
    (folder / "config.json").unlink()
    facts = ("recommends no position", "position=0..L", "{donor: position}", "DONOR@POSITION", str(folder))
    recipient = family / "recipient"
    for call in (
        lambda: AutoModelWithTransplant.from_pretrained(recipient, donors=str(folder)),
        lambda: transplant(plain(recipient), str(folder)),
        lambda: check_compatibility(recipient, folder),
        lambda: plan(recipient, str(folder)),
        lambda: export(recipient, tmp_path / "full", {folder: None}),
    ):
        with refused(ConfigurationError, *facts):
            call()
    assert AutoModelWithTransplant.from_pretrained(recipient, donors={folder: 0}).layer_map[0].source == "loose"


def test_a_donor_without_a_recorded_name_is_called_after_its_folder(family: Path, tmp_path: Path) -> None:
    folder = copied(family / "llama-law", tmp_path / "nameless")
    edit_json(folder / "donor_config.json", name=None)
    assert Donor.from_pretrained(folder).name == "nameless"
    model = AutoModelWithTransplant.from_pretrained(family / "recipient", donors={folder: 1})
    assert places(model)[0][0] == "nameless"


def test_a_bare_donor_is_enough_to_check_and_to_sweep(family: Path) -> None:
    folder = str(family / "llama-law")
    for donor in (folder, Path(folder), Donor.from_pretrained(folder)):
        assert check(family / "recipient", donor).position == 2
    for donors in (folder, [folder], {folder: None}, Donor.from_pretrained(folder)):
        report = sweep(plain(family / "recipient"), donors, some_ids(1, 40)[0], [2], block_length=16, quiet=True)
        assert [(row.donor, row.position, row.reason) for row in report.rows] == [("law", 2, None)]


def test_one_donor_with_its_position_in_a_dictionary(family: Path) -> None:
    folder, recipient = str(family / "llama-law"), family / "recipient"
    assert check(recipient, {folder: 1}).position == 1
    assert check(recipient, {folder: None}).position == 2
    model = transplant(plain(recipient), {folder: 1})
    assert torch.equal(logits_of(model), logits_of(transplant(plain(recipient), folder, 1)))
    for donor, position in (({folder: 1, "other": 2}, None), ({folder: 1}, 3), ({}, None)):
        with refused(ConfigurationError, "one donor", "{donor: position}"):
            transplant(plain(recipient), donor, position)


def test_a_folder_with_a_pt_file_is_no_donor(family: Path, tmp_path: Path) -> None:
    (tmp_path / "donor_layers.pt").touch()
    for call in (Donor.from_pretrained, lambda folder: check(family / "recipient", folder, 1)):
        with refused(CheckpointError, "is not a donor", "`transplant-hf convert`", "donor_layers.pt"):
            call(tmp_path)
