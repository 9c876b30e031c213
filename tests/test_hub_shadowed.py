"""A folder in the working directory that has the name of a pinned repository is never taken for it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, pipeline

from tests.helpers import (
    DONOR_POSITION,
    NUM_LAYERS,
    Shelf,
    edit_json,
    edit_weights,
    logits_of,
    refused,
    tiny_llama_model,
    write_tokenizer,
)
from transplant_hf import (
    AutoModelWithTransplant,
    ConfigurationError,
    Donor,
    DonorSpec,
    HubError,
    check_compatibility,
)
from transplant_hf.conversion import convert
from transplant_hf.evaluation.models_and_texts import find_tokenizer, model_to_measure
from transplant_hf.exporting import export
from transplant_hf.inspection import inspect
from transplant_hf.model.extracting import extract
from transplant_hf.planning import plan
from transplant_hf.training.data import model_and_tokenizer

pytestmark = pytest.mark.hub

load = AutoModelWithTransplant.from_pretrained
OTHER_LAYERS = NUM_LAYERS - 1


@pytest.fixture
def wanted(shelf: Shelf) -> torch.Tensor:
    """The logits of the transplant that is published, in folders of other names."""
    return logits_of(load(shelf.family / "recipient", donors={str(shelf.family / "donor"): DONOR_POSITION}))


@pytest.fixture
def shadowed(shelf: Shelf, wanted: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shelf:
    """Recipient and donor on the Hub, and in the working directory other ones in folders of the same names."""
    shelf.put_base().put_law()
    pin_recipient(shelf)
    here = tmp_path / "here"
    other = tiny_llama_model(seed=77, num_hidden_layers=OTHER_LAYERS)
    other.save_pretrained(here / shelf.base)
    write_tokenizer(here / shelf.base)
    (here / shelf.base / "README.md").write_text("---\nlicense: agpl-3.0\n---\nAnother model.\n")
    shutil.copytree(shelf.family / "donor", here / shelf.law)
    edit_weights(here / shelf.law, lambda tensors: [tensor.zero_() for tensor in tensors.values()])
    monkeypatch.chdir(here)
    return shelf


def pin_recipient(shelf: Shelf) -> None:
    """Let the published donor name its recipient's commit; the first commit of the test does not."""
    edit_json(shelf.family / "donor" / "config.json", recipient_revision=shelf.base_commit)
    shelf.law_commit = shelf.hub.commit(shelf.law, shelf.family / "donor")


@pytest.fixture
def beside(shadowed: Shelf) -> Shelf:
    """Only the recipient's name is that of a folder."""
    shutil.rmtree(shadowed.law)
    return shadowed


def by_name(shelf: Shelf) -> Any:
    return load(shelf.law)


def by_auto_class(shelf: Shelf) -> Any:
    return AutoModelForCausalLM.from_pretrained(shelf.law)


def by_pipeline(shelf: Shelf) -> Any:
    return pipeline("text-generation", model=shelf.law).model


def by_recipient(shelf: Shelf) -> Any:
    return load(
        shelf.base,
        revision=shelf.base_commit,
        donors=[DonorSpec(shelf.law, DONOR_POSITION, revision=shelf.law_commit)],
    )


def from_a_folder_that_pins_it(shelf: Shelf) -> Any:
    return load(shelf.family / "donor")


def from_a_thin_folder(shelf: Shelf) -> Any:
    load(shelf.law).save_pretrained("thin", thin=True)
    return load("thin")


@pytest.mark.parametrize(
    "how", [by_name, by_auto_class, by_pipeline, by_recipient, from_a_folder_that_pins_it, from_a_thin_folder]
)
def test_the_hubs_recipient_is_loaded(beside: Shelf, wanted: torch.Tensor, how: Callable[[Shelf], Any]) -> None:
    model = how(beside)
    assert torch.equal(logits_of(model), wanted)
    config = model.transplant_config
    assert (config.recipient, config.recipient_revision) == (beside.base, beside.base_commit)
    assert model.config.name_or_path == model.name_or_path
    assert not Path(model.name_or_path).is_absolute() or how is from_a_folder_that_pins_it


def test_a_repository_needs_no_pin_to_mean_the_hub(beside: Shelf, wanted: torch.Tensor) -> None:
    edit_json(beside.family / "donor" / "config.json", recipient_revision=None)
    beside.hub.commit(beside.law, beside.family / "donor")
    assert torch.equal(logits_of(load(beside.law)), wanted)


@pytest.mark.parametrize("class_", [AutoModelWithTransplant, AutoModelForCausalLM])
def test_a_donor_with_a_revision_is_the_hubs(shadowed: Shelf, wanted: torch.Tensor, class_: Any) -> None:
    model = class_.from_pretrained(shadowed.law, revision=shadowed.law_commit)
    assert torch.equal(logits_of(model), wanted)
    assert model.transplant_config.donors[0].revision == shadowed.law_commit
    opened = Donor.from_pretrained(shadowed.law, revision=shadowed.law_commit)
    assert all(tensor.any() for tensor in opened.tensors().values())


def test_what_a_user_types_is_a_folder_first(shadowed: Shelf) -> None:
    """As in Transformers, for which "main" is what nothing means."""
    for revision in (None, "main"):
        model = load(shadowed.base, revision=revision, donors={shadowed.law: 1})
        assert len(model.layer_map) == OTHER_LAYERS + 2
        assert model.transplant_config.recipient_revision is None
    assert not any(tensor.any() for tensor in Donor.from_pretrained(shadowed.law).tensors().values())


def test_a_path_has_no_revision(shadowed: Shelf, tmp_path: Path) -> None:
    path = str(shadowed.family / "recipient")
    for attempt in (
        lambda: load(path, revision="v1", donors={shadowed.law: 1}),
        lambda: load(path, donors=[DonorSpec(str(shadowed.family / "donor"), 1, revision="v1")]),
        lambda: Donor.from_pretrained(str(shadowed.family / "donor"), revision="v1"),
        lambda: Donor.from_pretrained(shadowed.law).save_pretrained(
            tmp_path / "x", recipient=path, recipient_revision="v1"
        ),
        lambda: inspect(path, revision="v1"),
    ):
        with refused(ConfigurationError, "is a folder and has no revisions", "'v1'"):
            attempt()


def test_a_missing_repository_is_no_folder_either(shadowed: Shelf) -> None:
    with refused(HubError, "alice/none", "was not found"):
        Path("alice/none").mkdir(parents=True)
        Donor.from_pretrained("alice/none", revision="v1")


# -- Saving ----------------------------------------------------------------------------------------------------------


def test_saves_compare_with_the_hubs_recipient_and_name_it(beside: Shelf, wanted: torch.Tensor) -> None:
    load(beside.law).save_pretrained("thin", thin=True)
    pin = {"recipient": beside.base, "recipient_revision": beside.base_commit}
    Donor.from_pretrained(beside.law).save_pretrained("again", **pin)
    for folder in ("thin", "again"):
        fields = json.loads(Path(folder, "config.json").read_text())
        assert (fields["recipient"], fields["recipient_revision"]) == (beside.base, beside.base_commit)
        card = Path(folder, "README.md").read_text()
        assert "agpl" not in card
        assert f"base_model: {beside.base}" in card.replace("\n- ", " ")
    assert torch.equal(logits_of(load("again")), wanted)


def test_a_copy_of_a_donor_takes_its_recipient_from_its_own_repository(beside: Shelf) -> None:
    """A donor's record names it without a commit, and the folder of that name has another tokenizer."""
    donor = Donor.from_pretrained(beside.law)
    donor = donor.replaced(record=dataclasses.replace(donor.record, source_id=beside.base, source_revision=None))
    donor.save_pretrained("again")
    assert json.loads(Path("again/config.json").read_text())["recipient"] == beside.base
    assert not Path("again/tokenizer.json").exists()


# -- Everything else that opens a recipient --------------------------------------------------------------------------


def test_export(beside: Shelf, wanted: torch.Tensor) -> None:
    export(beside.law, "full")
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained("./full")), wanted)


def test_inspect_and_plan(beside: Shelf) -> None:
    assert len(inspect(beside.law).layer_map) == NUM_LAYERS + 2
    planned = plan(beside.law)
    assert (planned.before.layers, planned.after.layers) == (NUM_LAYERS, NUM_LAYERS + 2)
    assert len(inspect(beside.base, revision=beside.base_commit).weights.per_layer) == NUM_LAYERS


def test_a_check_names_a_recipient_as_a_user_types_it(beside: Shelf) -> None:
    assert len(check_compatibility(beside.base, beside.law).layer_map) == OTHER_LAYERS + 2


def test_convert(beside: Shelf) -> None:
    donor = Donor.from_pretrained(beside.law)
    tensors = donor.tensors()
    torch.save(
        {
            index: {
                name.split(".", 2)[2]: tensor for name, tensor in tensors.items() if name.startswith(f"layers.{n}.")
            }
            for n, index in enumerate(donor.layer_indices)
        },
        "law.pt",
    )
    done = convert("law.pt", beside.base, "converted", recipient_revision=beside.base_commit, position=NUM_LAYERS)
    assert done.recipient == f"{beside.base}@{beside.base_commit}"


def test_models_and_tokenizers_for_measuring_and_training(beside: Shelf) -> None:
    loaded = model_to_measure(beside.base, beside.base_commit)
    assert len(loaded.model.model.layers) == NUM_LAYERS
    assert loaded.model.name_or_path == beside.base
    write_tokenizer(Path(beside.base))
    edit_json(Path(beside.base, "tokenizer_config.json"), eos_token="a")
    assert find_tokenizer(loaded).eos_token != "a"
    shutil.rmtree(beside.law, ignore_errors=True)
    model, tokenizer, commit = model_and_tokenizer(beside.law, None, beside.law_commit, {})
    assert (len(model.layer_map), commit) == (NUM_LAYERS + 2, beside.law_commit)
    assert tokenizer is not None
    assert model.transplant_config.recipient_revision == beside.base_commit


def test_extract(beside: Shelf) -> None:
    done = extract(beside.base, "taken", layers=[NUM_LAYERS - 1], revision=beside.base_commit)
    assert (done.recipient, done.recipient_revision) == (beside.base, beside.base_commit)


# -- Code ------------------------------------------------------------------------------------------------------------

CODE = """
from transformers import LlamaConfig
class Own(LlamaConfig):
    model_type = "own-{0}"
    where = "{0}"
"""


def own_code(folder: Path, where: str, reference: str = "configuration_own.Own") -> None:
    (folder / "configuration_own.py").write_text(CODE.format(where))
    edit_json(folder / "config.json", auto_map={"AutoConfig": reference}, model_type=f"own-{where}")


def test_code_of_the_recipient_is_the_hubs(shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transplant_hf.architecture import open_recipient

    own_code(shelf.family / "recipient", "hub")
    shelf.put_base()
    shutil.copytree(shelf.family / "recipient", tmp_path / "here" / shelf.base)
    own_code(tmp_path / "here" / shelf.base, "folder")
    monkeypatch.chdir(tmp_path / "here")
    found = open_recipient(shelf.base, shelf.base_commit, trust_remote_code=True).config
    assert found.where == "hub"
    assert found.name_or_path == shelf.base

    own_code(shelf.family / "recipient", "hub", "alice/code--configuration_own.Own")
    commit = shelf.hub.commit(shelf.base, shelf.family / "recipient")
    (tmp_path / "here" / "alice" / "code").mkdir()
    with refused(ConfigurationError, "alice/code", "would run instead"):
        open_recipient(shelf.base, commit, trust_remote_code=True)


def test_a_configuration_from_a_folder_is_not_taken_for_the_hubs(shadowed: Shelf) -> None:
    edit_json(Path(shadowed.law, "config.json"), donors=[{"donor": ".", "position": 3}])
    config = AutoConfig.from_pretrained(shadowed.law)
    model = load(shadowed.law, config=config, revision=shadowed.law_commit)
    assert model.transplant_config.donors[0].position == DONOR_POSITION
