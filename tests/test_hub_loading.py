"""Transplants on the Hub: loaded by name, pinned to commits, kept inside their repository."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, constants
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline

from tests.helpers import (
    DONOR_POSITION,
    NUM_LAYERS,
    Shelf,
    copied,
    edit_json,
    layers_of,
    logits_of,
    plain,
    refused,
)
from transplant_hf import (
    AutoModelWithTransplant,
    ConfigurationError,
    Donor,
    DonorSpec,
    TransplantConfig,
    check_compatibility,
)

pytestmark = pytest.mark.hub

load = AutoModelWithTransplant.from_pretrained


# -- By name ---------------------------------------------------------------------------------------------------------


def test_a_thin_repo_by_its_name(both: Shelf) -> None:
    wanted = logits_of(load(both.family / "donor", config=_local(both)))
    for class_ in (AutoModelWithTransplant, AutoModelForCausalLM):
        model = class_.from_pretrained(both.law)
        assert torch.equal(logits_of(model), wanted)
        config = model.transplant_config
        assert (config.recipient, config.recipient_revision) == (both.base, both.base_commit)
        assert [(spec.donor, spec.revision) for spec in config.donors] == [(both.law, both.law_commit)]
        assert model.layer_map[DONOR_POSITION] == ("donor", 1)
        assert model.name_or_path == both.law


def _local(shelf: Shelf) -> TransplantConfig:
    return TransplantConfig(
        recipient=str(shelf.family / "recipient"), donors={str(shelf.family / "donor"): DONOR_POSITION}
    )


def test_a_pipeline_by_name(both: Shelf) -> None:
    generate = pipeline("text-generation", model=both.law)
    assert len(generate.model.layer_map) == NUM_LAYERS + 2
    assert generate("Hi", do_sample=False)[0]["generated_text"].startswith("Hi")


def test_a_recipient_and_donors_by_name(both: Shelf) -> None:
    model = load(both.base, donors={both.law: 3})
    assert torch.equal(logits_of(model), logits_of(load(both.base, donors=[DonorSpec(both.law, 3)])))
    assert model.layer_map[3] == (both.law.partition("/")[2], 1)
    assert model.transplant_config.recipient_revision == both.base_commit
    assert model.name_or_path == both.base


def test_a_folder_that_refers_to_the_hub(both: Shelf, tmp_path: Path) -> None:
    model = load(both.family / "donor")
    assert model.transplant_config.recipient_revision == both.base_commit
    assert torch.equal(logits_of(model), logits_of(load(both.law)))


def test_only_what_is_needed_is_downloaded(shelf: Shelf) -> None:
    (shelf.family / "recipient" / "other.bin").write_bytes(b"x" * 1000)
    (shelf.family / "recipient" / "pytorch_model.bin").write_bytes(b"x" * 1000)
    (shelf.family / "donor" / "notes.txt").write_text("long")
    shelf.put_base().put_law()
    load(shelf.law)
    asked = {record.path.rpartition("/")[2] for record in shelf.hub.requests.downloads()}
    assert asked == {
        "config.json",
        "donor_config.json",
        "donor.safetensors",
        "model.safetensors",
        "generation_config.json",
    }
    assert shelf.weights(shelf.base) == shelf.weights(shelf.law) == 1


def test_from_config_downloads_no_weights_of_the_recipient(both: Shelf) -> None:
    model = AutoModelWithTransplant.from_config(AutoConfig.from_pretrained(both.law))
    assert len(layers_of(model)) == NUM_LAYERS + 2
    assert both.weights(both.base) == 0


def test_checking_downloads_no_weights_of_the_recipient(both: Shelf) -> None:
    report = check_compatibility(both.base, both.law)
    assert report
    assert both.base in str(report)
    assert both.weights(both.base) == 0


def test_errors_come_before_weights(both: Shelf) -> None:
    with refused(ConfigurationError, "position 9", "0..4"):
        load(both.base, donors={both.law: 9})
    assert both.weights(both.base) == 0


def test_a_custom_cache_holds_everything(both: Shelf, tmp_path: Path) -> None:
    """The tokenizer of a thin save is looked for there too."""
    cache, usual = tmp_path / "cache", Path(constants.HF_HUB_CACHE)
    model = load(both.base, donors={both.law: 1}, cache_dir=cache)
    AutoTokenizer.from_pretrained(both.base, cache_dir=cache)
    names = {path.name for path in cache.iterdir()}
    assert {f"models--{name.replace('/', '--')}" for name in (both.base, both.law)} <= names
    model.save_pretrained(tmp_path / "thin", thin=True)
    assert (tmp_path / "thin" / "tokenizer.json").exists()
    assert not list(usual.glob(f"models--{both.base.replace('/', '--')}"))


# -- Revisions -------------------------------------------------------------------------------------------------------


def test_a_revision_is_of_the_repo_that_was_asked_for(both: Shelf) -> None:
    """The recipient has no such tag, and must not be asked for it."""
    both.hub.tag(both.law, "v1")
    edit_json(
        both.family / "donor" / "config.json", donors=[{"donor": ".", "position": 3, "mode": "insert", "name": "donor"}]
    )
    second = both.hub.commit(both.law, both.family / "donor")
    first, newest = load(both.law, revision="v1"), load(both.law)
    assert first.layer_map.layers_of("donor") == [1, 2]
    assert newest.layer_map.layers_of("donor") == [3, 4]
    assert first.transplant_config.donors[0].revision == both.law_commit
    assert newest.transplant_config.donors[0].revision == second
    assert first.transplant_config.recipient_revision == both.base_commit
    for class_ in (AutoModelForCausalLM, AutoModelWithTransplant):
        again = class_.from_pretrained(both.law, revision=both.law_commit)
        assert torch.equal(logits_of(again), logits_of(first))
    assert not both.hub.requests.matching("*", f"*{both.base}*v1*")


def test_a_revision_with_donors_is_the_recipients(both: Shelf) -> None:
    both.hub.tag(both.base, "v1")
    both.hub.tag(both.law, "old")
    moved = both.hub.commit(both.base, _other_weights(both))
    one = load(both.base, donors=[DonorSpec(both.law, 1, revision="old")], revision="v1")
    two = load(both.base, donors={both.law: 1})
    assert one.transplant_config.recipient_revision == both.base_commit
    assert one.transplant_config.donors[0].revision == both.law_commit
    assert two.transplant_config.recipient_revision == moved
    assert not torch.equal(logits_of(one), logits_of(two))
    assert not both.hub.requests.matching("*", f"*{both.law}*v1*")


def _other_weights(shelf: Shelf) -> dict[str, bytes | Path]:
    """The source model's weights in place of the recipient's."""
    return {"model.safetensors": shelf.family / "source" / "model.safetensors"}


def test_a_pinned_recipient_stays_when_its_branch_moves(shelf: Shelf) -> None:
    shelf.put_base()
    edit_json(shelf.family / "donor" / "config.json", recipient_revision=shelf.base_commit)
    shelf.put_law()
    before = logits_of(load(shelf.law))
    shelf.hub.commit(shelf.base, _other_weights(shelf))
    model = load(shelf.law)
    assert torch.equal(logits_of(model), before)
    assert model.transplant_config.recipient_revision == shelf.base_commit


def test_a_thin_save_pins_what_was_loaded(both: Shelf, tmp_path: Path) -> None:
    model = load(both.law)
    both.hub.commit(both.base, _other_weights(both))
    both.hub.commit(both.law, delete=["donor.safetensors"])
    model.save_pretrained(tmp_path / "thin", thin=True)
    config = json.loads((tmp_path / "thin" / "config.json").read_text())
    assert (config["recipient"], config["recipient_revision"]) == (both.base, both.base_commit)
    assert config["donors"] == [{"donor": ".", "position": 1, "mode": "insert", "name": "donor"}]
    assert torch.equal(logits_of(load(tmp_path / "thin")), logits_of(model))
    card = ModelCard.load(tmp_path / "thin" / "README.md")
    assert card.data.base_model == both.base
    assert both.base_commit in card.text


def test_a_donor_taken_from_a_hub_model_knows_its_source(both: Shelf) -> None:
    model = load(both.law)
    donor = Donor.from_model(model, [0])
    assert (donor.record.source_id, donor.record.source_revision) == (both.base, both.base_commit)
    from_plain = Donor.from_model(plain(both.base), [0])  # type: ignore[arg-type]
    assert from_plain.record.source_id == both.base


# -- Folders inside a repository -------------------------------------------------------------------------------------


def test_a_subfolder(shelf: Shelf) -> None:
    shelf.put_base()
    edit_json(shelf.family / "donor" / "config.json", recipient=shelf.base)
    files = {f"deep/law/{path.name}": path for path in (shelf.family / "donor").iterdir()}
    shelf.hub.add_repo(shelf.law, files)
    for class_ in (AutoModelWithTransplant, AutoModelForCausalLM):
        model = class_.from_pretrained(shelf.law, subfolder="deep/law")
        assert len(model.layer_map) == NUM_LAYERS + 2
    by_spec = load(shelf.base, donors=[DonorSpec(shelf.law, 1, subfolder="deep/law")])
    assert torch.equal(logits_of(by_spec), logits_of(model))
    assert by_spec.layer_map[1] == ("law", 1)
    assert Donor.from_pretrained(shelf.law, subfolder="deep/law").num_layers == 2


def test_a_repository_that_carries_its_recipient(shelf: Shelf) -> None:
    edit_json(shelf.family / "donor" / "config.json", recipient="./base")
    copied(shelf.family / "recipient", shelf.family / "donor" / "base")
    shelf.law_commit = shelf.hub.add_repo(shelf.law, shelf.family / "donor")
    model = load(shelf.law)
    assert torch.equal(logits_of(model), logits_of(load(shelf.family / "donor")))


def test_donor_and_recipient_beside_each_other_in_one_repository(shelf: Shelf) -> None:
    """References are relative to the folder of `config.json`, which need not be the repository's top."""
    edit_json(shelf.family / "donor" / "config.json", recipient="../recipient")
    shelf.hub.add_repo(shelf.law, shelf.family)
    model = load(shelf.law, subfolder="donor")
    assert torch.equal(logits_of(model), logits_of(load(shelf.family / "donor")))


@pytest.mark.parametrize("reference", ["../secret", "/etc", "~/models", "../../.."])
def test_a_recipient_outside_the_repository(shelf: Shelf, reference: str) -> None:
    shelf.put_base().put_law(recipient=reference)
    with refused(ConfigurationError, f"{shelf.law}@{shelf.law_commit}", repr(reference), "outside that repository"):
        load(shelf.law)


@pytest.mark.parametrize("fields", [{"donor": "/etc"}, {"donor": "../x"}, {"donor": ".", "subfolder": "../../x"}])
def test_a_donor_outside_the_repository(shelf: Shelf, fields: dict[str, Any]) -> None:
    edit_json(shelf.family / "donor" / "config.json", donors=[{"position": 1, "name": "x", **fields}])
    shelf.put_base().put_law()
    with refused(ConfigurationError, "out"):
        load(shelf.law)
    assert shelf.weights(shelf.base) == 0
