"""Donors added to, removed from, moved in and swapped on a loaded model: each time as if it had been loaded so."""

from __future__ import annotations

import copy
import pickle
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, TorchAoConfig

from tests.helpers import (
    Graft,
    copied,
    edit_weights,
    generated,
    layers_of,
    loaded,
    logits_of,
    plain,
    reference_logits,
    refused,
    two_donors,
)
from tests.model.test_kwargs import offload_map
from transplant_hf import (
    AutoModelWithTransplant,
    CheckpointError,
    CompatibilityError,
    ConfigurationError,
    Donor,
    DonorSpec,
    remove_transplants,
    transplant,
)


def into_recipient(family: Path, position: int = 1, **fields: Any) -> Any:
    """The plain recipient, loaded by Transformers, with the donor put in where it stands."""
    return transplant(plain(family / "recipient"), str(family / "donor"), position, in_place=True, **fields)


def same(model: Any, wanted: Any) -> None:
    """Logits, cached generation and layer map agree to the bit."""
    assert torch.equal(logits_of(model), logits_of(wanted))
    assert torch.equal(generated(model), generated(wanted))
    assert getattr(model, "layer_map", None) == getattr(wanted, "layer_map", None)
    assert model.config.to_dict() == wanted.config.to_dict()


def addresses(model: Any) -> set[int]:
    """Where the weights lie."""
    return {tensor.data_ptr() for tensor in model.parameters()}


# -- Adding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", [0, 2, 4])
def test_into_a_plain_model(tiny: Path, position: int) -> None:
    recipient, source = plain(tiny / "recipient"), plain(tiny / "source")
    before = addresses(recipient)
    model = transplant(recipient, str(tiny / "donor"), position, in_place=True)
    assert model is recipient
    same(model, loaded(tiny, position))
    own = plain(tiny / "recipient")
    torch.testing.assert_close(logits_of(model), reference_logits(own, [Graft(source, [1, 2], position)]))
    assert before < addresses(model)  # no weight of the recipient was copied
    remove_transplants(model)
    assert type(model) is type(own) and torch.equal(logits_of(model), logits_of(own))


@pytest.mark.parametrize("position", [0, 2, 4])
def test_a_second_donor(tiny: Path, position: int) -> None:
    model = loaded(tiny, 2)
    model.add_donor(Donor.from_model(plain(tiny / "source"), [0], name="second"), position, strength=0.5)
    first = DonorSpec(str(tiny / "donor"), 2)
    grafts = [Graft(plain(tiny / "source"), [1, 2], 2), Graft(plain(tiny / "source"), [0], position, strength=0.5)]
    torch.testing.assert_close(logits_of(model), reference_logits(plain(tiny / "recipient"), grafts))
    same(model, transplant(loaded(tiny, first.position), Donor.from_model(plain(tiny / "source"), [0], name="second"),
                           position, strength=0.5))  # fmt: skip
    with model.disable_transplants("donor"):
        torch.testing.assert_close(logits_of(model), reference_logits(plain(tiny / "recipient"), grafts[1:]))
    with model.disable_transplants():
        assert torch.equal(logits_of(model), logits_of(plain(tiny / "recipient")))
        assert torch.equal(generated(model), generated(plain(tiny / "recipient")))


def test_what_a_donor_recommends(tiny_llama: Path, tmp_path: Path) -> None:
    donor = Donor.from_pretrained(tiny_llama / "donor")
    donor.save_pretrained(tmp_path / "own", position=2, mode="replace", recipient=str(tiny_llama / "recipient"))
    model = loaded(tiny_llama, 0)
    model.add_donor(str(tmp_path / "own"), name="own")
    model.add_donor(str(tmp_path / "own"), 4, name="elsewhere")
    assert [(spec.position, spec.mode) for spec in model.transplant_config.donors] == [
        (0, "insert"),
        (2, "replace"),
        (4, "insert"),
    ]
    with refused(ConfigurationError, "recommends no position", "position=0..L"):
        model.add_donor(Donor.from_model(plain(tiny_llama / "source"), [0], name="loose"))


def test_a_donor_in_memory_keeps_its_own_weights(tiny_llama: Path) -> None:
    source = plain(tiny_llama / "source")
    model = plain(tiny_llama / "recipient")
    transplant(model, Donor.from_model(source, [1], name="own"), 2, in_place=True)
    assert not addresses(model) & addresses(source)


def test_replacing(tiny: Path) -> None:
    model = into_recipient(tiny, 1, mode="replace")
    same(model, loaded(tiny, 1, mode="replace"))
    with model.disable_transplants():
        assert torch.equal(logits_of(model), logits_of(plain(tiny / "recipient")))
    model.add_donor(str(tiny / "donor"), 0, name="more")
    grafts = [Graft(plain(tiny / "source"), [1, 2], 1, replace=True), Graft(plain(tiny / "source"), [1, 2], 0)]
    torch.testing.assert_close(logits_of(model), reference_logits(plain(tiny / "recipient"), grafts))
    model.move_donor("donor", 2)
    grafts[0] = Graft(plain(tiny / "source"), [1, 2], 2, replace=True)
    torch.testing.assert_close(logits_of(model), reference_logits(plain(tiny / "recipient"), grafts))
    model.remove_donor("donor")
    same(model, loaded(tiny, 0, name="more"))


def test_layers_that_no_configuration_describes(inverse_gpt2: Path) -> None:
    model = into_recipient(inverse_gpt2, 1)
    same(model, loaded(inverse_gpt2, 1))
    model.move_donor("donor", 3)
    same(model, loaded(inverse_gpt2, 3))
    with model.disable_transplants():
        assert torch.equal(logits_of(model), logits_of(plain(inverse_gpt2 / "recipient")))
    model.remove_donor("donor")
    assert torch.equal(logits_of(model), logits_of(plain(inverse_gpt2 / "recipient")))


# -- Moving, swapping, removing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "end"), [(0, 4), (2, 1), (2, 2), (4, 0), (4, 3)])
def test_moving(tiny: Path, start: int, end: int) -> None:
    model = loaded(tiny, start)
    before = addresses(model)
    model.move_donor("donor", end)
    same(model, loaded(tiny, end))
    assert addresses(model) == before
    assert model.transplant_config.donors[0].position == end


def test_swapping(tiny: Path, tmp_path: Path) -> None:
    Donor.from_model(plain(tiny / "recipient"), [3], name="other").save_pretrained(tmp_path / "other", position=0)
    model = loaded(tiny, 2, strength=0.5)
    model.swap_donor("donor", str(tmp_path / "other"))
    wanted = AutoModelWithTransplant.from_pretrained(
        tiny / "recipient", donors=[DonorSpec(str(tmp_path / "other"), 2, strength=0.5, name="donor")]
    )
    same(model, wanted)
    model.swap_donor("donor", str(tiny / "donor"), new_name="back", position=1, strength=1)
    same(model, loaded(tiny, 1, name="back"))


def test_swapping_says_that_a_replacing_donor_is_inserted(tiny: Path, warned: list[str]) -> None:
    model = loaded(tiny, 2)
    other = Donor.from_model(plain(tiny / "recipient"), [3], name="other")
    model.swap_donor("donor", other.replaced(position=3, mode="replace"), new_name="other")
    assert any("'other' recommends mode replace, and runs with mode insert" in message for message in warned)


def test_removing(tiny: Path) -> None:
    model = two_donors(tiny)
    model.remove_donor("a")
    same(model, loaded(tiny, 2, name="b"))
    model.remove_donor("b")
    recipient = plain(tiny / "recipient")
    assert torch.equal(logits_of(model), logits_of(recipient))
    assert (model.strengths, len(model.layer_map)) == ({}, 4)
    assert addresses(model).__len__() == addresses(recipient).__len__()
    model.add_donor(str(tiny / "donor"), 3)
    same(model, loaded(tiny, 3))


def test_back_and_forth(tiny: Path) -> None:
    """What earlier changes and switches left on layers does not show."""
    model = loaded(tiny, 1)
    for position in (4, 0, 3):
        with model.disable_transplants():
            generated(model)
        model.add_donor(str(tiny / "donor"), position, name="second")
        with model.disable_transplants("donor"):
            same_logits = logits_of(loaded(tiny, position))
            assert torch.equal(logits_of(model), same_logits)
        model.set_strength("second", 0.5)
        model.remove_donor("second")
        same(model, loaded(tiny, 1))


# -- What else follows ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("thin", [False, True])
def test_saved_afterwards(tiny: Path, tmp_path: Path, thin: bool) -> None:
    model = AutoModelWithTransplant.from_pretrained(tiny / "recipient", donors={str(tiny / "donor"): 0})
    model.move_donor("donor", 3)
    model.add_donor(Donor.from_model(plain(tiny / "source"), [0], name="second"), 1)
    model.save_pretrained(tmp_path / "saved", thin=thin)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits_of(again), logits_of(model))
    assert (getattr(again, "transplant_config", None) is not None) == thin


def test_nothing_to_save_thin(tiny_llama: Path, tmp_path: Path) -> None:
    model = loaded(tiny_llama)
    model.remove_donor("donor")
    with refused(ConfigurationError, "thin=True", "holds no transplant"):
        model.save_pretrained(tmp_path / "thin", thin=True)
    model.save_pretrained(tmp_path / "full")
    assert torch.equal(logits_of(plain(tmp_path / "full")), logits_of(plain(tiny_llama / "recipient")))


def test_copied_and_pickled(tiny: Path) -> None:
    model = loaded(tiny, 1)
    model.move_donor("donor", 2)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301 - our own bytes
        again.move_donor("donor", 4)
        same(again, loaded(tiny, 4))
    same(model, loaded(tiny, 2))


def test_recorded_hidden_states(tiny: Path) -> None:
    model = loaded(tiny, 1)
    ids = torch.tensor([[1, 2, 3]])
    model(ids, output_hidden_states=True)
    model.add_donor(Donor.from_model(plain(tiny / "source"), [0], name="second"), 3)
    found = model(ids, output_hidden_states=True, output_attentions=False).hidden_states
    wanted = transplant(loaded(tiny, 1), Donor.from_model(plain(tiny / "source"), [0], name="second"), 3)
    for one, other in zip(found, wanted(ids, output_hidden_states=True).hidden_states, strict=True):
        assert torch.equal(one, other)


def test_attention_of_the_live_model(tiny: Path) -> None:
    model = plain(tiny / "recipient", attn_implementation="eager")
    transplant(model, str(tiny / "donor"), 1, in_place=True)
    attentions = model(torch.tensor([[1, 2, 3]]), output_attentions=True).attentions
    assert len(attentions) == 6 and all(one is not None for one in attentions)
    assert torch.equal(logits_of(model), logits_of(loaded(tiny, 1, attn_implementation="eager")))


def test_modes_and_dtype(tiny_llama: Path) -> None:
    model = plain(tiny_llama / "recipient", dtype=torch.bfloat16).train()
    transplant(model, str(tiny_llama / "donor"), 1, in_place=True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert all(module.training for module in model.modules())
    assert torch.equal(logits_of(model.eval()), logits_of(loaded(tiny_llama, 1, dtype=torch.bfloat16)))


def test_gradient_checkpointing(tiny: Path) -> None:
    model, wanted = plain(tiny / "recipient").train(), loaded(tiny, 1).train()
    model.gradient_checkpointing_enable()
    transplant(model, str(tiny / "donor"), 1, in_place=True)
    assert all(layer.gradient_checkpointing for layer in layers_of(model))
    ids = torch.tensor([[1, 2, 3, 4]])
    for one in (model, wanted):
        for module in one.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        one(ids, labels=ids).loss.backward()
    for (name, found), other in zip(model.named_parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(found.grad, other.grad, msg=name)


@pytest.mark.slow
def test_compiled(tiny: Path) -> None:
    torch.compiler.reset()
    model = loaded(tiny, 1)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for position in (1, 3, 0):
        model.move_donor("donor", position)
        torch.testing.assert_close(logits_of(compiled), logits_of(loaded(tiny, position)))
    torch.compiler.reset()


def test_offloaded_recipient(tiny: Path, tmp_path: Path) -> None:
    recipient = plain(tiny / "recipient")
    on_disk = offload_map(recipient, range(1, 3))
    model = plain(tiny / "recipient", device_map=on_disk, offload_folder=tmp_path)
    transplant(model, str(tiny / "donor"), 2, in_place=True)
    same_logits = logits_of(loaded(tiny, 2))
    assert torch.equal(logits_of(model), same_logits)
    model.move_donor("donor", 4)
    assert torch.equal(generated(model), generated(loaded(tiny, 4)))
    with model.disable_transplants():
        assert torch.equal(logits_of(model), logits_of(recipient))


def test_quantized_recipient(tiny_llama: Path) -> None:
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    config = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    model = plain(tiny_llama / "recipient", quantization_config=config)
    untouched = logits_of(model)
    transplant(model, str(tiny_llama / "donor"), 1, in_place=True)
    donor = [type(layers_of(model)[n].mlp.up_proj.weight).__name__ for n in range(6)]
    assert [name == "Parameter" for name in donor] == [False, True, True, False, False, False]
    quantized = plain(tiny_llama / "recipient", quantization_config=config)
    grafts = [Graft(plain(tiny_llama / "source"), [1, 2], 1)]
    torch.testing.assert_close(logits_of(model), reference_logits(quantized, grafts))
    with model.disable_transplants():
        assert torch.equal(logits_of(model), untouched)


def test_adapters_stay(tiny_llama: Path) -> None:
    peft = pytest.importorskip("peft")
    model = plain(tiny_llama / "recipient")
    model.add_adapter(peft.LoraConfig(init_lora_weights=False, target_modules=["q_proj"]))
    adapted = logits_of(model)
    transplant(model, str(tiny_llama / "donor"), 1, in_place=True)
    assert not torch.equal(logits_of(model), adapted)
    with model.disable_transplants():
        assert torch.equal(logits_of(model), adapted)


# -- Caches and refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["move", "remove", "strength"])
def test_a_cache_from_before(tiny: Path, change: str) -> None:
    model = loaded(tiny, 1)
    ids = torch.tensor([[1, 2, 3]])
    old = model(ids, use_cache=True).past_key_values
    if change == "move":
        model.move_donor("donor", 2)
    elif change == "remove":
        model.remove_donor("donor")
    else:
        model.set_strength("donor", 0.5)
    said = "other strengths were set" if change == "strength" else "donors were added, removed or moved"
    with refused(ConfigurationError, said, "new cache"):
        model(ids, past_key_values=old)
    new = model(ids, use_cache=True).past_key_values
    model(ids, past_key_values=new)
    if change == "strength":
        model.set_strength("donor", 1)
        model(ids, past_key_values=old)  # as it was when this cache was filled
        with refused(ConfigurationError, "other strengths were set"):
            model(ids, past_key_values=new)


def test_blocks_that_end_in_another_order(tiny: Path) -> None:
    """Layers that were put aside in one state come back in another with the right numbers."""
    model, wanted = two_donors(tiny), two_donors(tiny)
    first, second = ExitStack(), ExitStack()
    first.enter_context(model.disable_transplants("a"))
    second.enter_context(model.disable_transplants("b"))
    first.close()
    second.close()
    assert torch.equal(generated(model), generated(wanted))


def test_a_refused_donor_changes_nothing(tiny_llama: Path, tiny_gpt2: Path, tmp_path: Path) -> None:
    broken = copied(tiny_llama, tmp_path / "family") / "donor"

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["layers.0.mlp.up_proj.weight"][0, 0] = torch.nan

    edit_weights(broken, spoil)
    model, wanted = loaded(tiny_llama, 1), loaded(tiny_llama, 1)
    with refused(CheckpointError, "NaN or infinity", "up_proj"):
        model.add_donor(str(broken), 2, name="broken")
    with refused(CheckpointError, "NaN or infinity"):
        model.swap_donor("donor", str(broken))
    with refused(CompatibilityError, "gpt2"):
        model.add_donor(str(tiny_gpt2 / "donor"), 2, name="other")
    with refused(ConfigurationError, "two donors are named 'donor'"):
        model.add_donor(str(tiny_llama / "donor"), 2)
    for position in (-1, 5):
        with refused(ConfigurationError):
            model.move_donor("donor", position)
    with refused(ConfigurationError, "no donor is named 'x'", "donor"):
        model.remove_donor("x")
    same(model, wanted)
    untouched = plain(tiny_llama / "recipient")
    with refused(CheckpointError, "NaN or infinity"):
        transplant(untouched, str(broken), 2, in_place=True)
    assert type(untouched) is type(plain(tiny_llama / "recipient"))
    assert torch.equal(logits_of(untouched), logits_of(plain(tiny_llama / "recipient")))


def test_not_while_donors_are_off(tiny_llama: Path) -> None:
    model = loaded(tiny_llama, 1)
    with model.disable_transplants(), refused(ConfigurationError, "leave disable_transplants() first"):
        model.move_donor("donor", 2)
    with model.using("donor"), refused(ConfigurationError, "leave it first"):
        model.remove_donor("donor")
    with refused(ConfigurationError, "PreTrainedModel", "Linear"):
        transplant(torch.nn.Linear(1, 1), str(tiny_llama / "donor"), 1, in_place=True)  # type: ignore[arg-type]


def test_replaced_layers_that_were_not_kept(tiny_llama: Path) -> None:
    model = loaded(tiny_llama, 1, mode="replace")
    for change in (lambda: model.remove_donor("donor"), lambda: model.move_donor("donor", 0)):
        with refused(ConfigurationError, "not kept", "keep_replaced=True"):
            change()
    model.add_donor(str(tiny_llama / "donor"), 0, name="more")
    grafts = [Graft(plain(tiny_llama / "source"), [1, 2], n, replace=bool(n)) for n in (1, 0)]
    torch.testing.assert_close(logits_of(model), reference_logits(plain(tiny_llama / "recipient"), grafts))
