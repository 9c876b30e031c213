"""Names of Transformers that nobody promises and the package leans on: a test fails, and says where, when one changes.

`release/watched_names.py` lists them. One that is used and not listed fails, and so does one that is listed and no
longer used.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    DynamicCache,
    DynamicLayer,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    StaticCache,
    Trainer,
    TrainingArguments,
    WeightConverter,
)
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.modeling_utils import LoadStateDictConfig, LoadStateDictInfo, load_state_dict
from transformers.utils.output_capturing import _active_collector, maybe_install_capturing_hooks

from tests.helpers import tiny_gpt_oss_model, tiny_llama_model
from tests.release.names_used import names_used, private_names_of
from tests.release.watched_names import NOT_THEIRS, SIGNED, WATCHED
from transplant_hf import TransplantConfig
from transplant_hf.architecture.follow import RUNTIME
from transplant_hf.registration import TransplantForCausalLM

PACKAGE = Path(__file__).resolve().parents[1] / "transplant_hf"


SIGNATURES: list[tuple[Callable[..., Any], str, str]] = [
    (
        PreTrainedModel._load_pretrained_model,
        "(model, state_dict, checkpoint_files, load_config, expected_keys)",
        "model/native_methods.py, model/load_weights.py",
    ),
    (PreTrainedModel._finalize_model_loading, "(model, load_config, loading_info)", "model/native_methods.py"),
    (PreTrainedModel._from_config, "(config, **kwargs)", "model/load.py"),
    (
        rename_source_key,
        "(source_key, weight_renamings, weight_converters, base_model_prefix, meta_state_dict, reverse)",
        "architecture/names.py",
    ),
    (revert_weight_conversion, "(model, state_dict)", "donor/extract.py"),
    (convert_moe_packed_tensors, "(blocks, scales, dtype, rows_per_chunk)", "donor/tensors.py"),
    (get_model_conversion_mapping, "(model, key_mapping, hf_quantizer, add_legacy)", "architecture/names.py"),
    (
        PreTrainedModel.get_init_context.__func__,  # type: ignore[attr-defined]
        "(cls, dtype, is_quantized, _is_ds_init_called, allow_all_kernels)",
        "architecture/build.py, model/native_methods.py",
    ),
    (PreTrainedModel.initialize_weights, "(self)", "architecture/build.py, model/native_methods.py"),
    (maybe_install_capturing_hooks, "(model)", "model/active_donors.py"),
    (load_state_dict, "(checkpoint_file, map_location, weights_only, disable_mmap)", "splice/weights.py"),
    (
        get_class_from_dynamic_module,
        "(class_reference, pretrained_model_name_or_path, cache_dir, force_download, proxies, token, revision, "
        "local_files_only, repo_type, code_revision, **kwargs)",
        "architecture/recipient.py",
    ),
    (Trainer._load_from_checkpoint, "(self, resume_from_checkpoint, model)", "training/part_trainer.py"),
    (Trainer._load_best_model, "(self)", "training/part_trainer.py"),
    (Trainer._save_optimizer_and_scheduler, "(self, output_dir)", "training/part_trainer.py"),
    (Trainer._load_optimizer_and_scheduler, "(self, checkpoint)", "training/part_trainer.py"),
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


def test_parts_of_the_server() -> None:
    """`serving/server.py` overrides these; tests/serving/test_server.py runs them."""
    pytest.importorskip("fastapi")
    pytest.importorskip("openai")
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.utils import GenerateManager, GenerationState

    from transplant_hf.serving.server import DonorModels

    overridden = {name for name in vars(DonorModels) if not name.startswith("_")} - {"donors", "choice", "check_donor"}
    assert len(overridden & {"list_models", "get_gen_models"} & set(vars(ModelManager))) == 1  # 5.24 renamed it
    assert overridden - {"list_models", "get_gen_models"} <= set(vars(ModelManager))
    assert list(inspect.signature(GenerationState.get_manager).parameters) == ["self", "model_id", "use_cb"]
    assert callable(GenerateManager.submit)
    parameters = list(inspect.signature(build_server).parameters)
    assert parameters[0] == "model_manager"
    assert {"chat_handler", "completion_handler", "response_handler", "generation_state"} <= set(parameters)


def test_what_a_model_is_built_under() -> None:
    """`thread_contexts` of architecture/build.py has a counterpart for these, and lets the others be."""
    contexts = PreTrainedModel.get_init_context(torch.float32, False, False, None)
    names = [getattr(getattr(context, "func", None), "__name__", str(context)) for context in contexts]
    assert names == ["local_torch_dtype", "no_tie_weights", "apply_patches", "meta", "meta_device_safe_creation_ops"]


def test_loaded_tensors_are_marked(tmp_path: Path) -> None:
    """Transformers' mark keeps what was loaded from being initialized again."""
    tiny_llama_model(0).save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    assert all(getattr(parameter, "_is_hf_initialized", False) for parameter in model.parameters())


def test_adapters_that_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The model class is told of an adapter in `adapter_kwargs`, by a name of their own."""
    peft = pytest.importorskip("peft")
    tiny_llama_model(0).save_pretrained(tmp_path / "model")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path / "adapter")
    found: dict[str, Any] = {}
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", lambda *_, **kwargs: found.update(kwargs))
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert found["adapter_kwargs"]["_adapter_model_path"] == tmp_path / "adapter"


def test_hooks_into_loading_are_static() -> None:
    for name in ("_load_pretrained_model", "_finalize_model_loading"):
        assert isinstance(inspect.getattr_static(PreTrainedModel, name), staticmethod), (
            f"PreTrainedModel.{name} is no longer a static method: model/native_methods.py overrides it as one."
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
        f"from_pretrained called {called}: model/native_methods.py steps in at both."
    )


def test_the_load_config_has_the_fields_that_are_read() -> None:
    fields = {field.name for field in dataclasses.fields(LoadStateDictConfig)}
    read = {"weight_mapping", "disable_mmap", "weights_only", "sharded_metadata"}
    assert read <= fields, f"LoadStateDictConfig lacks {read - fields}: model/load_weights.py reads them."


def test_loading_info_has_the_fields_that_are_read(tmp_path: Any) -> None:
    tiny_llama_model(0).save_pretrained(tmp_path)
    _, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert {"missing_keys", "unexpected_keys", "mismatched_keys"} <= set(info)
    fields = {field.name for field in dataclasses.fields(LoadStateDictInfo)}
    read = {"missing_keys", "unexpected_keys", "mismatched_keys", "conversion_errors"}
    assert read <= fields, f"LoadStateDictInfo lacks {read - fields}: model/load_weights.py reads them."


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
        "model/active_donors.py reads _output_capturing_hooks_installed to know whether layers are recorded."
    )
    for layer in model.model.layers:
        hooks = [hook for part in layer.modules() for hook in part._forward_hooks.values()]
        assert {hook.__module__ for hook in hooks} == {maybe_install_capturing_hooks.__module__}, (
            "model/active_donors.py knows the hooks of recorded layers by their module."
        )


def test_what_a_call_records() -> None:
    """model/rows.py reads it."""
    model, seen = tiny_llama_model(0), []
    model.model.layers[0].register_forward_hook(lambda *_: seen.append({*_active_collector.get()}))
    for arguments in ({}, {"output_attentions": True}, {"output_hidden_states": [1]}):
        model(torch.ones(1, 2, dtype=torch.long), **arguments)
    assert seen == [set(), {"attentions"}, {"hidden_states", "_hidden_states_layers"}], seen


def test_cache_layers_that_hold_rows() -> None:
    """model/rows.py has a subclass of each kind of layer, and all operations on rows."""
    for build in (tiny_llama_model, tiny_gpt_oss_model):
        kinds = {type(layer) for layer in DynamicCache(config=build(0).config).layers}
        assert kinds <= {DynamicLayer, DynamicSlidingWindowLayer}
    operations = {name for name in vars(DynamicCache.__base__) if re.match("batch_|reorder|crop|reset", name)}
    assert operations == {
        "batch_repeat_interleave", "batch_select_indices", "batch_size", "crop", "reorder_cache", "reset"
    }  # fmt: skip


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


def test_what_every_configuration_keeps_to_itself() -> None:
    """architecture/follow.py carries it over; what else is private belongs to the layers."""
    config = LlamaConfig(
        num_hidden_layers=2, per_layer_config={0: {"intermediate_size": 64}},
        name_or_path="user/model", attn_implementation="eager", experts_implementation="eager",
    )  # fmt: skip
    run = {name: value for name, value in vars(config).items() if name in RUNTIME}
    assert {"user/model", "eager"} <= {value for value in run.values() if isinstance(value, str)}
    assert any(name.startswith("_") and name not in RUNTIME for name in vars(config)), "where are the fields by layer?"
    assert (config._attn_implementation, config._experts_implementation) == ("eager", "eager")


def test_models_have_the_attributes_that_are_read() -> None:
    model = tiny_llama_model(0)
    assert isinstance(model.all_tied_weights_keys, dict)
    assert model.base_model_prefix == "model"
    assert model._hf_peft_config_loaded is False
    assert hasattr(type(model), "_keys_to_ignore_on_load_unexpected")


def test_a_loaded_model_keeps_its_rules(tmp_path: Path) -> None:
    """model/load.py, in_memory.py and save_parts.py read the rules that saving reverts."""
    tiny_llama_model(0).save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded._weight_conversions, list | tuple)


def test_auto_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an Auto class adds of its own to the arguments of a registered class has a private name, and is left out."""
    TransplantConfig(recipient="anything").save_pretrained(tmp_path)
    kwargs: dict[str, Any] = {}
    monkeypatch.setattr(TransplantForCausalLM, "from_pretrained", lambda *_, **given: kwargs.update(given))
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    added = {name for name in kwargs if not name.startswith("_")}
    assert added <= {"adapter_kwargs", "config", "revision", "trust_remote_code"}, (
        f"the Auto classes add {added}: model/load.py"
    )


def test_checkpointed_layers() -> None:
    """model/live.py copies these to the layers of a donor that is added later."""
    model = tiny_llama_model(0).train()
    model.gradient_checkpointing_enable()
    for layer in model.model.layers:
        assert layer.gradient_checkpointing
        assert any(isinstance(value, functools.partial) for value in vars(layer).values())


# -- The list is whole ---------------------------------------------------------------------------------------------


def test_every_name_that_is_used_is_watched() -> None:
    owners = (
        *(PreTrainedModel, PreTrainedConfig, Trainer, TrainingArguments, transformers.TrainerCallback),
        *(transformers.Cache, DynamicCache, transformers.GenerationConfig, transformers.AutoModelForCausalLM),
    )
    used = names_used(PACKAGE, private_names_of(owners) - NOT_THEIRS.keys())
    used = {name: files for name, files in used.items() if not name.startswith("_transplant")}
    unwatched = {name: files for name, files in used.items() if name not in WATCHED and name not in NOT_THEIRS}
    assert not unwatched, (
        f"{unwatched}: names of Transformers that it does not promise to keep. Use a public one; or add each to "
        "WATCHED in tests/release/watched_names.py, with its reason and a test that fails when it changes"
    )
    stale = WATCHED.keys() - used.keys()
    assert not stale, f"{sorted(stale)} are no longer used: take them out of WATCHED"


def test_every_watched_name_has_its_test() -> None:
    signed = {function.__name__ for function, _, _ in SIGNATURES}
    for name, watched in WATCHED.items():
        assert callable(globals().get(watched.test)), f"{name}: there is no {watched.test}"
        assert watched.reason
        if watched.test == SIGNED:
            assert name in signed, f"{name} has no line in SIGNATURES"


def test_the_search_sees_it(tmp_path: Path) -> None:
    (tmp_path / "room.py").write_text(
        "from transformers import LlamaConfig, _hidden\n"
        "from transformers.utils import logging\n"
        "from transformers.modeling_utils import load_state_dict\n"
        "import transformers.trainer\n"
        "class Mine:\n"
        "    def _save(self): self._own = self.config._theirs\n"
        "    def _apart(self): return self._own, self._apart, getattr(self, '_by_name')\n"
    )
    found = names_used(tmp_path, {"_save"})
    wanted = ["_by_name", "_hidden", "_save", "_theirs", "load_state_dict", "transformers.trainer"]
    assert sorted(found) == wanted
    assert found["_save"] == ["room.py"]
