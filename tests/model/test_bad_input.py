"""Every bad request is one clear sentence, before any weight is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    GPT2Config,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from tests.helpers import copied, edit_json, loaded, refused, tiny_gpt2_model, tiny_llama_model
from transplant_hf import (
    AutoModelWithTransplant,
    CheckpointError,
    CompatibilityError,
    ConfigurationError,
    Donor,
    DonorSpec,
    TransplantConfig,
)

load = AutoModelWithTransplant.from_pretrained


@pytest.fixture
def family(tiny_gpt2: Path, tmp_path: Path) -> Path:
    """A GPT-2 family to be changed, whose recipient has no weights: whoever reads them fails in another way."""
    folder = copied(tiny_gpt2, tmp_path / "family")
    (folder / "recipient" / "model.safetensors").write_bytes(b"no weights at all")
    return folder


def donor_of(model: Any, folder: Path, layers: list[int], name: str = "other") -> Path:
    Donor.from_model(model, layers, name=name).save_pretrained(folder, position=1, recipient="user/base")
    return folder


# -- Positions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("position", "mode", "facts"),
    [
        (5, "insert", ("position 5", "'donor'", "0..4", "4 layers")),
        (-1, "insert", ("position", "-1", "0..L", "not counted from the end")),
        (3, "replace", ("position 3 of donor 'donor'", "outside 0..2", "4 layers")),
    ],
)
def test_a_position_outside(family: Path, position: int, mode: str, facts: tuple[str, ...]) -> None:
    with refused(ConfigurationError, *facts):
        loaded(family, position, mode)


def test_overlapping_replacements(family: Path) -> None:
    donor = str(family / "donor")
    specs = [DonorSpec(donor, 0, "replace", name="one"), DonorSpec(donor, 1, "replace", name="two")]
    with refused(ConfigurationError, "'one'", "'two'", "recipient layer 1", "overlap"):
        load(family / "recipient", donors=specs)


def test_duplicate_names(family: Path) -> None:
    donor = str(family / "donor")
    with refused(ConfigurationError, "two donors are named 'donor'", "position 0", "position 2", "name="):
        load(family / "recipient", donors=[DonorSpec(donor, 0), DonorSpec(donor, 2)])


def test_layers_the_donor_lacks(family: Path) -> None:
    with refused(ConfigurationError, str(family / "donor"), "0..1", "[1, 2]"):
        loaded(family, layers=[1, 2])


def test_layers_that_are_not_contiguous(family: Path) -> None:
    spec = {"donor": str(family / "donor"), "position": 0, "layers": [0, 2]}
    with refused(ConfigurationError, "consecutive", "[0, 2]"):
        load(family / "recipient", donors=[spec])


# -- What fits ---------------------------------------------------------------------------------------------------


def test_all_mismatches_at_once(tmp_path: Path) -> None:
    tiny_llama_model(0).save_pretrained(tmp_path / "recipient")
    (tmp_path / "recipient" / "model.safetensors").write_bytes(b"no weights at all")
    source = tiny_llama_model(
        1, hidden_size=48, num_attention_heads=6, rms_norm_eps=1e-3, hidden_act="relu", rope_theta=7.0
    )
    donor = donor_of(source, tmp_path / "other", [1, 2])
    facts = [
        "does not fit",
        str(tmp_path / "recipient"),
        "hidden_size: donor 48, recipient 32",
        "num_attention_heads: donor 6, recipient 4",
        "rms_norm_eps: donor 0.001, recipient 1e-06",
        "hidden_act: donor 'relu', recipient 'silu'",
        "'rope_theta': 7.0",
        "'rope_theta': 10000.0",
        "same shape",
    ]
    with refused(CompatibilityError, *facts) as caught:
        load(tmp_path / "recipient", donors={str(donor): 1})
    assert len(caught.value.mismatches) >= 5


def test_another_model_type(family: Path, tmp_path: Path) -> None:
    donor = donor_of(tiny_llama_model(1), tmp_path / "llama-donor", [1])
    with refused(
        CompatibilityError, "model_type: donor 'llama', recipient 'gpt2'", str(donor), str(family / "recipient")
    ):
        load(family / "recipient", donors={str(donor): 1})


def test_mismatches_of_every_donor_name_the_donor(family: Path, tmp_path: Path) -> None:
    wide = donor_of(tiny_gpt2_model(1, n_embd=48), tmp_path / "wide", [1], "wide")
    with refused(CompatibilityError, "donor wide", "n_embd: donor 48, recipient 32"):
        load(family / "recipient", donors={str(family / "donor"): 0, str(wide): 1})


def t5(folder: Path) -> None:
    config = T5Config(d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=2, vocab_size=64)
    T5ForConditionalGeneration(config).save_pretrained(folder)


def bert(folder: Path) -> None:
    config = BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=64)
    BertForMaskedLM(config).save_pretrained(folder)


def vit(folder: Path) -> None:
    config = ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32)
    ViTForImageClassification(config).save_pretrained(folder)


@pytest.mark.parametrize(("make", "model_type"), [(t5, "t5"), (bert, "bert"), (vit, "vit")])
def test_a_recipient_that_is_no_decoder(
    tiny_gpt2: Path, tmp_path: Path, make: Callable[[Path], None], model_type: str
) -> None:
    make(tmp_path / "recipient")
    with refused(CompatibilityError, str(tmp_path / "recipient"), model_type):
        load(tmp_path / "recipient", donors={str(tiny_gpt2 / "donor"): 1})


def test_an_encoder_with_layers_of_a_decoder(tmp_path: Path) -> None:
    """The layers would fit, but in an encoder tokens see what comes after them."""
    bert(tmp_path / "recipient")
    fields = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    decoder = BertLMHeadModel(BertConfig(**fields, vocab_size=64, is_decoder=True))
    donor = Donor.from_model(decoder, [0], name="law")
    donor.save_pretrained(tmp_path / "donor", position=1, recipient=str(tmp_path / "recipient"))
    with refused(CompatibilityError, str(tmp_path / "recipient"), "bert", "decoder-only", "is_decoder=False"):
        load(tmp_path / "donor")
    with refused(CompatibilityError, "BertForMaskedLM", "decoder-only"):
        Donor.from_model(BertForMaskedLM.from_pretrained(tmp_path / "recipient"), [0])


def test_an_encoder_is_no_recipient_for_classification_either(tiny_gpt2: Path, tmp_path: Path) -> None:
    t5(tmp_path / "recipient")
    with refused(CompatibilityError, str(tmp_path / "recipient"), "t5"):
        load(
            tmp_path / "recipient",
            donors={str(tiny_gpt2 / "donor"): 1},
            auto_class=AutoModelForSequenceClassification,
        )


# -- What was asked for ------------------------------------------------------------------------------------------


def test_a_recipient_that_is_a_transplant(family: Path) -> None:
    with refused(
        ConfigurationError, str(family / "donor"), "transplant already", "../recipient", "all donors together"
    ):
        load(family / "donor", donors={str(family / "donor"): 1})
    TransplantConfig(recipient="./donor", donors={"./donor": 1}).save_pretrained(family)
    with refused(ConfigurationError, str(family / "donor"), "itself a transplant", "save the transplant in full"):
        load(family)


def test_a_recipient_without_donors(family: Path) -> None:
    for donors in (None, {}, []):
        with refused(ConfigurationError, str(family / "recipient"), "'gpt2'", "not a transplant", "donors="):
            load(family / "recipient", donors=donors)


def test_a_folder_that_is_neither(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with refused(ConfigurationError, str(tmp_path), "neither a model nor a transplant", "config.json"):
        load(tmp_path)
    with refused(ConfigurationError, str(tmp_path), "neither a model nor a transplant"):
        load(tmp_path, donors={"user/law": 1})


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with refused(ConfigurationError, str(tmp_path / "nowhere"), "neither a folder"):
        load(tmp_path / "nowhere")


def test_a_donor_that_is_a_plain_model(family: Path) -> None:
    with refused(CheckpointError, "donor_config.json", str(family / "source")):
        load(family / "recipient", donors={str(family / "source"): 1})


def test_a_donor_that_is_not_there(family: Path) -> None:
    missing = str(family / "lost" / "donor")
    with refused(ConfigurationError, missing, "neither a folder"):
        load(family / "recipient", donors={missing: 1})


def test_donors_that_are_no_donors(family: Path) -> None:
    with refused(ConfigurationError, "donors must be {donor: position}", "got 3"):
        load(family / "recipient", donors=3)


@pytest.mark.parametrize("fields", [{"recipient": ""}, {"donors": []}])
def test_a_transplant_of_nothing(family: Path, fields: dict[str, Any]) -> None:
    edit_json(family / "donor" / "config.json", **fields)
    with refused(ConfigurationError, str(family / "donor"), f"names no {next(iter(fields))}"):
        load(family / "donor")


def test_another_configuration_class(family: Path) -> None:
    with refused(ConfigurationError, "TransplantConfig", "GPT2Config", "keyword arguments"):
        load(family / "donor", config=GPT2Config())


def test_a_state_dict_of_ones_own(family: Path) -> None:
    with refused(ConfigurationError, "state_dict", "transplant_hf.transplant"):
        loaded(family, state_dict={"x": torch.ones(1)})


def test_the_class_is_not_called(family: Path) -> None:
    with refused(ConfigurationError, "from_pretrained", "from_config"):
        AutoModelWithTransplant()


def test_one_donor_has_a_position_in_its_text(tiny_gpt2: Path) -> None:
    model = load(tiny_gpt2 / "recipient", donors=f"{tiny_gpt2 / 'donor'}@2")
    assert [slot.source for slot in model.layer_map][2:4] == ["donor", "donor"]
    with refused(ConfigurationError, "DONOR@POSITION", "law@two"):
        load(tiny_gpt2 / "recipient", donors=["law@two"])
    with refused(ConfigurationError, "there is no argument donor=", "donors={donor: position}"):
        load(tiny_gpt2 / "recipient", donor=str(tiny_gpt2 / "donor"))
    for field in ({"mode": "replace"}, {"position": 2}):
        with refused(ConfigurationError, f"no argument {next(iter(field))}=", "DonorSpec(donor, position, mode=...)"):
            load(tiny_gpt2 / "recipient", donors=str(tiny_gpt2 / "donor"), **field)
