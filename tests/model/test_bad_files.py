"""Every bad file is one clear sentence, before any weight is read where it can be known before."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
)

from tests.helpers import copied, edit_json, edit_weights, refused
from transplant_hf import (
    AutoModelWithTransplant,
    CheckpointError,
    CompatibilityError,
    ConfigurationError,
    Donor,
    HubError,
    IntegrityError,
    TransplantError,
)

load = AutoModelWithTransplant.from_pretrained


@pytest.fixture
def family(tiny_gpt2: Path, tmp_path: Path) -> Path:
    """A GPT-2 family to be changed, whose recipient has no weights: whoever reads them fails in another way."""
    folder = copied(tiny_gpt2, tmp_path / "family")
    (folder / "recipient" / "model.safetensors").write_bytes(b"no weights at all")
    return folder


@pytest.fixture
def whole(tiny_gpt2: Path, tmp_path: Path) -> Path:
    """A GPT-2 family to be changed, weights included."""
    return copied(tiny_gpt2, tmp_path / "family")


# -- Files -------------------------------------------------------------------------------------------------------


def test_unknown_donor_fields(family: Path) -> None:
    edit_json(family / "donor" / "config.json", donors=[{"donor": ".", "position": 1, "scale": 2}])
    for class_ in (AutoModelWithTransplant, AutoModelForCausalLM):
        with refused(ConfigurationError, "unknown donor field 'scale'", "strength"):
            class_.from_pretrained(family / "donor")


def test_a_newer_format(family: Path) -> None:
    edit_json(family / "donor" / "config.json", format_version=3)
    for class_ in (AutoModelWithTransplant, AutoModelForCausalLM):
        with refused(ConfigurationError, "format_version 3", "up to 2", "a newer transplant_hf", str(family / "donor")):
            class_.from_pretrained(family / "donor")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("donor.safetensors", IntegrityError),
        ("donor_config.json", CheckpointError),
        ("config.json", ConfigurationError),
    ],
)
def test_a_missing_file_of_a_donor(family: Path, name: str, kind: Any) -> None:
    (family / "donor" / name).unlink()
    with refused(kind, name, str(family / "donor")):
        load(family / "donor")


def test_missing_weights_without_a_record_of_them(family: Path) -> None:
    edit_json(family / "donor" / "donor_config.json", files=None)
    (family / "donor" / "donor.safetensors").unlink()
    with refused(CheckpointError, "donor.safetensors", str(family / "donor")):
        load(family / "donor")


def test_a_missing_shard(family: Path) -> None:
    donor = Donor.from_pretrained(family / "donor")
    donor.save_pretrained(family / "sharded", recipient=str(family / "recipient"), max_shard_size="20KB")
    lost = sorted((family / "sharded").glob("donor-*.safetensors"))[1]
    lost.unlink()
    with refused(IntegrityError, str(lost), "is missing"):
        load(family / "sharded")


def test_a_truncated_donor(family: Path) -> None:
    path = family / "donor" / "donor.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with refused(IntegrityError, str(path), "has", "records", "force_download"):
        load(family / "donor")
    edit_json(family / "donor" / "donor_config.json", files=None)
    with refused(CheckpointError, str(path), "not a whole safetensors file"):
        load(family / "donor")


def test_a_donor_config_that_is_not_json(family: Path) -> None:
    (family / "donor" / "donor_config.json").write_text("<html>")
    with refused(CheckpointError, str(family / "donor" / "donor_config.json"), "cannot be read as JSON"):
        load(family / "donor")


@pytest.mark.parametrize("class_", [AutoModelWithTransplant, AutoModelForCausalLM])
def test_a_recipient_folder_that_was_moved(family: Path, class_: Any) -> None:
    (family / "recipient").rename(family / "moved")
    with refused(ConfigurationError, "'../recipient'", str(family / "recipient"), "neither a folder"):
        class_.from_pretrained(family / "donor")


def test_a_recipient_without_a_config(family: Path) -> None:
    (family / "recipient" / "config.json").unlink()
    with refused(ConfigurationError, "recipient", str(family / "recipient"), "no config.json"):
        load(family / "donor")


@pytest.mark.parametrize("text", ["<html>", '{"model_type": "nosuchmodel"}', "{}"])
def test_a_recipient_config_that_is_none(family: Path, text: str) -> None:
    (family / "recipient" / "config.json").write_text(text)
    with pytest.raises(TransplantError, match=re.escape(str(family / "recipient"))) as caught:
        load(family / "donor")
    assert not isinstance(caught.value, HubError), "the Hub has no part in this"


def test_tensors_that_do_not_fit_are_seen_in_the_headers(family: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["layers.0.ln_1.bias"]
        tensors["layers.1.mlp.c_fc.weight"] = torch.zeros(32, 100)
        tensors["layers.1.gate"] = torch.zeros(3)

    edit_weights(family / "donor", change)
    facts = [
        "layers.0.ln_1.bias: missing",
        "layers.1.mlp.c_fc.weight: donor [32, 100], its layer needs [32, 128]",
        "layers.1.gate: unexpected",
    ]
    with refused(CompatibilityError, *facts) as caught:
        load(family / "donor")
    assert len(caught.value.mismatches) == 3


# -- Weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("class_", [AutoModelWithTransplant, AutoModelForCausalLM])
def test_values_that_are_not_finite(whole: Path, value: float, class_: Any) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["layers.1.attn.c_proj.weight"][2, 3] = value

    edit_weights(whole / "donor", change)
    with refused(CheckpointError, "donor: layers.1.attn.c_proj.weight", "NaN or infinity"):
        class_.from_pretrained(whole / "donor")


def test_values_that_are_not_finite_are_counted(whole: Path) -> None:
    edit_weights(whole / "donor", lambda tensors: [tensor.fill_(torch.nan) for tensor in tensors.values()])
    with refused(CheckpointError, "donor: layers.", "and 21 more", "NaN or infinity"):
        load(whole / "donor")


def test_values_that_overflow_only_in_the_dtype_asked_for(whole: Path) -> None:
    """The donor itself is sound."""
    edit_weights(whole / "donor", lambda tensors: tensors["layers.1.ln_1.bias"].fill_(1e6))
    assert load(whole / "donor").dtype == torch.float32


def test_bytes_that_are_not_the_recorded_ones(whole: Path) -> None:
    path = whole / "donor" / "donor.safetensors"
    recorded = json.loads((whole / "donor" / "donor_config.json").read_text())["files"]["donor.safetensors"]["sha256"]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    for class_ in (AutoModelWithTransplant, AutoModelForCausalLM):
        with refused(IntegrityError, str(path), recorded, "bytes were changed", "force_download=True"):
            class_.from_pretrained(whole / "donor")


def test_truncated_recipient_weights(whole: Path) -> None:
    path = whole / "recipient" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with refused(CheckpointError, str(path), "not a whole safetensors file"):
        load(whole / "donor")


def test_recipient_weights_of_another_model(whole: Path) -> None:
    save_file({"encoder.weight": torch.ones(2)}, whole / "recipient" / "model.safetensors", metadata={"format": "pt"})
    with refused(CheckpointError, "no tensor", str(whole / "recipient"), "transformer.h", "another model"):
        load(whole / "donor")


def test_recipient_weights_that_are_missing(whole: Path) -> None:
    """As everywhere in Transformers: no weights at all is an error that names them."""
    (whole / "recipient" / "model.safetensors").unlink()
    with refused(CheckpointError, "model.safetensors", str(whole / "recipient")):
        load(whole / "donor")


def test_recipient_weights_of_another_shape(whole: Path) -> None:
    path = whole / "recipient" / "model.safetensors"
    tensors = load_file(path)
    tensors["transformer.h.3.ln_1.weight"] = torch.ones(16)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(whole / "donor")
