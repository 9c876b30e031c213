"""`disable_transplants()`: exactly the recipient inside the block, exactly the transplant after it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import (
    DONOR_LAYERS,
    NUM_LAYERS,
    PADDING,
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
    some_ids,
)
from transplant_hf import AutoModelWithTransplant, ConfigurationError, DonorSpec


@pytest.fixture
def two(tiny_gpt_oss: Path) -> Any:
    """A recipient with two donors, `a` inserted and `b` replacing."""
    donor = str(tiny_gpt_oss / "donor")
    specs = [DonorSpec(donor, 1, name="a"), DonorSpec(donor, 2, "replace", name="b", layers=[1])]
    return AutoModelWithTransplant.from_pretrained(tiny_gpt_oss / "recipient", donors=specs, keep_replaced=True)


# -- Exactly the recipient -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("position", "mode"), [(0, "insert"), (1, "insert"), (4, "insert"), (0, "replace"), (2, "replace")]
)
def test_exactly_the_recipient(tiny: Path, position: int, mode: str) -> None:
    model, recipient = loaded(tiny, position, mode, keep_replaced=mode == "replace"), plain(tiny / "recipient")
    before, said = logits_of(model), generated(model)
    with model.disable_transplants():
        assert torch.equal(logits_of(model), logits_of(recipient))
        assert torch.equal(generated(model, use_cache=True), generated(recipient, use_cache=True))
        assert torch.equal(generated(model, use_cache=False), generated(recipient, use_cache=True))
    assert not torch.equal(before, logits_of(recipient))
    assert torch.equal(logits_of(model), before)
    assert torch.equal(generated(model), said)


def test_keeping_what_nobody_replaces_changes_nothing(tiny: Path) -> None:
    model, without = loaded(tiny, 1, keep_replaced=True), loaded(tiny, 1)
    assert torch.equal(logits_of(model), logits_of(without))
    assert list(model.state_dict()) == list(without.state_dict())
    model.add_donor(str(tiny / "donor"), 2, "replace", name="later")
    with model.disable_transplants():
        assert torch.equal(logits_of(model), logits_of(plain(tiny / "recipient")))


@pytest.mark.parametrize("position", [0, 4])
def test_with_left_padding(tiny: Path, position: int) -> None:
    """Where layer 0 is the donor's, an empty cache slot would shift every position."""
    model, recipient = loaded(tiny, position), plain(tiny / "recipient")
    ids = some_ids()
    ids[0, :5] = PADDING
    mask = (ids != PADDING).long()
    with model.disable_transplants():
        assert torch.equal(logits_of(model, ids, attention_mask=mask), logits_of(recipient, ids, attention_mask=mask))
        assert torch.equal(generated(model, ids, attention_mask=mask), generated(recipient, ids, attention_mask=mask))


@pytest.mark.parametrize("position", [0, 4])
def test_with_a_static_cache(tiny: Path, position: int) -> None:
    model, recipient = loaded(tiny, position), plain(tiny / "recipient")
    static = {"cache_implementation": "static", "disable_compile": True}
    outside = generated(model, **static)
    with model.disable_transplants():
        assert torch.equal(generated(model, **static), generated(recipient, **static))
    assert torch.equal(generated(model, **static), outside)


def test_with_beams(tiny: Path) -> None:
    model, recipient = loaded(tiny, 0), plain(tiny / "recipient")
    outside = generated(model, num_beams=3, use_cache=True)
    assert torch.equal(outside, generated(model, num_beams=3, use_cache=False))
    with model.disable_transplants():
        assert torch.equal(generated(model, num_beams=3), generated(recipient, num_beams=3))
    assert torch.equal(generated(model, num_beams=3), outside)


def test_the_configuration_and_the_map(tiny: Path) -> None:
    model, recipient = loaded(tiny, 1), plain(tiny / "recipient")
    outside = model.config.to_dict()
    with model.disable_transplants():
        assert model.layer_map == tuple(("recipient", number) for number in range(NUM_LAYERS))
        assert len(layers_of(model)) == NUM_LAYERS
        ours, theirs = model.config.to_dict(), recipient.config.to_dict()
        assert {name for name in ours if ours[name] != theirs.get(name)} <= {"_name_or_path"}
        assert set(model.state_dict()) == set(recipient.state_dict())
    assert model.config.to_dict() == outside
    assert len(model.layer_map) == NUM_LAYERS + 2


@pytest.mark.parametrize("first", ["inside", "outside"])
def test_hidden_states_are_counted(tiny: Path, first: str) -> None:
    """Transformers installs what records them at the first call; that call may be on either side."""
    model, recipient = loaded(tiny, 1), plain(tiny / "recipient")
    ids = some_ids()

    def check(inside: bool) -> None:
        with torch.no_grad():
            states = model(ids, output_hidden_states=True).hidden_states
            assert len(states) == (NUM_LAYERS if inside else NUM_LAYERS + 2) + 1
            if inside:
                theirs = recipient(ids, output_hidden_states=True).hidden_states
                assert all(torch.equal(a, b) for a, b in zip(states, theirs, strict=True))

    if first == "outside":
        check(inside=False)
    for _ in range(2):
        with model.disable_transplants():
            check(inside=True)
        check(inside=False)


def test_attentions_are_counted(tiny: Path) -> None:
    model = loaded(tiny, 1, attn_implementation="eager")
    for _ in range(2):
        with torch.no_grad():
            assert len(model(some_ids(), output_attentions=True).attentions) == NUM_LAYERS + 2
            with model.disable_transplants():
                assert len(model(some_ids(), output_attentions=True).attentions) == NUM_LAYERS


def test_no_weight_is_copied(tiny: Path) -> None:
    model = loaded(tiny, 1)
    outside = {tensor.data_ptr() for tensor in model.parameters()}
    with model.disable_transplants():
        inside = {tensor.data_ptr() for tensor in model.parameters()}
    assert inside < outside
    assert {tensor.data_ptr() for tensor in model.parameters()} == outside


def test_training_inside_trains_the_recipient(tiny: Path) -> None:
    model = loaded(tiny, 1)
    donor = layers_of(model)[1]
    with model.disable_transplants():
        model(some_ids(), labels=some_ids()).loss.backward()
    assert all(parameter.grad is None for parameter in donor.parameters())
    assert any(parameter.grad is not None for parameter in layers_of(model)[0].parameters())


# -- Nesting, names, exceptions ------------------------------------------------------------------------------------


def test_by_name(two: Any, tiny_gpt_oss: Path) -> None:
    recipient, source = plain(tiny_gpt_oss / "recipient"), plain(tiny_gpt_oss / "source")
    a, b = Graft(source, DONOR_LAYERS, 1), Graft(source, [2], 2, replace=True)
    sides: list[tuple[Any, list[Graft]]] = [("a", [b]), (["b"], [a]), (("a", "b"), []), ([], [a, b]), (None, [])]
    for names, running in sides:
        with two.disable_transplants(names):
            torch.testing.assert_close(logits_of(two), reference_logits(recipient, running))
            assert torch.equal(generated(two, use_cache=True), generated(two, use_cache=False))
            assert set(two.layer_map.sources) == {"recipient"} | {"b" if g.replace else "a" for g in running}
    torch.testing.assert_close(logits_of(two), reference_logits(recipient, [a, b]))


def test_nesting(two: Any) -> None:
    whole = two.layer_map
    with two.disable_transplants("a"):
        outer = two.layer_map
        with two.disable_transplants():
            assert two.layer_map.sources == ("recipient",)
            with two.disable_transplants("a"):
                assert two.layer_map.sources == ("recipient",)
        assert two.layer_map == outer
        with two.disable_transplants("b"):
            assert two.layer_map.sources == ("recipient",)
        assert two.layer_map == outer
    assert two.layer_map == whole
    assert torch.equal(generated(two, use_cache=True), generated(two, use_cache=False))


def test_blocks_that_end_out_of_order(two: Any) -> None:
    """Each block takes back what it switched, as generators and callbacks may end in any order."""
    first, second = two.disable_transplants("a"), two.disable_transplants("b")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert "a" in two.layer_map.sources
    assert "b" not in two.layer_map.sources
    second.__exit__(None, None, None)
    assert set(two.layer_map.sources) == {"recipient", "a", "b"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_switches_back(tiny: Path, error: type[BaseException]) -> None:
    model = loaded(tiny, 1)
    before = logits_of(model)
    with pytest.raises(error), model.disable_transplants():
        raise error
    assert torch.equal(logits_of(model), before)
    assert len(model.layer_map) == NUM_LAYERS + 2


def test_unknown_names_are_refused_before_anything_happens(two: Any) -> None:
    before = two.layer_map
    with refused(ConfigurationError, "'c'", "a, b"), two.disable_transplants(["a", "c"]):
        pass
    assert two.layer_map == before


def test_a_replaced_layer_that_was_not_kept(tiny: Path) -> None:
    model = loaded(tiny, 1, "replace")
    for names in (None, "donor"):
        with (
            refused(ConfigurationError, "'donor'", "not loaded", "keep_replaced=True"),
            model.disable_transplants(names),
        ):
            pass
    assert len(model.layer_map) == NUM_LAYERS


def test_kept_layers_do_not_run(tiny: Path) -> None:
    kept, gone = loaded(tiny, 1, "replace", keep_replaced=True), loaded(tiny, 1, "replace")
    assert torch.equal(logits_of(kept), logits_of(gone))
    assert kept.layer_map == gone.layer_map
    assert set(kept.state_dict()) == set(gone.state_dict())
    assert kept.config.to_dict() == gone.config.to_dict()


def test_a_model_without_donors_has_no_switch(tiny_gpt2: Path) -> None:
    model = type(loaded(tiny_gpt2))(plain(tiny_gpt2 / "recipient").config)
    with refused(ConfigurationError, "no transplant"), model.disable_transplants():
        pass


# -- Idle layers ---------------------------------------------------------------------------------------


def idle_layers(model: Any) -> list[Any]:
    """Modules of layers that run on one side only."""
    outside = list(layers_of(model))
    with model.disable_transplants():
        inside = list(layers_of(model))
    return [layer for layer in {*outside, *inside} if layer not in outside or layer not in inside]


@pytest.mark.parametrize("mode", ["insert", "replace"])
@pytest.mark.parametrize("inside", [False, True])
def test_casting(tiny: Path, mode: str, inside: bool) -> None:
    model = loaded(tiny, 1, mode, keep_replaced=mode == "replace")
    if inside:
        with model.disable_transplants():
            model.to(torch.bfloat16)
    else:
        model.to(torch.bfloat16)
    layers = idle_layers(model)
    assert len(layers) == (2 if mode == "insert" else 4)
    assert {tensor.dtype for layer in layers for tensor in layer.parameters()} == {torch.bfloat16}
    recipient = plain(tiny / "recipient").to(torch.bfloat16)
    assert torch.equal(logits_of(model), logits_of(loaded(tiny, 1, mode).to(torch.bfloat16)))
    with model.disable_transplants():
        assert torch.equal(logits_of(model), logits_of(recipient))


@pytest.mark.parametrize("mode", ["insert", "replace"])
def test_train_and_eval(tiny: Path, mode: str) -> None:
    model = loaded(tiny, 1, mode, keep_replaced=mode == "replace")

    def modes() -> set[bool]:
        return {module.training for module in model.modules()}

    with model.disable_transplants():
        model.train()
        assert modes() == {True}
    assert modes() == {True}
    model.eval()
    with model.disable_transplants():
        assert modes() == {False}
        model.train()
    model.eval()
    assert modes() == {False}


@pytest.mark.parametrize("mode", ["insert", "replace"])
@pytest.mark.parametrize("inside", [False, True])
def test_what_is_set_on_one_side_holds_on_both(tiny: Path, mode: str, inside: bool) -> None:
    model = loaded(tiny, 1, mode, keep_replaced=mode == "replace")
    layers = idle_layers(model)

    def on_one_side(turn: Callable[[], Any]) -> None:
        with model.disable_transplants() if inside else nullcontext():
            turn()

    for flag in (True, False):
        on_one_side(model.gradient_checkpointing_enable if flag else model.gradient_checkpointing_disable)
        on_one_side(lambda flag=flag: model.train(flag))  # type: ignore[misc]
        on_one_side(lambda flag=flag: model.requires_grad_(flag))  # type: ignore[misc]
        for layer in layers:
            assert layer.gradient_checkpointing is flag
            assert {part.training for part in layer.modules()} == {flag}
            assert {parameter.requires_grad for parameter in layer.parameters()} == {flag}


def test_a_list_of_parameters_is_of_what_runs(tiny: Path) -> None:
    """It is counted, optimized and frozen by such lists."""
    for model in (loaded(tiny, 1), loaded(tiny, 1, "replace", keep_replaced=True)):
        assert [name for name, _ in model.named_parameters()] == [
            name for name, _ in loaded(tiny, 1, model.transplant_config.donors[0].mode).named_parameters()
        ]
        with model.disable_transplants():
            recipient = plain(tiny / "recipient")
            assert [name for name, _ in model.named_parameters()] == [name for name, _ in recipient.named_parameters()]
            assert [name for name, _ in model.named_buffers()] == [name for name, _ in recipient.named_buffers()]
            assert list(model.state_dict()) == list(recipient.state_dict())


def adapted(model: Any, name: str = "default") -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"])
    if name == "default":
        return peft.get_peft_model(model, config)
    model.add_adapter(name, config)
    return model


def test_adapters_chosen_inside(tiny_llama: Path) -> None:
    model = adapted(adapted(loaded(tiny_llama, 1)), "other")
    first = logits_of(model)
    model.set_adapter("other")
    second = logits_of(model)
    model.set_adapter("default")
    with model.disable_transplants():
        model.set_adapter("other")
    assert torch.equal(logits_of(model), second)
    with model.disable_transplants():
        model.set_adapter("default")
        model.merge_adapter()
    torch.testing.assert_close(logits_of(model), first, rtol=1e-4, atol=1e-4)
    with model.disable_transplants():
        model.unmerge_adapter()
        model.delete_adapter("other")
    torch.testing.assert_close(logits_of(model), first, rtol=1e-4, atol=1e-4)
    assert not [name for name, _ in model.named_parameters() if ".other." in name]


@pytest.mark.parametrize("merge", [True, False])
def test_adapters_taken_off_inside(tiny_llama: Path, merge: bool) -> None:
    model = adapted(loaded(tiny_llama, 1))
    wanted = logits_of(model) if merge else logits_of(loaded(tiny_llama, 1))
    with model.disable_transplants():
        base = model.merge_and_unload() if merge else model.unload()
    assert not [name for name, _ in base.named_parameters() if "lora" in name]
    torch.testing.assert_close(logits_of(base), wanted, rtol=1e-4, atol=1e-4)


def test_an_adapter_put_on_inside_is_the_recipients(tiny_llama: Path) -> None:
    model = loaded(tiny_llama, 1)
    with model.disable_transplants():
        wrapped = adapted(model)
    adapters = {name.split(".layers.")[1][0] for name, _ in wrapped.named_parameters() if "lora" in name}
    assert adapters == {"0", "3", "4", "5"}


def test_weights_changed_outside_are_seen_inside(tiny: Path) -> None:
    model = loaded(tiny, 1)
    before = logits_of(model)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)
    with model.disable_transplants():
        changed = plain(tiny / "recipient")
        with torch.no_grad():
            changed.get_input_embeddings().weight.mul_(1.5)
        assert torch.equal(logits_of(model), logits_of(changed))
    assert not torch.equal(logits_of(model), before)


def test_new_tokens_on_either_side(tiny: Path) -> None:
    model = loaded(tiny, 1)
    with model.disable_transplants():
        model.resize_token_embeddings(270)
    assert logits_of(model).shape[-1] == model.config.vocab_size == 270
    model.resize_token_embeddings(280)
    with model.disable_transplants():
        assert logits_of(model).shape[-1] == model.config.vocab_size == 280


def test_attention_changed_on_either_side(tiny_llama: Path) -> None:
    model = loaded(tiny_llama, 1)
    with model.disable_transplants():
        model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    model.set_attn_implementation("sdpa")
    with model.disable_transplants():
        assert model.config._attn_implementation == "sdpa"


def test_a_donor_that_is_not_finite_does_not_leak(tiny: Path, tmp_path: Path) -> None:
    family = copied(tiny, tmp_path / "family")
    edit_weights(family / "donor", lambda tensors: [tensor.fill_(1e38) for tensor in tensors.values()])
    model = loaded(family, 1)
    assert not torch.isfinite(logits_of(model)).all()
    with model.disable_transplants():
        assert torch.equal(logits_of(model), logits_of(plain(tiny / "recipient")))


def test_a_strength_goes_with_its_donor(tiny: Path) -> None:
    model, recipient = loaded(tiny, 2, strength=0.5), plain(tiny / "recipient")
    before = logits_of(model)
    with model.disable_transplants():
        assert torch.equal(logits_of(model), logits_of(recipient))
        assert torch.equal(generated(model), generated(recipient))
    assert torch.equal(logits_of(model), before)
