"""The arguments of `save_pretrained`: in every form of a save each is honored, or refused by its name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from huggingface_hub import HfApi

from tests.helpers import Shelf, layers_of, loaded, logits_of, make_family, plain, refused, tiny_llama_model
from tests.hub_server import ALICE
from tests.model.test_folded_strength import is_native, neox, scaled
from transplant_hf import AutoModelWithTransplant, ConfigurationError, Donor
from transplant_hf.model.strength import attach_gate

load = AutoModelWithTransplant.from_pretrained
# A thin save, and one in the transplant format.
OURS: dict[str, dict[str, Any]] = {"thin": {}, "side": {"strength": 0.5}}


@pytest.fixture(params=sorted(OURS))
def ours(request: pytest.FixtureRequest, tiny: Path) -> tuple[Any, dict[str, Any]]:
    """A model, and what makes its save one of our own formats."""
    model = loaded(tiny, 1, **OURS[request.param])
    return model, {"thin": True} if request.param == "thin" else {}


def with_other_donors(model: Any, factor: float = 0.5) -> dict[str, torch.Tensor]:
    """What an average of the weights would give for a run that trained donors."""
    stack = {id(p) for n in model.layer_map.layers_of("donor") for p in layers_of(model)[n].parameters()}
    mine = {name for name, parameter in model.named_parameters() if id(parameter) in stack}
    return {n: tensor * factor if n in mine else tensor.clone() for n, tensor in model.state_dict().items()}


def holding(model: Any, state: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits of a model that has these weights."""
    model.load_state_dict(state)
    return logits_of(model)


# -- state_dict -----------------------------------------------------------------------------------------------------


def test_a_state_dict_is_what_is_saved(ours: Any, tmp_path: Path) -> None:
    model, how = ours
    state = with_other_donors(model)
    names = set(state)
    model.save_pretrained(tmp_path / "out", state_dict=state, **how)
    assert set(state) == names
    assert not torch.equal(logits_of(load(tmp_path / "out")), logits_of(model))
    assert torch.equal(logits_of(load(tmp_path / "out")), holding(model, state))


def test_arguments_may_stand_in_their_order(ours: Any, tmp_path: Path) -> None:
    model, how = ours
    state = with_other_donors(model)
    model.save_pretrained(tmp_path / "out", True, state, **how)
    model.save_pretrained(tmp_path / "nothing", False, state, **how)
    assert torch.equal(logits_of(load(tmp_path / "out")), holding(model, state))
    assert not (tmp_path / "nothing").exists()
    with refused(ConfigurationError, "'is_main_process' is given twice"):
        model.save_pretrained(tmp_path / "nothing", True, is_main_process=True, **how)


def test_tied_weights_may_be_in_it_once(tmp_path: Path) -> None:
    """As in what `named_parameters()` yields, of which averages are made."""
    make_family(tmp_path, tiny_llama_model, tie_word_embeddings=True)
    for how in ({"thin": True}, {}):
        model = loaded(tmp_path, 1, strength=0.5)
        state = with_other_donors(model)
        once = {name: state[name] for name, _ in model.named_parameters()}
        assert len(once) < len(state)
        model.save_pretrained(tmp_path / "out", state_dict=once, **how)
        assert torch.equal(logits_of(load(tmp_path / "out")), holding(model, state))


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        (lambda state: {f"module.{name}": tensor for name, tensor in state.items()}, ["module.", "prefixes"]),
        (lambda state: dict(list(state.items())[:-3]), ["is missing, and "]),
        (lambda state: {name: tensor[:1] for name, tensor in state.items()}, ["has another shape ([1", "more"]),
    ],
)
def test_a_state_dict_of_another_model_is_refused(ours: Any, tmp_path: Path, change: Any, facts: list[str]) -> None:
    model, how = ours
    with refused(ConfigurationError, "state_dict=", *facts):
        model.save_pretrained(tmp_path / "out", state_dict=change(model.state_dict()), **how)
    assert not list(tmp_path.iterdir())


def test_a_changed_recipient_in_it_is_not_lost(tiny: Path, tmp_path: Path) -> None:
    model = loaded(tiny, 1)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    name = next(name for name in state if "norm" in name or "ln_" in name)
    state[name] += 1
    with refused(ConfigurationError, "changed recipient weights", name):
        model.save_pretrained(tmp_path / "thin", state_dict=state, thin=True)
    half = loaded(tiny, 1, strength=0.5)
    half.save_pretrained(tmp_path / "half", state_dict=state)
    assert torch.equal(logits_of(load(tmp_path / "half")), holding(half, state))


def test_replaced_layers_that_are_kept_are_not_in_it(tiny: Path, tmp_path: Path) -> None:
    model = loaded(tiny, 1, "replace", keep_replaced=True)
    state = with_other_donors(model)
    model.save_pretrained(tmp_path / "thin", state_dict=state, thin=True)
    assert torch.equal(logits_of(load(tmp_path / "thin")), holding(model, state))


def test_a_strength_goes_into_the_given_weights(tmp_path: Path) -> None:
    model = scaled(neox, 0.5)
    state = {name: tensor * (0.9 if ".2." in name else 1) for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "out", state_dict=state)
    assert is_native(tmp_path / "out")
    torch.testing.assert_close(logits_of(plain(tmp_path / "out")), holding(model, state))


def test_a_gate_in_it_is_the_strength(tiny: Path, tmp_path: Path) -> None:
    model = loaded(tiny, 1)
    attach_gate(model, "donor")
    state = {
        name: torch.full_like(t, 0.25) if "gate" in name and t.shape == (1,) else t
        for name, t in model.state_dict().items()
    }
    for how in ({"thin": True}, {}):
        model.save_pretrained(tmp_path / "out", state_dict=state, **how)
        assert load(tmp_path / "out").strengths == {"donor": 0.25}
        assert model.strengths == {"donor": 1.0}


# -- Who writes, and what else is asked for -------------------------------------------------------------------------


def test_other_processes_write_nothing(ours: Any, tmp_path: Path) -> None:
    model, how = ours
    model.save_pretrained(tmp_path / "out", is_main_process=False, **how)
    model.save_pretrained(tmp_path / "out", is_main_process=False, push_to_hub=True, repo_id="alice/never", **how)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "wrong",
    [
        {"variant": "fp16"},
        {"distributed_checkpoint": True},
        {"safe_serialization": False},
        {"save_function": lambda *args, **kwargs: None},
        {"dtype": torch.float16},
        {"strength": 0.5},
        {"commit_message": "without a push"},
    ],
)
def test_what_cannot_be_honored_is_refused_by_name(ours: Any, tmp_path: Path, wrong: dict[str, Any]) -> None:
    model, how = ours
    with refused(ConfigurationError, *wrong):
        model.save_pretrained(tmp_path / "out", **wrong, **how)
    assert not list(tmp_path.iterdir())


def test_a_misspelled_argument_is_named_with_what_is_meant(ours: Any, tmp_path: Path) -> None:
    model, how = ours
    with refused(ConfigurationError, "max_shard_sise='1GB'", "is max_shard_size meant?", "variant="):
        model.save_pretrained(tmp_path / "out", max_shard_sise="1GB", variant="fp16", **how)


def test_what_asks_for_nothing_else_is_taken(ours: Any, tmp_path: Path) -> None:
    """Values that are Transformers' own, and what scripts for Accelerate pass."""
    model, how = ours
    accelerator = Accelerator(cpu=True)
    model.save_pretrained(
        tmp_path / "out",
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(model),
        safe_serialization=True,
        max_shard_size="40KB",
        variant=None,
        token="hf_x",
        save_peft_format=False,
        **how,
    )
    assert len(list((tmp_path / "out").glob("donor-*"))) > 1
    assert torch.equal(logits_of(load(tmp_path / "out")), logits_of(model))


# -- Pushes ---------------------------------------------------------------------------------------------------------


@pytest.mark.hub
def test_a_push_honors_or_refuses(both: Shelf, as_user: Callable[[str], None], tmp_path: Path) -> None:
    as_user(ALICE)
    model, target = load(both.law), f"{both.law}-mine"
    with refused(ConfigurationError, "does not accept tags, use_temp_dir", "commit_description"):
        model.push_to_hub(target, tags=["x"], use_temp_dir=True)
    with pytest.raises(TypeError):
        model.push_to_hub(target, "a message")
    assert not HfApi().repo_exists(target)
    state = with_other_donors(model)
    said = {"commit_message": "Mean", "commit_description": "Of ten checkpoints"}
    model.save_pretrained(tmp_path / "out", thin=True, push_to_hub=True, repo_id=target, state_dict=state, **said)
    newest = HfApi().list_repo_commits(target)[0]
    assert (newest.title, newest.message) == ("Mean", "Of ten checkpoints")
    found = Donor.from_pretrained(target).tensors()
    assert found.keys() == Donor.from_pretrained(both.law).tensors().keys()
    assert torch.equal(logits_of(load(target)), holding(model, state))
