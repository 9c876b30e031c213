"""Does a donor fit: every mismatch at once, with both values, from headers and configurations only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from tests.architectures.tiny_models import tiny_model
from tests.helpers import (
    copied,
    edit_json,
    edit_weights,
    make_family,
    plain,
    refused,
    tiny_gpt2_model,
    tiny_llama_model,
)
from transplant_hf import CompatibilityError, ConfigurationError, Donor, check_compatibility, transplant


def test_a_donor_that_fits(tiny: Path) -> None:
    report = check_compatibility(tiny / "recipient", tiny / "donor", 3)
    assert report
    assert report.compatible
    assert report.native is True
    assert report.mismatches == ()
    assert report.position == 3
    assert [slot.source for slot in report.layer_map] == ["recipient"] * 3 + ["donor"] * 2 + ["recipient"]
    assert "fits" in str(report)
    assert str(tiny / "recipient") in str(report)
    report.raise_for_mismatches()


def test_the_recommended_position_is_the_default(tiny_gpt2: Path) -> None:
    assert check_compatibility(tiny_gpt2 / "recipient", tiny_gpt2 / "donor").position == 1
    with refused(ConfigurationError, "no position", "Pass one"):
        check_compatibility(tiny_gpt2 / "recipient", Donor.from_model(tiny_gpt2_model(0), [0]))


def test_recipient_and_donor_may_be_given_in_many_ways(tiny_gpt2: Path) -> None:
    recipient, donor = tiny_gpt2 / "recipient", tiny_gpt2 / "donor"
    opened = Donor.from_pretrained(donor)
    model = plain(recipient)
    for ours in (str(recipient), recipient, model, nn.DataParallel(model), AutoConfig.from_pretrained(recipient)):
        for theirs in (str(donor), donor, opened):
            assert check_compatibility(ours, theirs, 0)


def test_no_weight_is_read(tiny_gpt2: Path, tmp_path: Path) -> None:
    family = copied(tiny_gpt2, tmp_path / "family")
    (family / "recipient" / "model.safetensors").write_bytes(b"no weights at all")
    assert check_compatibility(family / "recipient", family / "donor", 1)


def test_every_mismatch_is_listed_with_both_values(tmp_path: Path) -> None:
    recipient = tiny_llama_model(0)
    source = tiny_llama_model(
        1,
        hidden_size=48,
        num_attention_heads=6,
        num_key_value_heads=3,
        intermediate_size=64,
        rms_norm_eps=1e-3,
        hidden_act="gelu",
        rope_theta=5e5,
    )
    report = check_compatibility(recipient, Donor.from_model(source, [1, 2], name="law"), 1)
    assert not report
    lines = {line.partition(":")[0]: line for line in report.mismatches}
    for field, theirs, ours in [
        ("hidden_size", "48", "32"),
        ("num_attention_heads", "6", "4"),
        ("num_key_value_heads", "3", "2"),
        ("intermediate_size", "64", "48"),
        ("rms_norm_eps", "0.001", "1e-06"),
        ("hidden_act", "'gelu'", "'silu'"),
        ("rope_parameters", "500000.0", "10000.0"),
    ]:
        assert f"donor {theirs}" in lines[field] or theirs in lines[field], lines[field]
        assert ours in lines[field].partition("recipient")[2], lines[field]
    with refused(CompatibilityError, *report.mismatches, "law", "same shape") as caught:
        report.raise_for_mismatches()
    assert caught.value.mismatches == report.mismatches


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"layer_norm_epsilon": 1e-3}, "layer_norm_epsilon"),
        ({"n_head": 2}, "n_head"),
        ({"activation_function": "relu"}, "activation_function"),
        ({"n_inner": 64}, "n_inner"),
        ({"scale_attn_weights": False}, "scale_attn_weights"),
    ],
)
def test_a_field_that_reaches_the_layers(fields: dict[str, Any], name: str) -> None:
    report = check_compatibility(tiny_gpt2_model(0), Donor.from_model(tiny_gpt2_model(1, **fields), [0]), 0)
    assert any(line.startswith(f"{name}:") for line in report.mismatches), report


@pytest.mark.parametrize(
    "fields",
    [
        {"n_positions": 16},
        {"vocab_size": 300},
        {"resid_pdrop": 0.3},
        {"n_layer": 7},
        {"bos_token_id": 1},
        {"initializer_range": 0.5},
        {"tie_word_embeddings": False},
    ],
)
def test_a_field_that_does_not(fields: dict[str, Any]) -> None:
    report = check_compatibility(tiny_gpt2_model(0), Donor.from_model(tiny_gpt2_model(1, **fields), [0]), 0)
    assert report, str(report)


def test_dropout_is_the_recipients() -> None:
    """It matters in training only, and a native configuration has one for all layers."""
    report = check_compatibility(tiny_gpt2_model(0), Donor.from_model(tiny_gpt2_model(1, resid_pdrop=0.3), [0]), 0)
    assert report.native is True, report.notes


@pytest.mark.parametrize("model_type", ["git", "phi4_multimodal", "gemma3", "mpt"])
def test_a_part_of_the_configuration_is_compared_by_what_reaches_the_layers(model_type: str, tmp_path: Path) -> None:
    """Bookkeeping differs between a model in memory and the same one read from files, in every part."""
    tiny_model(model_type).save_pretrained(tmp_path)
    source = tiny_model(model_type, seed=1)
    for part in [source.config, *(getattr(source.config, name) for name in source.config.sub_configs)]:
        part.dtype, part.architectures, part._name_or_path = torch.float64, ["Other"], "elsewhere"
        part.transformers_version, part.output_hidden_states, part.pad_token_id, part.eos_token_id = "4.0.0", True, 5, 6
        part.return_dict = False
    report = check_compatibility(tmp_path, Donor.from_model(source, [1, 2], name="law"), 1)
    assert report.mismatches == ()
    assert report.native


def test_a_part_of_the_configuration_that_reaches_the_layers() -> None:
    recipient = tiny_model("mpt")
    source = tiny_model("mpt", attn_config={"clip_qkv": 0.5})
    report = check_compatibility(recipient, Donor.from_model(source, [1, 2], name="law"), 1)
    assert report.mismatches == ("attn_config.clip_qkv: donor 0.5, recipient None",)


@pytest.mark.parametrize("model_type", ["git", "gemma3"])
def test_encoders_are_the_recipients(model_type: str) -> None:
    """GIT's layers read the number of image tokens, and the images are encoded by the recipient."""
    recipient, source = tiny_model(model_type), tiny_model(model_type, seed=1)
    vision = source.config.vision_config
    vision.image_size, vision.hidden_act, vision.num_hidden_layers = 2 * vision.image_size, "relu", 7
    model = transplant(recipient, Donor.from_model(source, [1, 2], name="law"), 1)
    assert model.transplant_config is not None
    layers = [layer for layer in model.modules() if hasattr(layer, "image_patch_tokens")]
    assert len({layer.image_patch_tokens for layer in layers}) <= 1


def test_another_model_type() -> None:
    report = check_compatibility(tiny_llama_model(0), Donor.from_model(tiny_gpt2_model(0), [0]), 9)
    assert "model_type: donor 'gpt2', recipient 'llama'" in report.mismatches
    assert any("position 9" in line for line in report.mismatches)


@pytest.mark.parametrize("position", [-1, 5])
def test_a_position_outside(tiny_gpt2: Path, position: int) -> None:
    if position < 0:
        with refused(ConfigurationError, str(position), "0..L"):
            check_compatibility(tiny_gpt2 / "recipient", tiny_gpt2 / "donor", position)
        return
    report = check_compatibility(tiny_gpt2 / "recipient", tiny_gpt2 / "donor", position)
    assert not report
    assert any("position 5" in line and "0..4" in line for line in report.mismatches)


def test_tensors_that_do_not_fit_their_own_configuration(tiny_gpt2: Path, tmp_path: Path) -> None:
    donor = copied(tiny_gpt2 / "donor", tmp_path / "donor")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["layers.0.ln_1.bias"]
        tensors["layers.1.mlp.c_fc.weight"] = torch.zeros(32, 100)
        tensors["layers.1.gate"] = torch.zeros(3)

    edit_weights(donor, change)
    report = check_compatibility(tiny_gpt2 / "recipient", donor, 1)
    text = str(report)
    for fact in (
        "layers.0.ln_1.bias: missing",
        "layers.1.mlp.c_fc.weight: donor [32, 100], its layer needs [32, 128]",
        "layers.1.gate: unexpected",
    ):
        assert fact in text


def test_a_long_list_of_tensors_is_counted(tiny_gpt2: Path, tmp_path: Path) -> None:
    donor = copied(tiny_gpt2 / "donor", tmp_path / "donor")
    edit_weights(donor, lambda tensors: tensors.update({f"layers.0.x{n}": torch.ones(1) for n in range(20)}))
    report = check_compatibility(tiny_gpt2 / "recipient", donor, 1)
    assert len(report.mismatches) == 9
    assert "12 more tensors" in report.mismatches[-1]


def test_layers_past_the_end_of_their_source(tiny_gpt2: Path, tmp_path: Path) -> None:
    donor = copied(tiny_gpt2 / "donor", tmp_path / "donor")
    edit_json(donor / "donor_config.json", layer_indices=[3, 4])
    report = check_compatibility(tiny_gpt2 / "recipient", donor, 1)
    assert any("[3, 4]" in line and "4 layers" in line for line in report.mismatches)


def test_old_checkpoints_hold_masks_that_nobody_needs(tiny_gpt2: Path, tmp_path: Path) -> None:
    """GPT-2 once saved a causal mask with each layer; Transformers leaves it out."""
    donor = copied(tiny_gpt2 / "donor", tmp_path / "donor")
    edit_weights(donor, lambda tensors: tensors.update({"layers.1.attn.bias": torch.ones(1, 1, 64, 64)}))
    assert check_compatibility(tiny_gpt2 / "recipient", donor, 1)


def test_what_only_this_package_can_load(inverse_gpt2: Path) -> None:
    report = check_compatibility(inverse_gpt2 / "recipient", inverse_gpt2 / "donor", 1)
    assert report
    assert report.native is False
    assert any("scaling" in note and "became" in note for note in report.notes), report.notes
    assert "only transplant_hf can load" in str(report)


def test_a_scaling_by_the_layers_number_is_a_mismatch(tiny_gpt2: Path, inverse_gpt2: Path) -> None:
    report = check_compatibility(tiny_gpt2 / "recipient", inverse_gpt2 / "donor", 1)
    assert any(
        line.startswith("scale_attn_by_inverse_layer_idx: donor True, recipient False") for line in report.mismatches
    )


def test_the_report_as_json(tiny_gpt2: Path) -> None:
    report = check_compatibility(tiny_gpt2 / "recipient", tiny_gpt2 / "donor", 1)
    content = json.loads(json.dumps(report.to_dict()))
    assert content["compatible"] is True
    assert content["layer_map"][1] == ["donor", 1]
    assert content["mismatches"] == []


def test_another_source_of_the_same_shape(tmp_path: Path, tiny_llama: Path) -> None:
    """A deeper source model with a longer context: its layers fit all the same."""
    other = make_family(
        tmp_path, lambda seed, **_: tiny_llama_model(seed, num_hidden_layers=6, max_position_embeddings=128)
    )
    donor = Donor.from_model(plain(other / "source"), [4, 5], name="deep")
    report = check_compatibility(tiny_llama / "recipient", donor, 2)
    assert report
    assert report.layer_map[2:4] == (("deep", 4), ("deep", 5))


def test_swapped_arguments_are_told_apart(tiny_llama: Path) -> None:
    recipient, donor = tiny_llama / "recipient", tiny_llama / "donor"
    with refused(ConfigurationError, f"{recipient} is not a donor, but {donor} is", "Pass the recipient first"):
        check_compatibility(donor, recipient)
