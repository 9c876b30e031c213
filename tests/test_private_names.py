"""Private names of Transformers that the package leans on: a test fails, and says where to look, when one changes."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    StaticCache,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.initialization import no_init_weights
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import LoadStateDictConfig, LoadStateDictInfo, load_state_dict
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from tests.helpers import tiny_llama_model

SIGNATURES: list[tuple[Callable[..., Any], str, str]] = [
    (
        PreTrainedModel._load_pretrained_model,
        "(model, state_dict, checkpoint_files, load_config, expected_keys)",
        "model/mixin.py, model/loading.py",
    ),
    (PreTrainedModel._finalize_model_loading, "(model, load_config, loading_info)", "model/mixin.py"),
    (PreTrainedModel._from_config, "(config, **kwargs)", "architecture/build.py, model/auto.py"),
    (
        rename_source_key,
        "(source_key, weight_renamings, weight_converters, base_model_prefix, meta_state_dict, reverse)",
        "architecture/names.py",
    ),
    (revert_weight_conversion, "(model, state_dict)", "donor/extract.py"),
    (get_model_conversion_mapping, "(model, key_mapping, hf_quantizer, add_legacy)", "architecture/names.py"),
    (no_init_weights, "()", "architecture/build.py"),
    (maybe_install_capturing_hooks, "(model)", "model/switch.py"),
    (load_state_dict, "(checkpoint_file, map_location, weights_only, disable_mmap)", "splice/weights.py"),
]


@pytest.mark.parametrize(
    ("function", "known", "used_in"), SIGNATURES, ids=lambda value: getattr(value, "__name__", None)
)
def test_signature(function: Callable[..., Any], known: str, used_in: str) -> None:
    parameters = inspect.signature(function).parameters.values()
    stars = {inspect.Parameter.VAR_KEYWORD: "**", inspect.Parameter.VAR_POSITIONAL: "*"}
    found = f"({', '.join(stars.get(parameter.kind, '') + parameter.name for parameter in parameters)})"
    assert found == known, (
        f"Transformers {transformers.__version__} changed the private {function.__qualname__}: it takes {found}, "
        f"transplant_hf was written for {known}. Look at transplant_hf/{used_in}."
    )


def test_hooks_into_loading_are_static() -> None:
    for name in ("_load_pretrained_model", "_finalize_model_loading"):
        assert isinstance(inspect.getattr_static(PreTrainedModel, name), staticmethod), (
            f"PreTrainedModel.{name} is no longer a static method: model/mixin.py overrides it as one."
        )
        assert name not in vars(GPT2LMHeadModel)


def test_from_pretrained_goes_through_the_hooks(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """A renamed step would leave the signature and never be called."""
    tiny_llama_model(0).save_pretrained(tmp_path)
    called: list[str] = []
    for name in ("_load_pretrained_model", "_finalize_model_loading"):
        original = getattr(PreTrainedModel, name)

        def counted(*args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
            called.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(PreTrainedModel, name, staticmethod(counted))
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert called == ["_load_pretrained_model", "_finalize_model_loading"], (
        f"from_pretrained called {called}: model/mixin.py steps in at both."
    )


def test_the_load_config_has_the_fields_that_are_read() -> None:
    fields = {field.name for field in dataclasses.fields(LoadStateDictConfig)}
    read = {"weight_mapping", "disable_mmap", "weights_only", "sharded_metadata"}
    assert read <= fields, f"LoadStateDictConfig lacks {read - fields}: model/loading.py reads them."


def test_loading_info_has_the_fields_that_are_read(tmp_path: Any) -> None:
    tiny_llama_model(0).save_pretrained(tmp_path)
    _, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert {"missing_keys", "unexpected_keys", "mismatched_keys"} <= set(info)
    fields = {field.name for field in dataclasses.fields(LoadStateDictInfo)}
    read = {"missing_keys", "unexpected_keys", "mismatched_keys", "conversion_errors"}
    assert read <= fields, f"LoadStateDictInfo lacks {read - fields}: model/loading.py reads them."


def test_rules_of_renaming() -> None:
    config = MixtralConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
        vocab_size=16, num_local_experts=2,
    )  # fmt: skip
    with torch.device("meta"):
        model = MixtralForCausalLM(config)
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    assert len(renamings) + len(converters) == len(rules), "a third kind of rule: architecture/names.py knows two."
    assert converters
    assert all(rule.target_patterns for rule in converters), "names.py reads WeightConverter.target_patterns."
    name = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    new, pattern = rename_source_key(name, renamings, converters)
    assert new == "model.layers.0.mlp.experts.gate_up_proj", new
    assert pattern is not None, "names.py takes a pattern for the sign that a tensor is fused or split."
    assert rename_source_key("model.norm.weight", renamings, converters) == ("model.norm.weight", None)


def test_reverting_takes_the_conversions_of_a_model_that_was_not_loaded() -> None:
    model = tiny_llama_model(0)
    state = {"model.layers.0.mlp.up_proj.weight": torch.ones(2)}
    assert list(revert_weight_conversion(model, state)) == list(state)


def test_the_capturing_hooks_leave_their_mark() -> None:
    model = tiny_llama_model(0)
    maybe_install_capturing_hooks(model.model)
    assert getattr(model.model, "_output_capturing_hooks_installed", False), (
        "model/switch.py reads _output_capturing_hooks_installed to know which layers are recorded."
    )


@pytest.mark.parametrize("method", ["update", "get_mask_sizes"])
def test_caches_are_used_through_the_guarded_methods(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """model/cache_guard.py watches these."""
    calls = []
    original = getattr(DynamicCache, method)
    monkeypatch.setattr(DynamicCache, method, lambda *a, **k: (calls.append(method), original(*a, **k))[1])
    model = tiny_llama_model(0)
    model(torch.ones(1, 2, dtype=torch.long), past_key_values=DynamicCache(config=model.config))
    assert calls, f"a forward pass no longer calls Cache.{method}."


def test_cache_layers_say_whether_they_hold_anything() -> None:
    model = tiny_llama_model(0)
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=4)):
        assert all(getattr(layer, "is_initialized", None) is False for layer in cache.layers)
        model(torch.ones(1, 2, dtype=torch.long), past_key_values=cache)
        assert all(layer.is_initialized for layer in cache.layers)


def test_layers_can_be_told_from_other_lists() -> None:
    """architecture/stack.py finds decoder layers by this class."""
    model = tiny_llama_model(0)
    assert all(isinstance(layer, GradientCheckpointingLayer) for layer in model.model.layers)


def test_fields_of_configurations_that_are_read() -> None:
    config = LlamaConfig()
    assert hasattr(config, "sub_configs")
    assert config.get_text_config(decoder=True) is config
    assert "_attn_implementation_internal" in vars(GPT2Config(attn_implementation="eager"))
    assert hasattr(transformers.AutoModelForCausalLM, "_model_mapping"), "model/auto.py reads it."


def test_models_have_the_attributes_that_are_read() -> None:
    model = tiny_llama_model(0)
    assert isinstance(model.all_tied_weights_keys, dict)
    assert hasattr(type(model), "_keys_to_ignore_on_load_unexpected")
    assert model.base_model_prefix == "model"
