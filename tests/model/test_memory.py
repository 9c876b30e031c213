"""Transplants in memory, and copies of transplanted models."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel, LlamaForCausalLM

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
    some_ids,
)
from transplant_hf import (
    AutoModelWithTransplant,
    CompatibilityError,
    ConfigurationError,
    Donor,
    remove_transplants,
    transplant,
)


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))  # noqa: S301


# -- transplant ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("position", "mode"), [(0, "insert"), (4, "insert"), (1, "replace")])
def test_the_same_as_loading(tiny: Path, position: int, mode: str) -> None:
    recipient = plain(tiny / "recipient")
    model = transplant(recipient, Donor.from_pretrained(tiny / "donor"), position, mode)
    wanted = loaded(tiny, position, mode)
    assert torch.equal(logits_of(model), logits_of(wanted))
    assert torch.equal(generated(model), generated(wanted))
    assert model.layer_map == wanted.layer_map
    assert isinstance(model, type(recipient))
    assert not model.training
    assert model.generation_config.max_new_tokens == 11
    with model.disable_transplants():
        assert torch.equal(logits_of(model), logits_of(recipient))


def test_the_model_passed_in_stays_as_it_is(tiny: Path) -> None:
    recipient = plain(tiny / "recipient")
    before, config = logits_of(recipient), recipient.config.to_dict()
    kind, layers = type(recipient), list(layers_of(recipient))
    model = transplant(recipient, str(tiny / "donor"), 1)
    assert type(recipient) is kind
    assert list(layers_of(recipient)) == layers
    assert recipient.config.to_dict() == config
    assert torch.equal(logits_of(recipient), before)
    assert torch.equal(generated(recipient), generated(plain(tiny / "recipient")))
    assert len(layers_of(model)) == NUM_LAYERS + 2


def test_recipient_weights_are_shared(tiny: Path) -> None:
    recipient = plain(tiny / "recipient")
    model = transplant(recipient, str(tiny / "donor"), 1)
    ours = {tensor.data_ptr() for tensor in recipient.parameters()}
    theirs = {tensor.data_ptr() for tensor in model.parameters()}
    assert ours < theirs
    with torch.no_grad():
        recipient.get_input_embeddings().weight.mul_(1.5)
    assert torch.equal(model.get_input_embeddings().weight, recipient.get_input_embeddings().weight)


def test_tied_weights_stay_tied(tiny_gpt2: Path) -> None:
    model = transplant(plain(tiny_gpt2 / "recipient"), str(tiny_gpt2 / "donor"), 1)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_donor_in_memory(tiny: Path) -> None:
    recipient, source = plain(tiny / "recipient"), plain(tiny / "source")
    model = transplant(recipient, Donor.from_model(source, [1, 2], name="law"), 2)
    torch.testing.assert_close(logits_of(model), reference_logits(recipient, [Graft(source, DONOR_LAYERS, 2)]))
    assert model.layer_map[2] == ("law", 1)


def test_a_donor_of_the_recipient_itself_is_a_copy(tiny_llama: Path, tmp_path: Path) -> None:
    """Training the donor must not train the layer it was made of, and a full save must hold both."""
    recipient = plain(tiny_llama / "recipient")
    model = transplant(recipient, Donor.from_model(recipient, [1], name="again"), 2)
    with torch.no_grad():
        for parameter in layers_of(model)[2].parameters():
            parameter.mul_(0.5)
    assert torch.equal(logits_of(recipient), logits_of(plain(tiny_llama / "recipient")))
    model.save_pretrained(tmp_path / "full")
    assert torch.equal(logits_of(plain(tmp_path / "full")), logits_of(model))


def test_one_donor_in_two_models_is_two_copies(tiny_llama: Path) -> None:
    donor = Donor.from_model(plain(tiny_llama / "source"), [1], name="law")
    one, two = (transplant(plain(tiny_llama / "recipient"), donor, 1) for _ in range(2))
    before = logits_of(two)
    with torch.no_grad():
        for parameter in layers_of(one)[1].parameters():
            parameter.mul_(0.5)
    assert torch.equal(logits_of(two), before)


def test_one_after_another(tiny: Path) -> None:
    """Positions are the untouched recipient's, whatever is in it already."""
    recipient, source = plain(tiny / "recipient"), plain(tiny / "source")
    donor = Donor.from_pretrained(tiny / "donor")
    first = transplant(recipient, donor, 3, name="one")
    second = transplant(first, donor, 1, name="two", strength=0.5)
    third = transplant(second, donor, 1, name="three")
    grafts = [
        Graft(source, DONOR_LAYERS, 3),
        Graft(source, DONOR_LAYERS, 1, strength=0.5),
        Graft(source, DONOR_LAYERS, 1),
    ]
    torch.testing.assert_close(logits_of(third), reference_logits(recipient, grafts))
    assert [spec.name for spec in third.transplant_config.donors] == ["one", "two", "three"]
    assert len(layers_of(first)) == NUM_LAYERS + 2
    with third.disable_transplants():
        assert torch.equal(logits_of(third), logits_of(recipient))


@pytest.mark.parametrize("mode", ["insert", "replace"])
def test_onto_a_loaded_one(tiny: Path, mode: str) -> None:
    model = loaded(tiny, 3, name="one", layers=[1])
    more = transplant(model, str(tiny / "donor"), 0, mode, name="two")
    recipient, source = plain(tiny / "recipient"), plain(tiny / "source")
    grafts = [Graft(source, [2], 3), Graft(source, DONOR_LAYERS, 0, replace=mode == "replace")]
    torch.testing.assert_close(logits_of(more), reference_logits(recipient, grafts))
    assert torch.equal(generated(more, use_cache=True), generated(more, use_cache=False))


def test_beside_a_donor_whose_replaced_layers_are_gone(tiny: Path) -> None:
    more = transplant(loaded(tiny, 1, "replace"), str(tiny / "donor"), 0, name="other")
    recipient, source = plain(tiny / "recipient"), plain(tiny / "source")
    grafts = [Graft(source, DONOR_LAYERS, 1, replace=True), Graft(source, DONOR_LAYERS, 0)]
    torch.testing.assert_close(logits_of(more), reference_logits(recipient, grafts))


def test_saved_thin(tiny: Path, tmp_path: Path) -> None:
    model = transplant(plain(tiny / "recipient"), str(tiny / "donor"), 1)
    model.save_pretrained(tmp_path / "thin", thin=True)
    assert torch.equal(logits_of(AutoModelWithTransplant.from_pretrained(tmp_path / "thin")), logits_of(model))


def test_saved_full(tiny: Path, tmp_path: Path) -> None:
    model = transplant(plain(tiny / "recipient"), str(tiny / "donor"), 1)
    model.save_pretrained(tmp_path / "full")
    assert torch.equal(logits_of(plain(tmp_path / "full")), logits_of(model))


def test_freezing_and_mode_are_taken_over(tiny_gpt2: Path) -> None:
    recipient = plain(tiny_gpt2 / "recipient")
    recipient.requires_grad_(False)
    recipient.train()
    model = transplant(recipient, str(tiny_gpt2 / "donor"), 1)
    assert all(module.training for module in model.modules())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {
        name for name, _ in model.named_parameters() if name.startswith(("transformer.h.1.", "transformer.h.2."))
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_is_taken_over(tiny_llama: Path, dtype: torch.dtype) -> None:
    recipient = plain(tiny_llama / "recipient", dtype=dtype)
    model = transplant(recipient, str(tiny_llama / "donor"), 1)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert torch.equal(logits_of(recipient), logits_of(plain(tiny_llama / "recipient", dtype=dtype)))


def test_attention_is_taken_over(tiny_llama: Path) -> None:
    recipient = plain(tiny_llama / "recipient", attn_implementation="eager")
    assert transplant(recipient, str(tiny_llama / "donor"), 1).config._attn_implementation == "eager"


def test_gradients_reach_both(tiny: Path) -> None:
    recipient = plain(tiny / "recipient")
    model = transplant(recipient, str(tiny / "donor"), 1)
    model(some_ids(), labels=some_ids()).loss.backward()
    assert all(p.grad is not None for p in layers_of(model)[1].parameters() if p.requires_grad)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = logits_of(recipient)
    optimizer.step()
    assert not torch.equal(logits_of(recipient), before)


def test_what_cannot_be_shared(tiny_gpt2: Path) -> None:
    donor = Donor.from_pretrained(tiny_gpt2 / "donor")
    with refused(ConfigurationError, "Linear", "not a PreTrainedModel", "from_pretrained"):
        transplant(torch.nn.Linear(2, 2), donor, 1)  # type: ignore[arg-type]
    model = plain(tiny_gpt2 / "recipient")
    model.transformer.h[0].to("meta")
    with refused(ConfigurationError, "offloaded or not loaded"):
        transplant(model, donor, 1)
    model = loaded(tiny_gpt2)
    with model.disable_transplants(), refused(ConfigurationError, "switched off"):
        transplant(model, donor, 1, name="other")
    with refused(ConfigurationError, "two donors are named 'donor'"):
        transplant(loaded(tiny_gpt2), donor, 1)


def test_what_does_not_fit(tiny_gpt2: Path, tiny_llama: Path) -> None:
    with refused(ConfigurationError, "position 5", "0..4"):
        transplant(plain(tiny_gpt2 / "recipient"), str(tiny_gpt2 / "donor"), 5)
    with refused(CompatibilityError, "model_type: donor 'llama', recipient 'gpt2'"):
        transplant(plain(tiny_gpt2 / "recipient"), str(tiny_llama / "donor"), 1)


# -- remove_transplants --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_removing_gives_the_recipient_back(tiny: Path, tmp_path: Path, strength: float) -> None:
    recipient, model = plain(tiny / "recipient"), loaded(tiny, 1, strength=strength)
    again = remove_transplants(model)
    assert again is model
    assert type(again) is type(recipient)
    assert torch.equal(logits_of(again), logits_of(recipient))
    assert torch.equal(generated(again), generated(recipient))
    assert again.config.num_hidden_layers == NUM_LAYERS
    assert again.name_or_path == str(tiny / "recipient")
    again.save_pretrained(tmp_path / "out")
    assert torch.equal(logits_of(plain(tmp_path / "out")), logits_of(recipient))
    again.to(torch.bfloat16)
    assert again.dtype == torch.bfloat16
    assert pickled(again).dtype == torch.bfloat16


def test_removing_replaced(tiny: Path) -> None:
    with refused(ConfigurationError, "'donor'", "keep_replaced=True"):
        remove_transplants(loaded(tiny, 1, "replace"))
    model = remove_transplants(loaded(tiny, 1, "replace", keep_replaced=True))
    assert torch.equal(logits_of(model), logits_of(plain(tiny / "recipient")))


def test_removing_nothing(tiny_gpt2: Path) -> None:
    model = plain(tiny_gpt2 / "recipient")
    assert remove_transplants(model) is model
    assert type(model) is GPT2LMHeadModel


def test_in_and_out_and_in(tiny: Path) -> None:
    recipient = plain(tiny / "recipient")
    once = transplant(recipient, str(tiny / "donor"), 1)
    twice = transplant(remove_transplants(once), str(tiny / "donor"), 3)
    assert torch.equal(logits_of(twice), logits_of(loaded(tiny, 3)))


# -- Copies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_copies_are_whole_and_apart(tiny: Path, copied: Any, strength: float) -> None:
    model = loaded(tiny, 1, strength=strength)
    with model.disable_transplants():
        pass
    again = copied(model)
    assert type(again) is type(model)
    assert torch.equal(logits_of(again), logits_of(model))
    assert again.layer_map == model.layer_map
    assert again.transplant_config.donors == model.transplant_config.donors
    with again.disable_transplants():
        assert torch.equal(logits_of(again), logits_of(plain(tiny / "recipient")))
        assert len(model.layer_map) == NUM_LAYERS + 2
        assert torch.equal(logits_of(model), logits_of(loaded(tiny, 1, strength=strength)))
    with model.disable_transplants():
        assert len(again.layer_map) == NUM_LAYERS + 2
    before = logits_of(model)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    assert torch.equal(logits_of(model), before)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_copies_of_a_model_that_kept_layers(tiny: Path, copied: Any) -> None:
    again = copied(loaded(tiny, 1, "replace", keep_replaced=True))
    again.to(torch.bfloat16)
    with again.disable_transplants():
        assert torch.equal(logits_of(again), logits_of(plain(tiny / "recipient").to(torch.bfloat16)))


def test_a_copy_inside_the_block_is_refused(tiny_gpt2: Path) -> None:
    model = loaded(tiny_gpt2)
    with model.disable_transplants(), refused(ConfigurationError, "disable_transplants()", "copy it outside"):
        copy.deepcopy(model)


def test_a_copy_can_be_saved(tiny: Path, tmp_path: Path) -> None:
    model = copy.deepcopy(loaded(tiny, 1))
    model.save_pretrained(tmp_path / "thin", thin=True)
    model.save_pretrained(tmp_path / "full")
    assert torch.equal(logits_of(plain(tmp_path / "full")), logits_of(model))
    assert torch.equal(logits_of(plain(tmp_path / "thin")), logits_of(model))


def test_isinstance_of_the_recipients_class(tiny_llama: Path) -> None:
    model = transplant(plain(tiny_llama / "recipient"), str(tiny_llama / "donor"), 1)
    assert isinstance(model, LlamaForCausalLM)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert isinstance(pickled(model), LlamaForCausalLM)
