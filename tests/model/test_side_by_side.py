"""Donors side by side: all of one position get the same hidden state, and what they add is summed."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import (
    DONOR_LAYERS,
    NUM_LAYERS,
    Graft,
    generated,
    hooks_at_work,
    loaded,
    logits_of,
    plain,
    reference_logits,
    refused,
)
from tests.model.test_kwargs import offload_map
from tests.model.test_strength import check_gradients_with_checkpointing, check_left_padding
from transplant_hf import AutoModelWithTransplant, ConfigurationError, DonorSpec, TransplantConfig, transplant
from transplant_hf.inspection import inspect
from transplant_hf.model.strength import HOOKS_RUN_AGAIN

load = AutoModelWithTransplant.from_pretrained


def trio(family: Path, position: int = 1, **kwargs: Any) -> Any:
    """Three donors at one position: layers 1 and 2, layer 2, layer 1."""
    strengths = kwargs.pop("strengths", (1.0, 1.0, 1.0))
    layers = (None, [1], [0])
    specs = [
        DonorSpec(str(family / "donor"), position, name=name, layers=chosen, strength=strength)
        for name, chosen, strength in zip("abc", layers, strengths, strict=True)
    ]
    return load(family / "recipient", donors=specs, **{"composition": "side_by_side", **kwargs})


def by_hand(family: Path, names: str = "abc", position: int = 1, strengths: Any = None, **kwargs: Any) -> torch.Tensor:
    source, layers = plain(family / "source"), {"a": DONOR_LAYERS, "b": [2], "c": [1]}
    grafts = [Graft(source, layers[n], position, strength=(strengths or {}).get(n, 1.0)) for n in names]
    return reference_logits(plain(family / "recipient"), grafts, **{"side_by_side": True, **kwargs})


# -- What runs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", [0, 1, 4])
def test_the_same_as_by_hand(tiny: Path, position: int) -> None:
    model = trio(tiny, position)
    torch.testing.assert_close(logits_of(model), by_hand(tiny, position=position))
    assert torch.equal(generated(model, use_cache=True), generated(model, use_cache=False))
    assert not torch.allclose(logits_of(model), by_hand(tiny, position=position, side_by_side=False))
    assert len(model.layer_map) == NUM_LAYERS + 4


def test_with_strengths(tiny: Path) -> None:
    model = trio(tiny, strengths=(0.5, 1.0, -0.25))
    torch.testing.assert_close(logits_of(model), by_hand(tiny, strengths={"a": 0.5, "c": -0.25}))
    for name in "abc":
        model.set_strength(name, 0)
    assert torch.equal(logits_of(model), logits_of(plain(tiny / "recipient")))
    model.set_strength("b", 0.75)
    torch.testing.assert_close(logits_of(model), by_hand(tiny, "b", strengths={"b": 0.75}))


def test_some_switched_off(tiny: Path) -> None:
    """The rest stay side by side, whichever is the first of them."""
    model = trio(tiny, strengths=(1.0, 0.5, 1.0))
    for off in ("a", "b", "c", "ab", "bc", "ac"):
        with model.disable_transplants(list(off)):
            names = "".join(name for name in "abc" if name not in off)
            torch.testing.assert_close(logits_of(model), by_hand(tiny, names, strengths={"b": 0.5}))
            assert torch.equal(generated(model, use_cache=True), generated(model, use_cache=False))
    with model.disable_transplants():
        assert torch.equal(logits_of(model), logits_of(plain(tiny / "recipient")))
    torch.testing.assert_close(logits_of(model), by_hand(tiny, strengths={"b": 0.5}))


def test_at_run_time(tiny: Path) -> None:
    model = trio(tiny, composition="stacked")
    stacked = logits_of(model)
    torch.testing.assert_close(stacked, by_hand(tiny, side_by_side=False))
    model.set_composition("side_by_side")
    torch.testing.assert_close(logits_of(model), by_hand(tiny))
    assert model.transplant_config.composition == "side_by_side"
    model.set_composition("stacked")
    assert torch.equal(logits_of(model), stacked)
    assert hooks_at_work(model) == []


def test_donors_that_stand_alone_or_replace(tiny: Path) -> None:
    """Only inserted donors at one position go side by side; elsewhere nothing changes, and no hook acts."""
    donor = str(tiny / "donor")
    specs = [
        DonorSpec(donor, 0, name="alone"),
        DonorSpec(donor, 2, name="a", layers=[0]),
        DonorSpec(donor, 2, name="b", layers=[1]),
        DonorSpec(donor, 3, "replace", name="instead", layers=[0]),
        DonorSpec(donor, 3, name="behind", layers=[1]),
    ]
    model = load(tiny / "recipient", donors=specs, composition="side_by_side")
    source = plain(tiny / "source")
    group = [Graft(source, [1], 2), Graft(source, [2], 2)]
    rest = [Graft(source, DONOR_LAYERS, 0), Graft(source, [1], 3, replace=True)]
    assert model.transplant_config.side_by_side_groups == (("a", "b"),)
    assert [model.layer_map[number].source for number in hooks_at_work(model)] == ["a", "b"]
    with model.disable_transplants("behind"):
        torch.testing.assert_close(
            logits_of(model), reference_logits(plain(tiny / "recipient"), [*group, *rest], side_by_side=True)
        )


def test_left_padding(tiny: Path) -> None:
    check_left_padding(trio(tiny, 0))


def test_a_static_cache(tiny: Path) -> None:
    model = trio(tiny)
    static = generated(model, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, generated(model))


@pytest.mark.skipif(HOOKS_RUN_AGAIN, reason="Transformers before 5.23 runs hooks again in the backward pass: refused")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_with_checkpointing(tiny_llama: Path, reentrant: bool) -> None:
    check_gradients_with_checkpointing(trio(tiny_llama, strengths=(1.0, 0.5, 1.0)).train(), reentrant)


def test_moved_and_cast(tiny: Path) -> None:
    model = trio(tiny)
    with model.disable_transplants("a"):
        model.to(torch.bfloat16)
    assert logits_of(model).dtype == torch.bfloat16
    assert torch.equal(logits_of(model), logits_of(trio(tiny).to(torch.bfloat16)))


def test_offloaded(tiny: Path, tmp_path: Path) -> None:
    """The strength hooks stay outside of the hooks that move weights and inputs, also when a strength is set later."""
    reference = trio(tiny)
    on_disk = offload_map(reference, range(1, 4))
    model = trio(tiny, device_map=on_disk, offload_folder=tmp_path / "offload")
    assert torch.equal(logits_of(model), logits_of(reference))
    model.set_strength("a", 0.5)
    torch.testing.assert_close(logits_of(model), by_hand(tiny, strengths={"a": 0.5}))


@pytest.mark.slow
def test_compiled(tiny_llama: Path) -> None:
    torch.compiler.reset()
    model = trio(tiny_llama, composition="stacked")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for composition in ("stacked", "side_by_side", "stacked"):
        model.set_composition(composition)
        for off in ("", "a", "bc"):
            with model.disable_transplants(list(off)):
                torch.testing.assert_close(logits_of(compiled), logits_of(model))
    torch.compiler.reset()


# -- Files and copies ---------------------------------------------------------------------------------------------


def test_saved_only_where_it_is_not_the_default(tiny: Path, tmp_path: Path) -> None:
    for composition, written in (("stacked", None), ("side_by_side", "side_by_side")):
        trio(tiny, composition=composition).save_pretrained(tmp_path / composition, thin=True)
        config = json.loads((tmp_path / composition / "config.json").read_text())
        assert config.get("composition") == written
        assert config.get("format_version") == 1
        told = (
            "run side by side" in (tmp_path / composition / "README.md").read_text(),
            str(inspect(tmp_path / composition)),
        )
        assert (told[0], "side_by_side" in told[1]) == (bool(written), bool(written))


@pytest.mark.parametrize("thin", [False, True])
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_a_round_trip(tiny: Path, tmp_path: Path, thin: bool, strength: float, warned: list[str]) -> None:
    """No native checkpoint can say it, at strength 1 neither."""
    model = trio(tiny, strengths=(1.0, strength, 1.0))
    model.save_pretrained(tmp_path / "saved", thin=thin)
    again = load(tmp_path / "saved")
    assert torch.equal(logits_of(again), logits_of(model))
    assert again.strengths == model.strengths
    assert ("a, b, c run side by side" in " ".join(warned)) == (not thin)
    stacked = load(tmp_path / "saved", composition="stacked")
    torch.testing.assert_close(logits_of(stacked), by_hand(tiny, side_by_side=False, strengths={"b": strength}))


def test_one_donor_at_each_position_is_native(tiny_gpt2: Path, tmp_path: Path, warned: list[str]) -> None:
    model = loaded(tiny_gpt2, 1, composition="side_by_side")
    model.save_pretrained(tmp_path / "full")
    assert torch.equal(logits_of(plain(tmp_path / "full")), logits_of(model))
    assert warned == []
    assert "side by side" not in (tmp_path / "full" / "README.md").read_text()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])  # noqa: S301
def test_copies(tiny: Path, copied: Any) -> None:
    model = trio(tiny)
    again = copied(model)
    before = logits_of(model)
    assert torch.equal(logits_of(again), before)
    again.set_composition("stacked")
    torch.testing.assert_close(logits_of(again), by_hand(tiny, side_by_side=False))
    again.set_composition("side_by_side")
    with again.disable_transplants("a"):
        torch.testing.assert_close(logits_of(again), by_hand(tiny, "bc"))
        assert torch.equal(logits_of(model), before)


def test_in_memory(tiny: Path) -> None:
    recipient, source = plain(tiny / "recipient"), plain(tiny / "source")
    first = transplant(recipient, str(tiny / "donor"), 1, name="one")
    second = transplant(first, str(tiny / "donor"), 1, name="two", strength=0.5, composition="side_by_side")
    third = transplant(second, str(tiny / "donor"), 1, name="three")
    grafts = [Graft(source, DONOR_LAYERS, 1, strength=strength) for strength in (1.0, 0.5, 1.0)]
    for model, count in ((second, 2), (third, 3)):
        assert model.transplant_config.composition == "side_by_side"
        torch.testing.assert_close(logits_of(model), reference_logits(recipient, grafts[:count], side_by_side=True))


# -- Refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["parallel", "", 3, ["stacked"]])
def test_an_unknown_composition(tiny_gpt2: Path, tmp_path: Path, value: Any) -> None:
    facts = ("composition", "'stacked'", "'side_by_side'", repr(value))
    with refused(ConfigurationError, *facts):
        TransplantConfig(recipient="x", donors={"user/law": 1}, composition=value)
    with refused(ConfigurationError, str(tiny_gpt2), *facts):
        loaded(tiny_gpt2, composition=value)
    model = loaded(tiny_gpt2)
    with refused(ConfigurationError, "this model", *facts):
        model.set_composition(value)
    if value:
        with refused(ConfigurationError, *facts):
            transplant(plain(tiny_gpt2 / "recipient"), str(tiny_gpt2 / "donor"), 1, composition=value)
    loaded(tiny_gpt2).save_pretrained(tmp_path / "thin", thin=True)
    path = tmp_path / "thin" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "composition": value}))
    with refused(ConfigurationError, *facts):
        load(tmp_path / "thin")
