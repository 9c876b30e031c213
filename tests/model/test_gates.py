"""A donor's strength as a parameter: found by what trains a model, and gone without a trace afterwards."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel

from tests.helpers import generated, hooks_at_work, layers_of, loaded, logits_of, plain, refused, some_ids, two_donors
from tests.model.test_kwargs import offload_map
from transplant_hf import AutoModelWithTransplant, ConfigurationError, Donor, transplant
from transplant_hf.model.strength import HOOKS_RUN_AGAIN, attach_gate, detach_gate


def set_to(gate: torch.nn.Parameter, value: float) -> None:
    with torch.no_grad():
        gate.fill_(value)


def test_a_gate_is_the_strength(tiny: Path) -> None:
    model = loaded(tiny, 1, strength=0.5)
    gate = attach_gate(model, "donor")
    assert (gate.requires_grad, gate.dtype, gate.tolist()) == (True, torch.float32, [0.5])
    assert torch.equal(logits_of(model), logits_of(loaded(tiny, 1, strength=0.5)))
    set_to(gate, 0.25)
    wanted = loaded(tiny, 1, strength=0.25)
    assert model.strengths == {"donor": 0.25}
    assert torch.equal(logits_of(model), logits_of(wanted))
    assert torch.equal(generated(model), generated(wanted))


def test_its_gradient(tiny: Path) -> None:
    """That of the loss by the strength, against differences of two losses."""
    model = loaded(tiny, 1)

    def loss() -> torch.Tensor:
        return model(some_ids(), labels=some_ids(), use_cache=False).loss

    def slope(step: float) -> float:
        losses = []
        for value in (1 + step, 1 - step):
            set_to(gate, value)
            losses.append(float(loss().detach()))
        return (losses[0] - losses[1]) / (2 * step)

    gate = attach_gate(model, "donor")
    loss().backward()
    assert gate.grad is not None
    # The loss jumps where a token changes experts: some of these steps cross no such place.
    slopes = [slope(step) for step in (1e-2, 5e-3, 2e-3, 1e-3)]
    assert any(float(gate.grad) == pytest.approx(found, rel=2e-2) for found in slopes), slopes


def test_found_by_what_trains(tiny_llama: Path) -> None:
    model = loaded(tiny_llama, 1)
    names = set(dict(model.named_parameters()))
    gate = attach_gate(model, "donor")
    found = dict(model.named_parameters())
    assert set(found) - names == {"model.layers.1.transplant_gate"}
    assert found["model.layers.1.transplant_gate"] is gate
    assert "model.layers.1.transplant_gate" in model.state_dict()


def test_one_step_of_training_it_alone(tiny_llama: Path) -> None:
    model = loaded(tiny_llama, 1)
    model.requires_grad_(False)
    gate = attach_gate(model, "donor")
    optimizer = torch.optim.SGD([gate], lr=0.1)
    before = model(some_ids(), labels=some_ids()).loss
    before.backward()
    optimizer.step()
    assert model(some_ids(), labels=some_ids()).loss < before
    assert detach_gate(model, "donor") == model.strengths["donor"] != 1.0


def test_detached_without_a_trace(tiny: Path, tmp_path: Path) -> None:
    model = loaded(tiny, 1)
    keys = list(model.state_dict())
    gate = attach_gate(model, "donor")
    set_to(gate, 0.5)
    inside = logits_of(model)
    assert detach_gate(model, "donor") == 0.5
    assert list(model.state_dict()) == keys
    assert model.transplant_config.donors[0].strength == 0.5
    assert torch.equal(logits_of(model), inside)
    model.set_strength("donor", 1)
    assert hooks_at_work(model) == []
    model.save_pretrained(tmp_path / "full")
    assert torch.equal(logits_of(plain(tmp_path / "full")), logits_of(loaded(tiny, 1)))


@pytest.mark.parametrize("thin", [False, True])
@pytest.mark.parametrize("value", [0.5, 1.0])
def test_saved_meanwhile(tiny_gpt2: Path, tmp_path: Path, thin: bool, value: float) -> None:
    """As a plain strength; and the gate goes on as the very same parameter."""
    model = loaded(tiny_gpt2, 1)
    gate = attach_gate(model, "donor")
    set_to(gate, value)
    model.save_pretrained(tmp_path / "saved", thin=thin)
    if thin or value != 1:
        again = AutoModelWithTransplant.from_pretrained(tmp_path / "saved")
        assert again.strengths == {"donor": value}
    else:
        again = plain(tmp_path / "saved")
        assert type(again) is GPT2LMHeadModel
    torch.testing.assert_close(logits_of(again), logits_of(model))
    assert not any("gate" in name for name in again.state_dict())
    assert layers_of(model)[1].transplant_gate is gate
    assert model.transplant_config.donors[0].strength == 1.0
    donor = Donor.from_model(model, [1, 2])
    assert not any("gate" in name for name in donor.tensors())


def test_two_gates_side_by_side(tiny: Path) -> None:
    model = two_donors(tiny, composition="side_by_side")
    again = transplant(model, str(tiny / "donor"), 0, name="c")
    gates = {name: attach_gate(again, name) for name in "ac"}
    set_to(gates["a"], 0.5)
    set_to(gates["c"], 0.25)
    inside = logits_of(again)
    again(some_ids(), labels=some_ids(), use_cache=False).loss.backward()
    assert all(gate.grad is not None and gate.grad.abs() > 0 for gate in gates.values())
    with again.disable_transplants("a"):
        logits_of(again)
    for name in "ac":
        detach_gate(again, name)
    torch.testing.assert_close(logits_of(again), inside)
    assert again.strengths == {"a": 0.5, "b": 1.0, "c": 0.25}


@pytest.mark.skipif(HOOKS_RUN_AGAIN, reason="Transformers before 5.23 runs hooks again in the backward pass: refused")
@pytest.mark.parametrize("reentrant", [False, True])
def test_with_checkpointing(tiny_llama: Path, reentrant: bool) -> None:
    model = loaded(tiny_llama, 1).train()
    gate = attach_gate(model, "donor")

    def gradient() -> float:
        model.zero_grad()
        losses = [model(some_ids(seed=s), labels=some_ids(seed=s), use_cache=False).loss for s in range(2)]
        (losses[0] * losses[1]).backward()
        assert gate.grad is not None
        return float(gate.grad)

    wanted = gradient()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert gradient() == pytest.approx(wanted, rel=1e-5)


def test_a_narrow_dtype_stays(tiny: Path) -> None:
    model = loaded(tiny, 1, dtype=torch.bfloat16)
    attach_gate(model, "donor")
    assert logits_of(model).dtype == torch.bfloat16


def test_a_copy_has_a_gate_of_its_own(tiny_llama: Path) -> None:
    model = loaded(tiny_llama, 1)
    gate = attach_gate(model, "donor")
    again = copy.deepcopy(model)
    set_to(gate, 0.5)
    torch.testing.assert_close(logits_of(again), logits_of(loaded(tiny_llama, 1)))
    assert (detach_gate(again, "donor"), detach_gate(model, "donor")) == (1.0, 0.5)


@pytest.mark.slow
def test_compiled(tiny_llama: Path) -> None:
    torch.compiler.reset()
    model = loaded(tiny_llama, 1)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    plain_one = logits_of(compiled)
    gate = attach_gate(model, "donor")
    set_to(gate, 0.5)
    half = logits_of(compiled)
    torch.testing.assert_close(half, logits_of(loaded(tiny_llama, 1, strength=0.5)))
    assert not torch.allclose(half, plain_one)
    detach_gate(model, "donor")
    torch.testing.assert_close(logits_of(compiled), half)
    torch.compiler.reset()


# -- Refusals -----------------------------------------------------------------------------------------------------


def test_refusals(tiny_gpt2: Path) -> None:
    model: Any = two_donors(tiny_gpt2, "replace")
    with refused(ConfigurationError, "'c'", "a, b"):
        attach_gate(model, "c")
    with refused(ConfigurationError, "'b'", "replaces"):
        attach_gate(model, "b")
    gate = attach_gate(model, "a")
    for turn in (lambda: attach_gate(model, "a"), lambda: model.set_strength("a", 0.5)):
        with refused(ConfigurationError, "'a'", "detach_gate"):
            turn()
    set_to(gate, float("nan"))
    with refused(ConfigurationError, "'a'", "nan", "finite"):
        detach_gate(model, "a")
    assert layers_of(model)[0].transplant_gate is gate


def test_no_transplant_on_top(tiny_gpt2: Path) -> None:
    model = loaded(tiny_gpt2, 1)
    attach_gate(model, "donor")
    with refused(ConfigurationError, "being trained", "detach_gate"):
        transplant(model, str(tiny_gpt2 / "donor"), 2, name="two")


def test_offloaded_layers(tiny_llama: Path, tmp_path: Path) -> None:
    on_disk = offload_map(loaded(tiny_llama), range(1, 3))
    model = loaded(tiny_llama, device_map=on_disk, offload_folder=tmp_path)
    with refused(ConfigurationError, "'donor'", "offloaded"):
        attach_gate(model, "donor")


def test_a_gate_that_is_not_finite_is_not_saved(tiny_gpt2: Path, tmp_path: Path) -> None:
    model = loaded(tiny_gpt2, 1)
    gate = attach_gate(model, "donor")
    set_to(gate, float("inf"))
    with refused(ConfigurationError, "finite"):
        model.save_pretrained(tmp_path / "saved", thin=True)
    assert layers_of(model)[1].transplant_gate is gate
    assert list(tmp_path.iterdir()) == []
