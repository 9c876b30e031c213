"""`set_strength`: h + s (donor(h) - h), set on the loaded model, and what reads the strength follows."""

from __future__ import annotations

import copy
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from tests.helpers import (
    DONOR_LAYERS,
    NUM_LAYERS,
    PADDING,
    Graft,
    generated,
    hooks_at_work,
    layers_of,
    loaded,
    logits_of,
    plain,
    reference_logits,
    refused,
    some_ids,
    two_donors,
)
from transplant_hf import AutoModelWithTransplant, ConfigurationError, Donor, remove_transplants, transplant
from transplant_hf.model.strength import HOOKS_RUN_AGAIN
from transplant_hf.partial import PartialRun, hidden_states

load = AutoModelWithTransplant.from_pretrained


# -- What runs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("position", "strength"), [(0, 0.5), (1, -1.5), (4, 2), (4, 0.5)])
def test_the_same_as_by_hand(tiny: Path, position: int, strength: float) -> None:
    recipient, source = plain(tiny / "recipient"), plain(tiny / "source")
    model = loaded(tiny, position)
    model.set_strength("donor", strength)
    wanted = reference_logits(recipient, [Graft(source, DONOR_LAYERS, position, strength=strength)])
    torch.testing.assert_close(logits_of(model), wanted)
    assert torch.equal(generated(model, use_cache=True), generated(model, use_cache=False))
    assert torch.equal(logits_of(model), logits_of(loaded(tiny, position, strength=strength)))


@pytest.mark.parametrize("position", [0, 2, 4])
def test_nothing_and_all_of_it(tiny: Path, position: int) -> None:
    """0 is exactly the recipient, 1 exactly the donor again, with no hook left at work."""
    model, recipient = loaded(tiny, position), plain(tiny / "recipient")
    whole = logits_of(model)
    assert hooks_at_work(model) == []
    model.set_strength("donor", 0)
    assert torch.equal(logits_of(model), logits_of(recipient))
    assert torch.equal(generated(model), generated(recipient))
    model.set_strength("donor", 1)
    assert hooks_at_work(model) == []
    assert torch.equal(logits_of(model), whole)


def check_left_padding(model: Any) -> None:
    """Cached and uncached generation agree, and a row that is not padded is as if it were alone."""
    ids = some_ids()
    ids[0, :5] = PADDING
    mask = (ids != PADDING).long()
    padded = generated(model, ids, attention_mask=mask)
    assert torch.equal(padded, generated(model, ids, attention_mask=mask, use_cache=False))
    assert torch.equal(padded[1, 12:], generated(model, ids[1:])[0, 12:])


def test_left_padding(tiny: Path) -> None:
    model = loaded(tiny, 0)
    model.set_strength("donor", 0.5)
    check_left_padding(model)


def test_two_strengths_are_independent(tiny: Path) -> None:
    model, source = two_donors(tiny), plain(tiny / "source")
    model.set_strength("b", 0.25)
    model.set_strength("a", 0.5)
    assert model.strengths == {"a": 0.5, "b": 0.25}
    grafts = [Graft(source, [2], 0, strength=0.5), Graft(source, DONOR_LAYERS, 2, strength=0.25)]
    torch.testing.assert_close(logits_of(model), reference_logits(plain(tiny / "recipient"), grafts))
    with model.disable_transplants("a"):
        torch.testing.assert_close(logits_of(model), reference_logits(plain(tiny / "recipient"), grafts[1:]))


def test_set_while_switched_off(tiny: Path) -> None:
    model = loaded(tiny, 1)
    with model.disable_transplants():
        model.set_strength("donor", 0.5)
        assert torch.equal(logits_of(model), logits_of(plain(tiny / "recipient")))
    assert torch.equal(logits_of(model), logits_of(loaded(tiny, 1, strength=0.5)))


def test_values_that_overflow_do_not_matter_at_zero(tiny_llama: Path) -> None:
    model = loaded(tiny_llama, 1)
    with torch.no_grad():
        layers_of(model)[1].mlp.down_proj.weight.fill_(torch.inf)
    assert not torch.isfinite(logits_of(model)).all()
    model.set_strength("donor", 0)
    assert torch.equal(logits_of(model), logits_of(plain(tiny_llama / "recipient")))


@pytest.mark.parametrize("position", [1, 4])
def test_recorded_hidden_states_are_those_that_go_on(tiny: Path, position: int) -> None:
    """What was recorded after the donor is what the layers behind it get, whichever hook came first."""
    model = loaded(tiny, position)
    with torch.no_grad():
        model(some_ids(), output_hidden_states=True)
        model.set_strength("donor", 0)
        states = model(some_ids(), output_hidden_states=True).hidden_states
    if position < NUM_LAYERS:
        assert torch.equal(states[position + 2], states[position])
    inside = hidden_states(model, some_ids(), range(NUM_LAYERS + 3))
    assert torch.equal(inside[position + 2], inside[position])


def test_a_part_of_the_model(tiny: Path) -> None:
    """A hidden state that was computed before enters the donor before its hooks see it."""
    model = loaded(tiny, 2)
    model.set_strength("donor", 0.5)
    before = hidden_states(model, some_ids(), [2])[2]
    with torch.no_grad(), PartialRun(model, range(2, NUM_LAYERS + 2)) as part:
        logits = part(input_ids=some_ids(), prefix_states=before, use_cache=False).logits
    assert torch.equal(logits, logits_of(model))
    inside = hidden_states(model, some_ids(), [3])[3]
    with (
        PartialRun(model, range(3, NUM_LAYERS + 2)) as part,
        refused(ConfigurationError, "layer 3", "inside a donor"),
    ):
        part(input_ids=some_ids(), prefix_states=inside, use_cache=False)


def test_two_threads(tiny_llama: Path) -> None:
    """Each forward pass keeps its own hidden state between a donor's first layer and its last."""
    model = loaded(tiny_llama, 1)
    model.set_strength("donor", 0.5)
    ids = [some_ids(seed=seed) for seed in range(2)]
    wanted = [logits_of(model, each) for each in ids]
    meet = threading.Barrier(2, timeout=30)

    def inside_the_donor(*_: Any) -> None:
        meet.wait()

    hook = layers_of(model)[2].register_forward_pre_hook(inside_the_donor)
    found: dict[int, torch.Tensor] = {}
    threads = [threading.Thread(target=lambda n=n: found.update({n: logits_of(model, ids[n])})) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    hook.remove()
    assert all(torch.equal(found[number], wanted[number]) for number in range(2))


# -- Training -----------------------------------------------------------------------------------------------------


def check_gradients_with_checkpointing(model: Any, reentrant: bool) -> None:
    """Two forward passes before one backward: each is recomputed with what it was computed from."""

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        losses = [model(some_ids(seed=s), labels=some_ids(seed=s), use_cache=False).loss for s in range(2)]
        (losses[0] * losses[1]).backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    wanted = gradients()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for name, found in gradients().items():
        torch.testing.assert_close(found, wanted[name], msg=name)


@pytest.mark.skipif(HOOKS_RUN_AGAIN, reason="Transformers before 5.23 runs hooks again in the backward pass: refused")
@pytest.mark.parametrize(("family", "reentrant"), [("llama", False), ("llama", True), ("gpt_oss", False)])
def test_gradients_with_checkpointing(request: pytest.FixtureRequest, family: str, reentrant: bool) -> None:
    model = loaded(request.getfixturevalue(f"tiny_{family}"), 1)
    model.set_strength("donor", 0.5)
    model.train()
    check_gradients_with_checkpointing(model, reentrant)


def test_checkpointing_that_would_be_wrong_is_refused(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As before Transformers 5.23, which ran hooks again in the backward pass."""
    monkeypatch.setattr("transplant_hf.model.strength.HOOKS_RUN_AGAIN", True)
    model = loaded(tiny_llama, 1).train()
    model.gradient_checkpointing_enable()
    model(some_ids(), labels=some_ids(), use_cache=False).loss.backward()
    model.set_strength("donor", 0.5)
    with refused(ConfigurationError, "wrong gradients", "'donor'", "5.23"):
        model(some_ids(), use_cache=False)
    model.eval()
    model(some_ids(), use_cache=False)


@pytest.mark.slow
def test_compiled(tiny: Path) -> None:
    """What was compiled before another strength was set must not run, although torch.compile does not watch hooks."""
    torch.compiler.reset()
    model = loaded(tiny, 1)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for strength in (1, 0.5, 0.25, 0, 1, 0.75):
        model.set_strength("donor", strength)
        torch.testing.assert_close(logits_of(compiled), logits_of(model))
        with model.disable_transplants():
            torch.testing.assert_close(logits_of(compiled), logits_of(plain(tiny / "recipient")))
    torch.compiler.reset()


@pytest.mark.slow
def test_nothing_else_is_compiled_again(tiny_llama: Path) -> None:
    """Neither a change of a setting nor one of donors costs other compiled functions of the process anything."""
    torch.compiler.reset()
    counter = CompileCounter()
    other = torch.compile(lambda numbers: numbers + 1, backend=counter)
    model = loaded(tiny_llama, 1)
    compiled = torch.compile(model, backend="eager", fullgraph=True)

    def check() -> None:
        other(torch.zeros(2))
        assert counter.frame_count == 1
        torch.testing.assert_close(logits_of(compiled), logits_of(model))

    check()
    model.set_strength("donor", 0.5)
    check()
    model.add_donor(str(tiny_llama / "donor"), 1, name="two", strength=0.25)
    check()
    model.set_composition("side_by_side")
    check()
    model.move_donor("two", 3)
    check()
    if Version(torch.__version__) >= Version("2.13"):  # torch 2.10 cannot trace a thread's choice
        with model.using("two"):
            check()
        check()
    torch.compiler.reset()


# -- What reads it ------------------------------------------------------------------------------------------------


def test_the_record_follows(tiny: Path) -> None:
    model = loaded(tiny, 1)
    known = model.transplant_config
    model.set_strength("donor", 0.5)
    assert model.transplant_config.donors[0].strength == 0.5
    assert (model.transplant_config.recipient, known.donors[0].strength) == (known.recipient, 1.0)
    donor = Donor.from_model(model, model.layer_map.layers_of("donor"))
    assert (donor.position, donor.mode, donor.strength) == (1, "insert", 0.5)


@pytest.mark.parametrize("thin", [False, True])
def test_it_is_saved(tiny: Path, tmp_path: Path, thin: bool, warned: list[str]) -> None:
    model = loaded(tiny, 2, name="law")
    model.set_strength("law", 0.5)
    model.save_pretrained(tmp_path / "saved", thin=thin)
    again = load(tmp_path / "saved")
    assert again.strengths == {"law": 0.5}
    assert torch.equal(logits_of(again), logits_of(model))
    assert "at strength 0.5" in (tmp_path / "saved" / "README.md").read_text()
    assert ("strength of law is not 1" in " ".join(warned)) == (not thin)


def test_at_one_again_it_is_native(tiny_gpt2: Path, tmp_path: Path, warned: list[str]) -> None:
    model = loaded(tiny_gpt2, 2, strength=0.5)
    model.set_strength("donor", 1)
    model.save_pretrained(tmp_path / "full")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    assert type(again) is GPT2LMHeadModel
    assert torch.equal(logits_of(again), logits_of(model))
    assert warned == []


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])  # noqa: S301
def test_a_copy_has_a_strength_of_its_own(tiny: Path, copied: Any) -> None:
    model = loaded(tiny, 1)
    model.set_strength("donor", 0.5)
    again = copied(model)
    half = logits_of(model)
    assert torch.equal(logits_of(again), half)
    again.set_strength("donor", 0.25)
    assert (model.strengths, again.strengths) == ({"donor": 0.5}, {"donor": 0.25})
    assert torch.equal(logits_of(model), half)
    assert torch.equal(logits_of(again), logits_of(loaded(tiny, 1, strength=0.25)))
    again.set_strength("donor", 1)
    assert hooks_at_work(again) == []
    assert torch.equal(logits_of(again), logits_of(loaded(tiny, 1)))
    assert torch.equal(logits_of(model), half)


def test_another_donor_on_top(tiny: Path) -> None:
    recipient, source = plain(tiny / "recipient"), plain(tiny / "source")
    first = transplant(recipient, str(tiny / "donor"), 1, name="one")
    first.set_strength("one", 0.5)
    second = transplant(first, str(tiny / "donor"), 3, name="two", strength=0.25)
    assert second.strengths == {"one": 0.5, "two": 0.25}
    second.set_strength("one", 0.75)
    assert first.strengths == {"one": 0.5}
    grafts = [Graft(source, DONOR_LAYERS, 1, strength=0.75), Graft(source, DONOR_LAYERS, 3, strength=0.25)]
    torch.testing.assert_close(logits_of(second), reference_logits(recipient, grafts))


def test_taken_out(tiny: Path) -> None:
    model = loaded(tiny, 1)
    model.set_strength("donor", 0.5)
    again = remove_transplants(model)
    assert torch.equal(logits_of(again), logits_of(plain(tiny / "recipient")))
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers_of(again))


def test_cast_after_a_strength_was_set(tiny: Path) -> None:
    model = loaded(tiny, 1)
    model.set_strength("donor", 0.5)
    model.to(torch.bfloat16)
    assert logits_of(model).dtype == torch.bfloat16
    assert torch.equal(logits_of(model), logits_of(loaded(tiny, 1, strength=0.5).to(torch.bfloat16)))


# -- Refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "full", None, True])
def test_no_number(tiny_gpt2: Path, value: Any) -> None:
    model = loaded(tiny_gpt2, 1)
    before = logits_of(model)
    with refused(ConfigurationError, "strength", "finite", repr(value)):
        model.set_strength("donor", value)
    with refused(ConfigurationError, "position", "got"):
        model.move_donor("donor", value)
    assert model.strengths == {"donor": 1.0}
    assert torch.equal(logits_of(model), before)


def test_no_such_donor(tiny_gpt2: Path) -> None:
    with refused(ConfigurationError, "'c'", "a, b"):
        two_donors(tiny_gpt2).set_strength("c", 0.5)
    empty = remove_transplants(loaded(tiny_gpt2, 1))
    assert not hasattr(empty, "set_strength")
    model = type(loaded(tiny_gpt2))(plain(tiny_gpt2 / "recipient").config)
    assert model.strengths == {}
    with refused(ConfigurationError, "no transplant"):
        model.set_strength("donor", 0.5)


@pytest.mark.parametrize("keep", [False, True])
def test_a_replacing_donor_has_strength_one(tiny_gpt2: Path, keep: bool) -> None:
    model = loaded(tiny_gpt2, 1, "replace", keep_replaced=keep)
    with refused(ConfigurationError, "replaces recipient layers", "0.5"):
        model.set_strength("donor", 0.5)
    model.set_strength("donor", 1)
    assert hooks_at_work(model) == []


def test_half_a_donor_cannot_be_scaled(tiny_llama: Path) -> None:
    model = loaded(tiny_llama, 1)
    model.set_strength("donor", 0.5)
    logits_of(model)
    with refused(ConfigurationError, "without its first layer", "set_strength(name, 1)"):
        layers_of(model)[2](torch.zeros(1, 1, 32), position_embeddings=(torch.zeros(1, 1, 8), torch.zeros(1, 1, 8)))
