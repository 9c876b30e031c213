"""Models are built as Transformers builds them, and no other thread notices."""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
)
from transformers.initialization import no_init_weights

from tests.architectures.tiny_models import tiny_config
from transplant_hf.architecture.build import build_on_meta, construction, initialize


def _llava() -> PreTrainedConfig:
    """A model that builds two others inside, each by its own configuration."""
    small: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    vision = {"model_type": "clip_vision_model", "image_size": 8, "patch_size": 4, **small}
    return LlavaConfig(vision_config=vision, text_config={"model_type": "llama", "vocab_size": 32, **small})


# Rotary, tied and with a float32 buffer; a recurrent state; a position table in torch's default dtype; an activation
# that asks for the model's dtype; and models inside a model.
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    **{name: lambda name=name: tiny_config(name) for name in ("llama", "gpt2", "mamba", "xglm", "apertus")},  # type: ignore[misc]
    "llava": _llava,
}


def _class_of(config: PreTrainedConfig) -> Any:
    return (
        LlavaForConditionalGeneration
        if isinstance(config, LlavaConfig)
        else AutoModelForCausalLM._model_mapping[type(config)]
    )


@dataclasses.dataclass
class Look:
    """What can be seen of a model on the meta device."""

    tensors: dict[str, Any]
    number: int
    tied: dict[str, str]


def _look(model: Any) -> Look:
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    tensors = {name: (type(one), one.dtype, one.shape, one.device.type, one.requires_grad) for name, one in named}
    return Look(tensors, len({id(one) for _, one in named}), dict(model.all_tied_weights_keys))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, None])
@pytest.mark.parametrize("name", CONFIGS)
def test_built_as_transformers_builds(name: str, dtype: torch.dtype | None) -> None:
    config = CONFIGS[name]()
    config.dtype = dtype
    model_class = _class_of(config)
    with torch.device("meta"), no_init_weights():
        wanted = model_class._from_config(copy.deepcopy(config))
    assert _look(build_on_meta(model_class, config)) == _look(wanted)


def test_nothing_is_set_for_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []
    monkeypatch.setattr(torch, "set_default_dtype", called.append)
    config = _llava()
    config.dtype = torch.bfloat16
    functions, tie = dict(vars(nn.init)), LlavaForConditionalGeneration.tie_weights
    seen: list[Any] = []

    class Watching(LlavaForConditionalGeneration):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            seen.append((dict(vars(nn.init)) == functions, LlavaForConditionalGeneration.tie_weights is tie))

    model = build_on_meta(Watching, config)
    assert seen == [(True, True)] and not called
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config.text_config.dtype is torch.bfloat16


def test_other_threads_build_as_ever() -> None:
    built: list[torch.Tensor] = []
    with construction(torch.bfloat16):
        thread = threading.Thread(target=lambda: built.append(nn.Linear(4, 4).weight.detach()))
        thread.start()
        thread.join()
        assert nn.Linear(4, 4).weight.dtype is torch.bfloat16
    assert built[0].dtype is torch.float32 and built[0].device.type == "cpu" and 0 < float(built[0].std()) < 1


def test_only_what_decides_no_dtype_gets_the_default() -> None:
    with construction(torch.bfloat16):
        default = [
            torch.ones(2),
            torch.tensor(1.5),
            torch.full((2,), 0.5),
            torch.arange(0.0, 1.0, 0.5),
            torch.arange(2) / 2,
        ]
        said = [
            torch.ones(2, dtype=torch.float32),
            torch.arange(2).float(),
            torch.arange(2).to(torch.float32) / 2,
            torch.stack([torch.ones(2, dtype=torch.float32)]),
        ]
        assert torch.arange(2).dtype is torch.int64
    assert {tensor.dtype for tensor in default} == {torch.bfloat16}
    assert {tensor.dtype for tensor in said} == {torch.float32}


def test_no_whole_numbers() -> None:
    with pytest.raises(ValueError, match="floating-point"), construction(torch.int8):
        pass


def test_initialize_leaves_what_is_marked() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16, n_positions=8))
    marked: Any = model.transformer.wte.weight
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for module in model.modules():
        module.__dict__.pop("_is_hf_initialized", None)
    marked._is_hf_initialized = True
    functions = dict(vars(nn.init))
    initialize(model, GPT2LMHeadModel)
    assert dict(vars(nn.init)) == functions
    after = dict(model.named_parameters())
    assert torch.equal(after["transformer.wte.weight"], before["transformer.wte.weight"])
    assert not torch.equal(after["transformer.wpe.weight"], before["transformer.wpe.weight"])


def test_initialize_leaves_views_of_what_is_marked() -> None:
    """As when a row for padding is set to zero."""

    class Slicing(LlamaForCausalLM):
        def _init_weights(self, module: nn.Module) -> None:
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.weight[0])
                nn.init.orthogonal_(module.weight)

    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=16)
    model = Slicing(config)
    weight: Any = nn.Parameter(torch.ones(16, 8))
    weight._is_hf_initialized = True
    model.lm_head.weight = weight
    for module in model.modules():
        module.__dict__.pop("_is_hf_initialized", None)
    initialize(model, Slicing)
    assert torch.equal(model.lm_head.weight, torch.ones(16, 8))
