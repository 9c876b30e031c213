"""Bytes of cache, against caches that a forward pass has really filled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Cache

from tests.architectures.tiny_models import CANNOT_BUILD, CAUSAL_LM_TYPES, NOT_DECODER_ONLY, tiny_model
from tests.helpers import DONOR_POSITION, loaded, plain, some_ids
from transplant_hf.architecture import Anatomy
from transplant_hf.planning import Plan, plan
from transplant_hf.planning.cache import layer_caches

# Models that do not run on the meta device, because they decide by values of tensors, or that keep their state in a
# class of their own.
# fmt: off
UNKNOWN = [
    "bart", "biogpt", "blenderbot", "blenderbot-small", "blt", "dbrx", "emu3", "gemma4", "gemma4_unified", "jetmoe",
    "longcat_flash", "marian", "mbart", "minimax", "modernbert-decoder", "moshi", "musicgen", "musicgen_melody",
    "openai-gpt", "pegasus", "plbart", "qwen4_exp", "qwen4_exp_text", "recurrent_gemma", "reformer", "rwkv", "xlm",
    "xlnet", "xlstm", "xmod",
]
# fmt: on
TYPES = sorted(set(CAUSAL_LM_TYPES) - set(CANNOT_BUILD) - set(NOT_DECODER_ONLY) - {"hrm_text"})
CHOSEN = ["deepseek_v3", "falcon_h1", "gemma3_text", "mamba", "mixtral", "qwen3_next", "rwkv"]


def planned(family: Path, **kwargs: Any) -> Plan:
    return plan(family / "recipient", {str(family / "donor"): DONOR_POSITION}, **kwargs)


@torch.no_grad()
def sizes(model: Any, batch: int, context: int) -> list[int]:
    """Bytes in each layer of a cache."""
    output = model(some_ids(batch, context) % 6 + 3, use_cache=True)
    cache = next(value for value in output.values() if isinstance(value, Cache))
    cache = getattr(cache, "self_attention_cache", cache)
    return [sum(map(_bytes_in, vars(layer).values())) for layer in cache.layers]


def _bytes_in(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size() if value.dim() > 1 else 0
    if isinstance(value, dict):
        return sum(map(_bytes_in, value.values()))
    return sum(map(_bytes_in, value)) if isinstance(value, list | tuple) else 0


@pytest.mark.parametrize(("batch", "context"), [(1, 3), (2, 13)])
def test_the_cache_is_that_of_a_forward_pass(tiny: Path, batch: int, context: int) -> None:
    found = planned(tiny, batch_size=batch, context=context)
    for cost, model in ((found.before, plain(tiny / "recipient")), (found.after, loaded(tiny))):
        filled = sizes(model, batch, context)
        assert cost.cache_bytes == sum(filled)
        for kind in cost.cache:
            assert kind.total == sum(filled[number] for number in kind.layers)


def test_cache_of_one_more_token(tiny_gpt_oss: Path) -> None:
    found, model = planned(tiny_gpt_oss, context=13).after, loaded(tiny_gpt_oss)
    # Past the window of 4 only layers with full attention grow.
    assert found.cache_per_token == sum(sizes(model, 1, 14)) - sum(sizes(model, 1, 13))
    assert [(kind.kind, len(kind.layers)) for kind in found.cache] == [
        ("sliding attention, window 4", 3),
        ("full attention", 3),
    ]
    short = planned(tiny_gpt_oss, context=2).after
    assert short.cache_per_token == sum(sizes(model, 1, 3)) - sum(sizes(model, 1, 2))


def test_the_cache_has_the_dtype_of_the_model(tiny_llama: Path) -> None:
    whole, half = planned(tiny_llama, dtype="float32").after, planned(tiny_llama, dtype="bfloat16").after
    assert whole.cache_bytes == 2 * (half.cache_bytes or 0) > 0


def _check(model_type: str, context: int = 13) -> None:
    model = tiny_model(model_type)
    layers = layer_caches(Anatomy(type(model), model.config), context)
    assert isinstance(layers, str) == (model_type in UNKNOWN), layers
    if not isinstance(layers, str):
        assert [layer.total for layer in layers] == sizes(model, 1, context)


@pytest.mark.parametrize("model_type", CHOSEN)
def test_one_of_each_kind(model_type: str) -> None:
    _check(model_type)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [name for name in TYPES if name not in CHOSEN])
def test_every_type(model_type: str) -> None:
    _check(model_type)


def test_states_of_constant_size() -> None:
    model = tiny_model("mamba")
    short, long = (layer_caches(Anatomy(type(model), model.config), length) for length in (5, 500))
    assert not isinstance(short, str)
    assert short == long
    assert {(layer.kind, layer.per_token, layer.next_token) for layer in short} == {("recurrent", 0, 0)}


def test_an_unknown_cache_is_reported(tmp_path: Path) -> None:
    tiny_model("rwkv").save_pretrained(tmp_path)
    found = plan(tmp_path, count=1, devices=2, memory="1GiB")
    assert found.after.cache_bytes is None
    assert found.after.cache == ()
    assert found.after.notes == ("the cache is not known: RwkvForCausalLM keeps its state in a class of its own",)
    assert "unknown" in str(found)
    assert found.to_dict()["after"]["cache_bytes"] is None
