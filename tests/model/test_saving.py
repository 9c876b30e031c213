"""Full saves: what the recipient's class can express loads without this package, the rest says so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.helpers import (
    NUM_LAYERS,
    cast_weights,
    copied,
    digest_of,
    layers_of,
    loaded,
    logits_of,
    plain,
    refused,
    two_donors,
)
from transplant_hf import (
    AutoModelWithTransplant,
    ConfigurationError,
    Donor,
)

load = AutoModelWithTransplant.from_pretrained


# -- Full ----------------------------------------------------------------------------------------------------------


def test_a_full_save_is_a_native_checkpoint(tiny: Path, tmp_path: Path) -> None:
    model = loaded(tiny, 1)
    model.save_pretrained(tmp_path / "full")
    config = json.loads((tmp_path / "full" / "config.json").read_text())
    assert config["model_type"] == model.config.model_type != "transplant"
    assert config["architectures"] == [type(model).__name__]
    assert "transplant" not in json.dumps(config)
    assert "auto_map" not in config
    names = sorted(path.name for path in (tmp_path / "full").iterdir() if not path.name.startswith("tokenizer"))
    assert names == ["README.md", "config.json", "generation_config.json", "model.safetensors"]
    again = load_file(tmp_path / "full" / "model.safetensors")
    donor = Donor.from_pretrained(tiny / "donor").tensors()
    inserted = {name for name in again if ".1." in name or ".2." in name}
    for name, tensor in donor.items():
        _, number, rest = name.split(".", 2)
        match = [key for key in inserted if key.endswith(f".{1 + int(number)}.{rest}")]
        assert len(match) == 1
        assert torch.equal(again[match[0]], tensor)


def test_two_donors_in_full(tiny: Path, tmp_path: Path) -> None:
    model = two_donors(tiny, "replace")
    model.save_pretrained(tmp_path / "full")
    assert torch.equal(logits_of(plain(tmp_path / "full")), logits_of(model))
    assert not hasattr(plain(tmp_path / "full"), "transplant_config")


def test_in_shards(tiny: Path, tmp_path: Path) -> None:
    model = loaded(tiny, 1)
    model.save_pretrained(tmp_path / "full", max_shard_size="40KB")
    assert len(list((tmp_path / "full").glob("model-*.safetensors"))) > 2
    assert torch.equal(logits_of(plain(tmp_path / "full")), logits_of(model))
    model.save_pretrained(tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").glob("*.safetensors*")] == ["model.safetensors"]


def test_a_variant_stands_beside_the_rest(tiny_gpt2: Path, tmp_path: Path) -> None:
    model = loaded(tiny_gpt2, 1)
    model.save_pretrained(tmp_path / "full")
    model.save_pretrained(tmp_path / "full", variant="fp16")
    names = {path.name for path in (tmp_path / "full").glob("*.safetensors")}
    assert names == {"model.safetensors", "model.fp16.safetensors"}
    assert torch.equal(logits_of(plain(tmp_path / "full", variant="fp16")), logits_of(model))


def test_with_a_state_dict_as_a_trainer_does(tiny: Path, tmp_path: Path) -> None:
    model = loaded(tiny, 1)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    changed = next(name for name in state if "norm" in name or "ln_" in name)
    state[changed] += 1
    model.save_pretrained(tmp_path / "full", state_dict=state)
    again = plain(tmp_path / "full")
    assert torch.equal(again.state_dict()[changed], state[changed])
    assert not torch.equal(logits_of(again), logits_of(model))


def test_replaced_layers_that_are_kept_are_not_saved(tiny: Path, tmp_path: Path) -> None:
    model = loaded(tiny, 1, "replace", keep_replaced=True)
    model.save_pretrained(tmp_path / "full")
    again = plain(tmp_path / "full")
    assert len(layers_of(again)) == NUM_LAYERS
    assert torch.equal(logits_of(again), logits_of(model))


def test_switched_off_the_recipient_is_saved(tiny: Path, tmp_path: Path) -> None:
    model = loaded(tiny, 1)
    with model.disable_transplants():
        model.save_pretrained(tmp_path / "recipient")
    assert torch.equal(logits_of(plain(tmp_path / "recipient")), logits_of(plain(tiny / "recipient")))
    with model.disable_transplants(), refused(ConfigurationError, "donor", "outside disable_transplants()"):
        model.save_pretrained(tmp_path / "thin", thin=True)
    assert not (tmp_path / "thin").exists()


def test_with_one_of_two_switched_off(tiny: Path, tmp_path: Path) -> None:
    """What runs is what is saved, or it is refused; never something between."""
    model = two_donors(tiny)
    with model.disable_transplants("a"):
        inside = logits_of(model)
        try:
            model.save_pretrained(tmp_path / "full")
        except ConfigurationError as error:
            assert "switched off" in str(error)
            return
    assert torch.equal(logits_of(plain(tmp_path / "full")), inside)


@pytest.mark.parametrize("thin", [False, True])
def test_memory_format_and_dtype_are_kept(family: Path, tmp_path: Path, thin: bool) -> None:
    cast_weights(family / "recipient", torch.bfloat16)
    model = loaded(family, 1, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "saved", thin=thin)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto")
    assert again.dtype == torch.bfloat16
    assert torch.equal(logits_of(again), logits_of(model))


# -- Scaled --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("thin", [False, True])
def test_a_strength_is_saved(tiny: Path, tmp_path: Path, warned: list[str], thin: bool) -> None:
    """No native checkpoint can say it, so a full save is in the transplant format."""
    model = loaded(tiny, 2, strength=0.5)
    model.save_pretrained(tmp_path / "saved", thin=thin)
    if not thin:
        text = " ".join(warned)
        assert "strength of donor is not 1" in text
        assert "needs transplant_hf" in text
        shutil.move(tmp_path / "saved", tmp_path / "elsewhere")
    again = load(tmp_path / ("saved" if thin else "elsewhere"))
    assert torch.equal(logits_of(again), logits_of(model))
    assert again.transplant_config.donors[0].strength == 0.5
    with again.disable_transplants():
        assert torch.equal(logits_of(again), logits_of(plain(tiny / "recipient")))


def test_a_scaled_and_a_replacing_donor_in_full(tiny: Path, tmp_path: Path) -> None:
    model = two_donors(tiny, "replace", strength=0.25)
    model.save_pretrained(tmp_path / "full")
    again, info = load(tmp_path / "full", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits_of(again), logits_of(model))
    assert again.layer_map == model.layer_map


def test_a_full_save_never_removes_the_donors_it_was_loaded_from(tiny_gpt2: Path, tmp_path: Path) -> None:
    family = copied(tiny_gpt2, tmp_path / "family")
    model = loaded(family)
    with refused(ConfigurationError, "holds donor", "thin=True"):
        model.save_pretrained(family / "donor")
    assert torch.equal(logits_of(loaded(family)), logits_of(model))


@pytest.mark.parametrize("thin", [False, True])
def test_a_save_over_its_own_recipient_is_refused(tiny_gpt2: Path, tmp_path: Path, thin: bool) -> None:
    family = copied(tiny_gpt2, tmp_path / "family")
    model = loaded(family)
    before = digest_of(family / "recipient")
    with refused(ConfigurationError, "folder of the recipient itself", str(family / "recipient")):
        model.save_pretrained(family / "recipient", thin=thin)
    assert digest_of(family / "recipient") == before
