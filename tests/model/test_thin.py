"""Thin saves: the donors, a pinned reference to the recipient, and nothing that could get lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GPT2LMHeadModel

from tests.helpers import (
    NUM_LAYERS,
    copied,
    digest_of,
    edit_json,
    layers_of,
    loaded,
    logits_of,
    make_family,
    plain,
    refused,
    tiny_gpt2_model,
    tiny_llama_model,
    two_donors,
)
from transplant_hf import (
    AutoModelWithTransplant,
    CheckpointError,
    ConfigurationError,
    Donor,
    DonorSpec,
    transplant,
)
from transplant_hf.donor.save import donor_folders
from transplant_hf.donor.saved_files import check_artifact_folder

load = AutoModelWithTransplant.from_pretrained


# -- Thin ----------------------------------------------------------------------------------------------------------


def test_a_thin_save_is_a_donor_repo(tiny: Path, tmp_path: Path) -> None:
    model = loaded(tiny, 3, name="law")
    model.save_pretrained(tmp_path / "thin", thin=True)
    config = json.loads((tmp_path / "thin" / "config.json").read_text())
    assert config["donors"] == [{"donor": ".", "position": 3, "mode": "insert", "name": "law"}]
    for again in (load(tmp_path / "thin"), AutoModelForCausalLM.from_pretrained(tmp_path / "thin")):
        assert torch.equal(logits_of(again), logits_of(model))
        assert again.layer_map == model.layer_map
    donor, original = Donor.from_pretrained(tmp_path / "thin"), Donor.from_pretrained(tiny / "donor")
    donor.verify()
    assert (donor.name, donor.position, donor.layer_indices) == ("law", 3, [1, 2])
    assert donor.tensors().keys() == original.tensors().keys()
    for name, tensor in original.tensors().items():
        assert torch.equal(donor.tensors()[name], tensor)
    assert (tmp_path / "thin" / "README.md").exists()
    AutoTokenizer.from_pretrained(tmp_path / "thin")
    assert again.generation_config.max_new_tokens == 11


def test_a_thin_save_is_hardly_more_than_the_donor(tmp_path: Path) -> None:
    """Wide enough for the headers not to count."""
    make_family(tmp_path, lambda seed, **_: tiny_llama_model(seed, hidden_size=256, intermediate_size=768))
    model = loaded(tmp_path, 1)
    model.save_pretrained(tmp_path / "thin", thin=True)
    tensors = sum(tensor.nbytes for tensor in Donor.from_pretrained(tmp_path / "thin").tensors().values())
    files = [path for path in (tmp_path / "thin").rglob("*") if path.is_file()]
    own = sum(path.stat().st_size for path in files if not path.name.startswith("tokenizer"))
    assert own <= 1.01 * tensors


def test_several_donors_thin(tiny: Path, tmp_path: Path) -> None:
    model = two_donors(tiny, "replace")
    model.save_pretrained(tmp_path / "thin", thin=True)
    again = load(tmp_path / "thin")
    assert torch.equal(logits_of(again), logits_of(model))
    assert again.layer_map == model.layer_map
    assert [spec.name for spec in again.transplant_config.donors] == ["a", "b"]
    assert Donor.from_pretrained(tmp_path / "thin", subfolder="a").layer_indices == [2]
    moved = Path(shutil.move(tmp_path / "thin", tmp_path / "moved"))
    assert torch.equal(logits_of(load(moved)), logits_of(model))


@pytest.mark.parametrize(
    "name",
    [
        *(
            "config.json",
            "README.md",
            "modeling_transplant.py",
            "generation_config.json",
            "tokenizer.model",
            "tekken.v3.json",
        ),
        *("Recipient", "A", "custom_generate", "con", "nul.x1", "law ", "law.", " law", "a:b", "a" * 300, "é" * 60),
    ],
)
def test_a_donors_name_may_be_one_that_no_folder_can_have(tiny_gpt2: Path, tmp_path: Path, name: str) -> None:
    donor = str(tiny_gpt2 / "donor")
    specs = [DonorSpec(donor, 0, name="a", layers=[1]), DonorSpec(donor, 2, name=name)]
    model = load(tiny_gpt2 / "recipient", donors=specs)
    model.save_pretrained(tmp_path, thin=True)
    assert {"a", "donor-2"} == {path.name for path in tmp_path.iterdir() if path.is_dir()}
    again = load(tmp_path)
    assert again.layer_map == model.layer_map
    assert torch.equal(logits_of(again), logits_of(model))


def test_folders_of_donors_are_unique() -> None:
    assert donor_folders(["law", "gpt2-1.5b", "my law.v2", "médecine"]) == ["law", "gpt2-1.5b", "my law.v2", "médecine"]
    assert donor_folders(["donor-2", "x.py", "Law", "law"]) == ["donor-2", "donor-2-2", "Law", "donor-4"]
    assert donor_folders(["README.md"]) == [None]


def test_saving_a_reloaded_thin_one_again(tiny: Path, tmp_path: Path) -> None:
    model = two_donors(tiny)
    model.save_pretrained(tmp_path / "one", thin=True)
    load(tmp_path / "one").save_pretrained(tmp_path / "two", thin=True)
    shutil.rmtree(tmp_path / "one")
    again = load(tmp_path / "two")
    assert torch.equal(logits_of(again), logits_of(model))
    assert digest_of(tmp_path / "two").keys() >= {"a/donor.safetensors", "b/donor_config.json", "config.json"}


def test_saving_into_the_folder_it_was_loaded_from(tiny: Path, tmp_path: Path) -> None:
    family = copied(tiny, tmp_path / "family")
    model = load(family / "donor")
    before = logits_of(model)
    with torch.no_grad():
        for parameter in layers_of(model)[1].parameters():
            parameter.mul_(0.5)
    trained = logits_of(model)
    model.save_pretrained(family / "donor", thin=True)
    assert torch.equal(logits_of(model), trained)
    assert not torch.equal(trained, before)
    assert torch.equal(logits_of(load(family / "donor")), trained)


def test_a_thin_save_never_takes_its_recipients_place(tiny_gpt2: Path, tmp_path: Path) -> None:
    """It would delete the only weights that it refers to."""
    family = copied(tiny_gpt2, tmp_path / "family")
    before = digest_of(family)
    with refused(ConfigurationError, str(family / "recipient"), "recipient"):
        load(family / "donor").save_pretrained(family / "recipient", thin=True)
    donor = Donor.from_pretrained(family / "donor")
    with refused(ConfigurationError, str(family / "recipient"), "recipient"):
        donor.save_pretrained(family / "recipient", recipient=str(family / "recipient"))
    assert digest_of(family) == before


def test_from_several_donors_to_one_in_one_folder(tiny_gpt2: Path, tmp_path: Path) -> None:
    """The folders of the old donors go; a folder of the user's own stays."""
    two_donors(tiny_gpt2).save_pretrained(tmp_path / "thin", thin=True)
    (tmp_path / "thin" / "mine").mkdir()
    (tmp_path / "thin" / "mine" / "notes.txt").write_text("mine")
    loaded(tiny_gpt2).save_pretrained(tmp_path / "thin", thin=True)
    weights = [str(path.relative_to(tmp_path / "thin")) for path in (tmp_path / "thin").rglob("*.safetensors")]
    assert weights == ["donor.safetensors"]
    assert (tmp_path / "thin" / "mine" / "notes.txt").read_text() == "mine"


def test_from_one_donor_to_several_in_one_folder(tiny_gpt2: Path, tmp_path: Path) -> None:
    """Nothing of the old artefact is left to be taken for a part of the new one."""
    loaded(tiny_gpt2).save_pretrained(tmp_path / "thin", thin=True)
    two_donors(tiny_gpt2).save_pretrained(tmp_path / "thin", thin=True)
    assert not (tmp_path / "thin" / "donor.safetensors").exists()
    assert len(load(tmp_path / "thin").layer_map) == NUM_LAYERS + 3
    loaded(tiny_gpt2).save_pretrained(tmp_path / "thin")
    assert not (tmp_path / "thin" / "donor_config.json").exists()
    assert type(plain(tmp_path / "thin")) is GPT2LMHeadModel


def test_metadata_survives(tiny_gpt2: Path, tmp_path: Path) -> None:
    family = copied(tiny_gpt2, tmp_path / "family")
    edit_json(family / "donor" / "donor_config.json", metadata={"perplexity": 52.5, "method": ["x"]})
    load(family / "donor").save_pretrained(tmp_path / "thin", thin=True)
    assert Donor.from_pretrained(tmp_path / "thin").metadata == {"perplexity": 52.5, "method": ["x"]}


def test_thin_in_shards(tiny_gpt2: Path, tmp_path: Path) -> None:
    model = loaded(tiny_gpt2)
    model.save_pretrained(tmp_path / "thin", thin=True, max_shard_size="20KB")
    assert (tmp_path / "thin" / "donor.safetensors.index.json").exists()
    assert torch.equal(logits_of(load(tmp_path / "thin")), logits_of(model))


# -- A thin save of a changed recipient ------------------------------------------------------------------------------


def test_a_changed_recipient_weight_is_named(tiny_gpt2: Path, tmp_path: Path) -> None:
    model = loaded(tiny_gpt2, 1)
    with torch.no_grad():
        model.transformer.h[4].mlp.c_fc.bias[3] += 1e-3
    facts = ["transformer.h.2.mlp.c_fc.bias", str(tiny_gpt2 / "recipient"), "in full"]
    with refused(ConfigurationError, *facts) as caught:
        model.save_pretrained(tmp_path / "thin", thin=True)
    assert "more" not in str(caught.value).partition("Save in full")[0]
    assert not (tmp_path / "thin").exists()
    assert list(tmp_path.iterdir()) == []
    model.save_pretrained(tmp_path / "full")
    assert torch.equal(logits_of(plain(tmp_path / "full")), logits_of(model))


def test_the_other_changed_weights_are_counted(tiny_llama: Path, tmp_path: Path) -> None:
    model = loaded(tiny_llama, 1)
    with torch.no_grad():
        for parameter in model.model.layers[0].parameters():
            parameter.add_(1)
    with refused(ConfigurationError, "model.layers.0.", "and 6 more", "Save in full"):
        model.save_pretrained(tmp_path / "thin", thin=True)


@pytest.mark.parametrize(
    ("place", "named"),
    [("model.norm", "model.norm.weight"), ("model.layers.0.mlp", "model.layers.0.mlp."), ("lm_head", "lm_head.weight")],
)
def test_a_recipient_weight_that_is_gone_is_named(tiny_llama: Path, tmp_path: Path, place: str, named: str) -> None:
    """A reload would bring it back, and compute something else."""
    model = loaded(tiny_llama, 3)
    parent, _, name = place.rpartition(".")
    setattr(model.get_submodule(parent), name, torch.nn.Identity())
    with refused(ConfigurationError, named, str(tiny_llama / "recipient"), "Put the modules"):
        model.save_pretrained(tmp_path / "thin", thin=True)
    assert not (tmp_path / "thin").exists()


def test_a_state_dict_may_hold_tied_weights_once(tiny_gpt2: Path, tmp_path: Path) -> None:
    model = loaded(tiny_gpt2, 1)
    state = model.state_dict()
    del state["lm_head.weight"]
    model.save_pretrained(tmp_path / "thin", thin=True, state_dict=state)
    assert torch.equal(logits_of(load(tmp_path / "thin")), logits_of(model))


def test_offloaded_weights_are_those_that_were_loaded(tiny_llama: Path, tmp_path: Path) -> None:
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{number}": "disk" if number == 4 else "cpu" for number in range(6)}
    model = loaded(tiny_llama, device_map=places, offload_folder=str(tmp_path / "offload"))
    wanted = logits_of(model)
    model.save_pretrained(tmp_path / "thin", thin=True)
    assert torch.equal(logits_of(load(tmp_path / "thin")), wanted)
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    with refused(ConfigurationError, "model.norm.weight", "changed in place"):
        model.save_pretrained(tmp_path / "changed", thin=True)


def test_changed_donor_weights_are_no_hindrance(tiny: Path, tmp_path: Path) -> None:
    model = loaded(tiny, 1)
    with torch.no_grad():
        for parameter in layers_of(model)[2].parameters():
            parameter.add_(0.25)
    model.save_pretrained(tmp_path / "thin", thin=True)
    assert torch.equal(logits_of(load(tmp_path / "thin")), logits_of(model))


def test_a_resized_vocabulary_is_a_change(tiny: Path, tmp_path: Path) -> None:
    model = loaded(tiny, 1)
    model.resize_token_embeddings(270)
    with refused(ConfigurationError, "recipient", "in full"):
        model.save_pretrained(tmp_path / "thin", thin=True)


def test_a_new_head_is_a_change(tiny_llama: Path, tmp_path: Path) -> None:
    """Its weights are in no file."""
    model = AutoModelForSequenceClassification.from_pretrained(tiny_llama / "donor")
    with refused(ConfigurationError, "score.weight", "in full"):
        model.save_pretrained(tmp_path / "thin", thin=True)


def test_weights_cast_down_are_compared_as_they_were_loaded(tiny: Path, tmp_path: Path) -> None:
    model = loaded(tiny, 1, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "thin", thin=True)
    again = load(tmp_path / "thin", dtype=torch.bfloat16)
    assert torch.equal(logits_of(again), logits_of(model))


def test_values_that_are_not_finite_are_not_saved_thin(tiny: Path, tmp_path: Path) -> None:
    model = loaded(tiny, 1)
    with torch.no_grad():
        next(layers_of(model)[2].parameters()).fill_(torch.nan)
    with refused(CheckpointError, "layers.1.", "NaN or infinity"):
        model.save_pretrained(tmp_path / "thin", thin=True)
    assert list(tmp_path.iterdir()) == []


def test_a_recipient_that_was_never_loaded_has_no_name(tiny_gpt2: Path, tmp_path: Path) -> None:
    model = transplant(tiny_gpt2_model(1), Donor.from_pretrained(tiny_gpt2 / "donor"), 1)
    with refused(ConfigurationError, "not loaded by name", "in full"):
        model.save_pretrained(tmp_path / "thin", thin=True)
    plain_one = type(model)(model.config)
    with refused(ConfigurationError, "thin=True", "no transplant"):
        plain_one.save_pretrained(tmp_path / "thin", thin=True)


def test_kept_layers_are_compared_too(tiny: Path, tmp_path: Path) -> None:
    model = loaded(tiny, 1, "replace", keep_replaced=True)
    with model.disable_transplants(), torch.no_grad():
        next(layers_of(model)[2].parameters()).add_(1)
    with refused(ConfigurationError, ".2.", "in full"):
        model.save_pretrained(tmp_path / "thin", thin=True)


@pytest.mark.parametrize("keep", [False, True])
def test_replacing_thin(tiny: Path, tmp_path: Path, keep: bool) -> None:
    model = loaded(tiny, 1, "replace", keep_replaced=keep)
    model.save_pretrained(tmp_path / "thin", thin=True)
    again = load(tmp_path / "thin", keep_replaced=True)
    assert torch.equal(logits_of(again), logits_of(model))
    with again.disable_transplants():
        assert torch.equal(logits_of(again), logits_of(plain(tiny / "recipient")))


def test_references_stay_right_wherever_it_is_saved(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the recipient they are relative, so that both can be moved; elsewhere absolute."""
    family = copied(tiny, tmp_path / "family")
    model = load(family / "donor")
    monkeypatch.chdir(tmp_path)
    for target, reference in (("family/thin", "../recipient"), ("thin", "../family/recipient")):
        model.save_pretrained(target, thin=True)
        written = json.loads(Path(target, "config.json").read_text())["recipient"]
        assert (Path(target) / written).resolve() == (family / "recipient").resolve()
        if reference == "../recipient":
            assert written == reference
    moved = Path(shutil.move(family, tmp_path / "moved"))
    assert torch.equal(logits_of(load(moved / "thin")), logits_of(model))


@pytest.mark.parametrize("donors", [5, [5], [{"donor": ".", "position": 1, "subfolder": 5}]])
def test_a_malformed_configuration_is_not_replaced(tiny_gpt2: Path, tmp_path: Path, donors: object) -> None:
    """What belongs to it cannot be told from what is the user's."""
    model, path = loaded(tiny_gpt2, 1), tmp_path / "out" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"model_type": "transplant", "donors": donors}))
    before = path.read_bytes()
    with refused(CheckpointError, str(path), "5"):
        model.save_pretrained(tmp_path / "out", thin=True)
    with refused(CheckpointError, str(path), "5"):
        check_artifact_folder(tmp_path / "out", overwrite=True)
    assert path.read_bytes() == before


@pytest.mark.parametrize("fields", [{"donors": None}, {"recipient": "a\0b", "donors": []}])
def test_a_configuration_without_donors_is_replaced(tiny_gpt2: Path, tmp_path: Path, fields: dict[str, object]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    (tmp_path / "out" / "config.json").write_text(json.dumps({"model_type": "transplant", **fields}))
    loaded(tiny_gpt2, 1).save_pretrained(tmp_path / "out", thin=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["donors"]
