"""What of a folder is ours: saves replace that, and leave the user's folders and files as they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import digest_of, loaded, logits_of, plain, refused, two_donors
from transplant_hf import AutoModelWithTransplant, ConfigurationError, Donor, DonorSpec
from transplant_hf.cli import main
from transplant_hf.donor.saved_files import foreign_names, replaced_in

load = AutoModelWithTransplant.from_pretrained


def folder_with(place: Path, **folders: Path) -> Path:
    """A folder with copies of others in it, each with a note of the user's."""
    for name, source in folders.items():
        shutil.copytree(source, place / name)
        (place / name / "notes.txt").write_text("mine")
    return place


def twins(family: Path, recipient: Path, law: Path | None = None, **kwargs: Any) -> Any:
    specs = [
        DonorSpec(str(law or family / "donor"), 1, name="law", layers=[0]),
        DonorSpec(str(family / "donor"), 1, name="code", layers=[1]),
    ]
    return load(recipient, donors=specs, **kwargs)


def by_extracting(family: Path, place: Path) -> None:
    words = ["extract", str(place / "base"), str(place), "--layers", "1", "--position", "1", "--overwrite"]
    assert main(words) == 0


def by_a_donor(family: Path, place: Path) -> None:
    Donor.from_pretrained(family / "donor").save_pretrained(place, position=1, recipient=str(place / "base"))


def by_a_thin_save(family: Path, place: Path) -> None:
    load(place / "base", donors=[DonorSpec(str(family / "donor"), 1)]).save_pretrained(place, thin=True)


def by_a_full_save(family: Path, place: Path) -> None:
    load(place / "base", donors=[DonorSpec(str(family / "donor"), 1)]).save_pretrained(place)


@pytest.mark.parametrize("first", [by_extracting, by_a_donor, by_a_thin_save])
@pytest.mark.parametrize("second", [None, by_a_full_save])
def test_a_recipient_inside_the_output_survives(tiny_gpt2: Path, tmp_path: Path, first: Any, second: Any) -> None:
    place = folder_with(tmp_path / "project", base=tiny_gpt2 / "recipient")
    before = digest_of(place / "base")
    for save in (first, second or first):
        save(tiny_gpt2, place)
        assert digest_of(place / "base") == before
    if second is None:
        assert torch.equal(load(place).lm_head.weight, plain(place / "base").lm_head.weight)


@pytest.mark.parametrize("composition", ["insert", "side_by_side"])
def test_folders_with_a_donors_name_are_left_alone(tiny_gpt2: Path, tmp_path: Path, composition: str) -> None:
    """Thin, and in the transplant format."""
    place = folder_with(tmp_path / "project", law=tiny_gpt2 / "donor")
    (place / "code").write_text("a file of mine")
    before = digest_of(place)
    kwargs = {} if composition == "insert" else {"composition": composition}
    model = twins(tiny_gpt2, tiny_gpt2 / "recipient", place / "law", **kwargs)
    for _ in range(2):
        model.save_pretrained(place, thin=composition == "insert")
        after = digest_of(place)
        assert {name: after[name] for name in before} == before
        folders = [spec["subfolder"] for spec in json.loads((place / "config.json").read_text())["donors"]]
        assert folders == ["donor-1", "donor-2"]
        card = (place / "README.md").read_text()
        assert "donor-1/donor.safetensors" in card and "law/donor.safetensors" not in card
        assert torch.equal(logits_of(load(place)), logits_of(model))
    Donor.from_pretrained(place / "law").verify()


def test_a_home_folder_is_looked_into(tiny_gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    place = folder_with(tmp_path / "project", law=tiny_gpt2 / "donor")
    before = digest_of(place)
    twins(tiny_gpt2, tiny_gpt2 / "recipient").save_pretrained("~/project", thin=True)
    after = digest_of(place)
    assert {name: after[name] for name in before} == before
    assert (place / "donor-1").is_dir()


def test_files_beside_our_own_stay_and_our_own_go(tiny_gpt2: Path, tmp_path: Path) -> None:
    model = twins(tiny_gpt2, tiny_gpt2 / "recipient", composition="side_by_side")
    for _ in range(2):
        model.save_pretrained(tmp_path)
        assert torch.equal(logits_of(load(tmp_path)), logits_of(model))
        for name in ("law", "recipient"):
            (tmp_path / name / "notes.txt").write_text("mine")
    assert {"law", "code", "recipient"} == {path.name for path in tmp_path.iterdir() if path.is_dir()}
    loaded(tiny_gpt2, 1).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"law", "recipient"}
    assert [path.name for name in ("law", "recipient") for path in (tmp_path / name).iterdir()] == ["notes.txt"] * 2
    assert torch.equal(logits_of(plain(tmp_path)), logits_of(loaded(tiny_gpt2, 1)))


def test_a_users_folder_called_recipient_is_refused(tiny_gpt2: Path, tmp_path: Path) -> None:
    place = folder_with(tmp_path / "project", recipient=tiny_gpt2 / "recipient")
    before = digest_of(place)
    model = twins(tiny_gpt2, place / "recipient", composition="side_by_side")
    donor = Donor.from_pretrained(tiny_gpt2 / "donor")
    with refused(ConfigurationError, "no record of writing it", "rename"):
        model.save_pretrained(place)
    with refused(ConfigurationError, "subfolder recipient", "Choose another folder"):
        model.save_pretrained(place, thin=True)
    with refused(ConfigurationError, "subfolder recipient", "Choose another folder"):
        donor.save_pretrained(place, position=1, recipient=str(place / "recipient"))
    assert digest_of(place) == before
    two_donors(tiny_gpt2).save_pretrained(place, thin=True)  # with a recipient elsewhere it is in nobody's way
    after = digest_of(place)
    assert {name: after[name] for name in before} == before


def test_what_is_ours_is_what_the_configuration_names(tmp_path: Path) -> None:
    for name in ("law/donor.safetensors", "code/donor.safetensors", "base/model.safetensors"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()
    places = [{"donor": ".", "subfolder": "law"}, {"donor": "./code"}, {"donor": "user/x", "subfolder": "code"}]
    donors = [{**place, "position": 1, "name": f"n{number}"} for number, place in enumerate(places)]
    fields = {"model_type": "transplant", "recipient": "./base", "donors": donors}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert foreign_names(tmp_path) == {"config.json", "code", "base"}
    ours = {"config.json", "law/donor.safetensors", "law/donor_config.json", "model-00001-of-00002.safetensors"}
    others = {"law/config.json", "law/notes.txt", "README.md", "recipient/config.json", "law/deep/donor.safetensors"}
    for name in ours | others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert replaced_in(tmp_path) == ours


@pytest.mark.parametrize("thin", [True, False])
def test_donors_are_not_saved_over_a_model_of_the_user(tiny_gpt2: Path, tmp_path: Path, thin: bool) -> None:
    own = tmp_path / "own"
    plain(tiny_gpt2 / "recipient").save_pretrained(own)
    before = digest_of(own)
    with refused(ConfigurationError, str(own), "model.safetensors", "delete its weights", "another folder"):
        if thin:
            loaded(tiny_gpt2, 1).save_pretrained(own, thin=True)
        else:
            Donor.from_pretrained(tiny_gpt2 / "donor").save_pretrained(own, position=1)
    assert digest_of(own) == before


def test_donors_are_saved_over_a_full_save_of_ours(tiny_gpt2: Path, tmp_path: Path) -> None:
    model = loaded(tiny_gpt2, 1)
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, thin=True)
    assert not (tmp_path / "model.safetensors").exists()
    torch.testing.assert_close(logits_of(load(tmp_path)), logits_of(model))
