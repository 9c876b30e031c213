"""Full-precision donors in quantized recipients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.base import get_keys_to_not_convert

from tests.helpers import (
    loaded,
    logits_of,
    make_family,
    pack_experts,
    plain,
    some_ids,
    tiny_gpt2_model,
    tiny_gpt_oss_model,
    tiny_llama_model,
)
from transplant_hf.splice.quantized import _kept_by_default


@pytest.fixture(scope="module")
def mxfp4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-OSS family whose recipient holds its experts as MXFP4 blocks and scales, its donor in bf16."""

    def build(**fields: Any) -> Any:
        return tiny_gpt_oss_model(hidden_size=64, intermediate_size=64, **fields).bfloat16()

    folder = make_family(tmp_path_factory.mktemp("mxfp4"), build)
    pack_experts(folder / "recipient")
    return folder


def test_mxfp4_recipient_with_a_dequantized_donor(mxfp4: Path) -> None:
    model, untouched, source = loaded(mxfp4), plain(mxfp4 / "recipient"), plain(mxfp4 / "source")
    layers = model.model.layers
    assert model.config.layer_types == [
        "sliding_attention",
        "full_attention",
        "sliding_attention",
        "full_attention",
        "sliding_attention",
        "full_attention",
    ]
    for number, origin in ((1, source.model.layers[1]), (2, source.model.layers[2]), (3, untouched.model.layers[1])):
        assert torch.equal(layers[number].mlp.experts.gate_up_proj, origin.mlp.experts.gate_up_proj)
        assert layers[number].self_attn.sliding_window == origin.self_attn.sliding_window
    with model.disable_transplants():
        assert torch.equal(logits_of(model), logits_of(untouched))


def test_dequantized_models_are_saved_under_plain_names(mxfp4: Path, tmp_path: Path) -> None:
    """Transformers itself writes dequantized experts under the names of packed ones."""
    model = loaded(mxfp4)
    for name, thin in (("full", False), ("thin", True)):
        model.save_pretrained(tmp_path / name, thin=thin)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert torch.equal(logits_of(again), logits_of(model))


@pytest.fixture(scope="module")
def torchao_family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama family, with the recipient saved as int8 besides."""
    pytest.importorskip("torchao")
    folder = make_family(tmp_path_factory.mktemp("torchao"), tiny_llama_model)
    plain(folder / "recipient", quantization_config=_int8()).save_pretrained(folder / "int8")
    return folder


def _int8() -> object:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def test_quantizing_while_loading_covers_the_donor(torchao_family: Path, tmp_path: Path) -> None:
    loaded(torchao_family).save_pretrained(tmp_path / "whole")
    whole = plain(tmp_path / "whole", quantization_config=_int8())
    spliced = loaded(torchao_family, quantization_config=_int8())
    assert torch.equal(logits_of(spliced), logits_of(whole))
    with spliced.disable_transplants():
        untouched = plain(torchao_family / "recipient", quantization_config=_int8())
        assert torch.equal(logits_of(spliced), logits_of(untouched))


def test_a_recipient_saved_as_int8_keeps_its_donor_in_full_precision(torchao_family: Path) -> None:
    from transplant_hf import AutoModelWithTransplant

    model = AutoModelWithTransplant.from_pretrained(torchao_family / "int8", donors={str(torchao_family / "donor"): 1})
    source = plain(torchao_family / "source")
    weight = model.model.layers[2].mlp.up_proj.weight
    assert type(weight) is torch.nn.Parameter
    assert torch.equal(weight, source.model.layers[2].mlp.up_proj.weight)
    assert type(model.model.layers[3].mlp.up_proj.weight) is not torch.nn.Parameter
    with model.disable_transplants():
        assert torch.equal(logits_of(model), logits_of(plain(torchao_family / "int8")))
    assert model.generate(some_ids(), max_new_tokens=3, do_sample=False).shape == (2, 15)


@pytest.mark.parametrize("make", [tiny_gpt2_model, tiny_llama_model])
def test_modules_that_quantizers_keep_by_default(make: Callable[[int], PreTrainedModel]) -> None:
    """The same as Transformers' own choice."""
    assert set(_kept_by_default(make(0))) == set(get_keys_to_not_convert(make(0)))
