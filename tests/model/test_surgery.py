"""Layers that no native configuration can describe: GPT-2 with attention scaled by the layer's number."""

from __future__ import annotations

import copy
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GPT2LMHeadModel

from tests.helpers import (
    DONOR_LAYERS,
    NUM_LAYERS,
    Graft,
    generated,
    layers_of,
    loaded,
    logits_of,
    plain,
    reference_logits,
    refused,
)
from transplant_hf import AutoModelWithTransplant, CompatibilityError, Donor, DonorSpec, transplant

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


PLACES = [*((position, "insert") for position in range(5)), *((position, "replace") for position in range(3))]


@pytest.mark.parametrize(("position", "mode"), PLACES)
def test_against_the_reference(inverse_gpt2: Path, position: int, mode: str) -> None:
    """Each donor layer keeps the scale of its own number."""
    recipient, source = plain(inverse_gpt2 / "recipient"), plain(inverse_gpt2 / "source")
    model, info = loaded(inverse_gpt2, position, mode, output_loading_info=True)
    assert not any(info.values())
    expected = reference_logits(recipient, [Graft(source, DONOR_LAYERS, position, replace=mode == "replace")])
    torch.testing.assert_close(logits_of(model), expected, **TOLERANCE)
    assert torch.equal(generated(model, use_cache=True), generated(model, use_cache=False))
    assert model.config.n_layer == len(layers_of(model)) == len(model.layer_map)
    assert [layer.attn.layer_idx for layer in layers_of(model)] == list(range(len(layers_of(model))))


@pytest.mark.parametrize("mode", ["insert", "replace"])
@pytest.mark.parametrize("position", [0, 1])
def test_disabled(inverse_gpt2: Path, position: int, mode: str) -> None:
    recipient = plain(inverse_gpt2 / "recipient")
    model = loaded(inverse_gpt2, position, mode, keep_replaced=mode == "replace")
    before = logits_of(model)
    expected = loaded(inverse_gpt2, position, mode)
    assert torch.equal(before, logits_of(expected))
    for _ in range(2):
        with model.disable_transplants():
            assert torch.equal(logits_of(model), logits_of(recipient))
            assert torch.equal(generated(model), generated(recipient))
            assert model.config.n_layer == NUM_LAYERS
        assert torch.equal(logits_of(model), before)
        assert torch.equal(generated(model), generated(expected))


@pytest.mark.parametrize("mode", ["insert", "replace"])
def test_a_full_save_is_in_the_transplant_format(
    inverse_gpt2: Path, tmp_path: Path, warned: list[str], mode: str
) -> None:
    model = loaded(inverse_gpt2, 0, mode)
    model.save_pretrained(tmp_path / "full")
    text = " ".join(warned)
    for fact in ("No plain GPT2LMHeadModel checkpoint", "scal", "transplant format", "needs transplant_hf"):
        assert fact in text
    moved = shutil.move(tmp_path / "full", tmp_path / "moved")
    again, info = AutoModelForCausalLM.from_pretrained(moved, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits_of(again), logits_of(model))
    assert torch.equal(generated(again), generated(model))
    assert again.layer_map == model.layer_map
    assert again.generation_config.max_new_tokens == 11


def test_layers_that_keep_their_number_are_native(inverse_gpt2: Path, tmp_path: Path) -> None:
    """Layers 1 and 2 in place of layers 1 and 2 have the scales that GPT-2 gives them."""
    model = loaded(inverse_gpt2, 1, "replace")
    model.save_pretrained(tmp_path / "full")
    again = plain(tmp_path / "full")
    assert type(again) is GPT2LMHeadModel
    assert torch.equal(logits_of(again), logits_of(model))


def test_a_full_save_holds_trained_recipient_weights(inverse_gpt2: Path, tmp_path: Path) -> None:
    model = loaded(inverse_gpt2, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    model.save_pretrained(tmp_path / "full")
    again = AutoModelWithTransplant.from_pretrained(tmp_path / "full")
    assert torch.equal(logits_of(again), logits_of(model))
    with again.disable_transplants(), model.disable_transplants():
        assert torch.equal(logits_of(again), logits_of(model))


def test_a_full_save_again_into_the_same_folder(inverse_gpt2: Path, tmp_path: Path) -> None:
    model = loaded(inverse_gpt2, 1)
    model.save_pretrained(tmp_path / "full")
    again = AutoModelWithTransplant.from_pretrained(tmp_path / "full")
    again.save_pretrained(tmp_path / "full")
    assert torch.equal(logits_of(AutoModelWithTransplant.from_pretrained(tmp_path / "full")), logits_of(model))


def test_thin(inverse_gpt2: Path, tmp_path: Path) -> None:
    model = loaded(inverse_gpt2, 2)
    model.save_pretrained(tmp_path / "thin", thin=True)
    assert torch.equal(logits_of(AutoModelWithTransplant.from_pretrained(tmp_path / "thin")), logits_of(model))


def test_saved_while_disabled_it_is_the_plain_recipient(inverse_gpt2: Path, tmp_path: Path) -> None:
    model = loaded(inverse_gpt2, 1)
    with model.disable_transplants():
        model.save_pretrained(tmp_path / "recipient")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "recipient", output_loading_info=True)
    assert not any(info.values())
    assert again.config.n_layer == NUM_LAYERS
    assert torch.equal(logits_of(again), logits_of(plain(inverse_gpt2 / "recipient")))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])  # noqa: S301
def test_copies(inverse_gpt2: Path, how: Any) -> None:
    model = loaded(inverse_gpt2, 1)
    again = how(model)
    assert torch.equal(logits_of(again), logits_of(model))
    with again.disable_transplants():
        assert torch.equal(logits_of(again), logits_of(plain(inverse_gpt2 / "recipient")))
        assert len(model.layer_map) == NUM_LAYERS + 2


def test_two_donors_and_a_strength(inverse_gpt2: Path, tmp_path: Path) -> None:
    recipient, source = plain(inverse_gpt2 / "recipient"), plain(inverse_gpt2 / "source")
    donor = str(inverse_gpt2 / "donor")
    specs = [DonorSpec(donor, 3, "replace", name="b", layers=[1]), DonorSpec(donor, 1, name="a", strength=0.5)]
    model = AutoModelWithTransplant.from_pretrained(inverse_gpt2 / "recipient", donors=specs)
    grafts = [Graft(source, [2], 3, replace=True), Graft(source, DONOR_LAYERS, 1, strength=0.5)]
    torch.testing.assert_close(logits_of(model), reference_logits(recipient, grafts), **TOLERANCE)
    with model.disable_transplants("a"):
        torch.testing.assert_close(logits_of(model), reference_logits(recipient, grafts[:1]), **TOLERANCE)
    for thin in (False, True):
        model.save_pretrained(tmp_path / str(thin), thin=thin)
        again = AutoModelWithTransplant.from_pretrained(tmp_path / str(thin))
        assert torch.equal(logits_of(again), logits_of(model))


def test_in_memory(inverse_gpt2: Path) -> None:
    recipient = plain(inverse_gpt2 / "recipient")
    model = transplant(recipient, Donor.from_pretrained(inverse_gpt2 / "donor"), 1)
    assert torch.equal(logits_of(model), logits_of(loaded(inverse_gpt2, 1)))
    assert recipient.config.n_layer == NUM_LAYERS
    assert torch.equal(logits_of(recipient), logits_of(plain(inverse_gpt2 / "recipient")))


def test_other_heads_and_random_weights(inverse_gpt2: Path) -> None:
    headless = AutoModel.from_pretrained(inverse_gpt2 / "donor")
    assert len(headless.h) == 6
    config = AutoConfig.from_pretrained(inverse_gpt2 / "donor")
    model = AutoModelWithTransplant.from_config(config).eval()
    assert torch.equal(generated(model, use_cache=True), generated(model, use_cache=False))


def test_a_donor_taken_out_goes_back_in(inverse_gpt2: Path, tmp_path: Path) -> None:
    """Its layers keep the number they had in their source model, not the one they run at."""
    model = loaded(inverse_gpt2, 3)
    donor = Donor.from_model(model, [3, 4])
    assert donor.layer_indices == [1, 2]
    donor.save_pretrained(tmp_path / "again", recipient=str(inverse_gpt2 / "recipient"))
    again = AutoModelWithTransplant.from_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(again), logits_of(model))


def test_plain_transformers_does_not_take_it_for_a_native_model(inverse_gpt2: Path, tmp_path: Path) -> None:
    """Loaded as GPT-2 its scales would be silently wrong."""
    loaded(inverse_gpt2, 1).save_pretrained(tmp_path / "full")
    with pytest.raises((OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError)):
        GPT2LMHeadModel.from_pretrained(tmp_path / "full")


def test_shapes_are_checked_all_the_same(inverse_gpt2: Path, tiny_gpt2: Path) -> None:
    with refused(CompatibilityError, "scale_attn_by_inverse_layer_idx: donor False, recipient True"):
        AutoModelWithTransplant.from_pretrained(inverse_gpt2 / "recipient", donors={str(tiny_gpt2 / "donor"): 1})
