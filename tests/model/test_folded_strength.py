"""A strength folded into weights on a full save: only where it is exactly the same, which is tried out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    CohereConfig,
    CohereForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from tests.helpers import TOKENS, layers_of, logits_of, plain, randomised, tiny_gpt2_model, tiny_llama_model
from transplant_hf import AutoModelWithTransplant, Donor, transplant

SIZE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, **TOKENS}
Build = Callable[[], Any]


def neox(**fields: Any) -> Any:
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SIZE, intermediate_size=48, **fields))


PARALLEL: dict[str, Build] = {
    "gpt_neox": neox,
    "falcon": lambda: FalconForCausalLM(FalconConfig(**SIZE)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**SIZE, intermediate_size=48, num_key_value_heads=2)),
    "phi": lambda: PhiForCausalLM(PhiConfig(**SIZE, intermediate_size=48)),
}
IN_TURN: dict[str, Build] = {
    "gpt2": lambda: tiny_gpt2_model(1),
    "llama": lambda: tiny_llama_model(1),
    "gpt_neox": lambda: neox(use_parallel_residual=False),
}


def scaled(build: Build, strength: float, layers: Any = (2,), dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
    recipient, source = (randomised(build(), seed).to(dtype) for seed in (1, 2))
    donor = Donor.from_model(source, list(layers), name="law")
    return transplant(recipient, donor, 2, strength=strength, **kwargs)


def is_native(folder: Path) -> bool:
    return bool(AutoConfig.from_pretrained(folder).model_type != "transplant")


@pytest.mark.parametrize("name", PARALLEL)
@pytest.mark.parametrize("strength", [0.7, -1.5])
def test_parallel_layers(name: str, strength: float, tmp_path: Path, warned: list[str]) -> None:
    model = scaled(PARALLEL[name], strength)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "full")
    again = plain(tmp_path / "full")
    assert again.config.model_type == name
    torch.testing.assert_close(logits_of(again), logits_of(model), rtol=1e-4, atol=1e-5)
    assert (is_native(tmp_path / "full"), warned) == (True, [])
    assert "at strength" in (tmp_path / "full" / "README.md").read_text()
    assert model.strengths == {"law": strength}
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert not model.training


@pytest.mark.parametrize("name", IN_TURN)
def test_layers_whose_parts_read_each_other(name: str, tmp_path: Path, warned: list[str]) -> None:
    model = scaled(IN_TURN[name], 0.7)
    model.save_pretrained(tmp_path / "full")
    assert not is_native(tmp_path / "full")
    assert "strength of law is not 1" in " ".join(warned)
    assert torch.equal(logits_of(AutoModelWithTransplant.from_pretrained(tmp_path / "full")), logits_of(model))


def test_more_than_one_layer(tmp_path: Path) -> None:
    scaled(neox, 0.7, layers=(1, 2)).save_pretrained(tmp_path / "full")
    assert not is_native(tmp_path / "full")


def test_nothing_of_the_donor_is_not_a_weight_of_zero(tmp_path: Path) -> None:
    """At strength 0 the donor would be lost."""
    scaled(neox, 0.0).save_pretrained(tmp_path / "full")
    assert AutoModelWithTransplant.from_pretrained(tmp_path / "full").strengths == {"law": 0.0}


@pytest.mark.parametrize(("strength", "exact"), [(0.5, True), (0.7, False)])
def test_weights_that_would_be_rounded(strength: float, exact: bool, tmp_path: Path) -> None:
    scaled(neox, strength, dtype=torch.bfloat16).save_pretrained(tmp_path / "full")
    assert is_native(tmp_path / "full") == exact


def test_side_by_side_stays_as_it_is(tmp_path: Path) -> None:
    model = transplant(scaled(neox, 0.7), Donor.from_model(neox(), [1], name="code"), 2, composition="side_by_side")
    model.save_pretrained(tmp_path / "full")
    assert not is_native(tmp_path / "full")


def test_every_scaled_donor_or_none(tmp_path: Path) -> None:
    model = scaled(neox, 0.7)
    two = transplant(model, Donor.from_model(randomised(neox(), 3), [0, 1], name="code"), 3, strength=0.5)
    two.save_pretrained(tmp_path / "none")
    assert not is_native(tmp_path / "none")
    two.set_strength("code", 1)
    two.save_pretrained(tmp_path / "both")
    assert is_native(tmp_path / "both")
    torch.testing.assert_close(logits_of(plain(tmp_path / "both")), logits_of(two), rtol=1e-4, atol=1e-5)


def test_a_state_dict_of_the_callers(tmp_path: Path) -> None:
    """As trainers pass it: what is folded goes on top of it."""
    model = scaled(PARALLEL["phi"], 0.7)
    given = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    given["lm_head.bias"] += 1
    model.save_pretrained(tmp_path / "full", state_dict=given)
    again = plain(tmp_path / "full")
    torch.testing.assert_close(logits_of(again), logits_of(model) + 1, rtol=1e-4, atol=1e-5)
    assert len(layers_of(again)) == 5
