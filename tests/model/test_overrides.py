"""Fields of the recipient's configuration that a user sets: they reach the model, and a thin save keeps them."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from tests.helpers import (
    NUM_LAYERS,
    TOKENS,
    VOCABULARY,
    edit_json,
    layers_of,
    loaded,
    logits_of,
    make_family,
    randomised,
    refused,
    some_ids,
    tiny_llama_model,
    two_donors,
)
from transplant_hf import (
    AutoModelWithTransplant,
    CompatibilityError,
    ConfigurationError,
    TransplantConfig,
    transplant,
)
from transplant_hf.exporting import export
from transplant_hf.inspection import inspect
from transplant_hf.model.load_any_model import load_model
from transplant_hf.planning import plan

load = AutoModelWithTransplant.from_pretrained

SIZES: dict[str, Any] = {
    "num_hidden_layers": NUM_LAYERS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    **TOKENS,
}
SCALED: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, {"final_logit_softcapping": 2.0}),
    "granite": (GraniteForCausalLM, GraniteConfig, {"logits_scaling": 3.0, "embedding_multiplier": 2.0}),
    "cohere2": (Cohere2ForCausalLM, Cohere2Config, {"logit_scale": 0.5}),
}


def with_kwargs(folder: Path, fields: dict[str, Any]) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **fields)


def with_config(folder: Path, fields: dict[str, Any]) -> Any:
    config = AutoConfig.from_pretrained(folder)
    for name, value in fields.items():
        setattr(config, name, value)
    return AutoModelForCausalLM.from_pretrained(folder, config=config)


def with_config_kwargs(folder: Path, fields: dict[str, Any]) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, config=AutoConfig.from_pretrained(folder, **fields))


HOW: list[Callable[[Path, dict[str, Any]], Any]] = [with_kwargs, with_config, with_config_kwargs]


def written(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


# -- Reaching the model ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", HOW)
def test_fields_reach_the_model(tiny: Path, how: Any) -> None:
    fields = {"use_cache": False, "pad_token_id": 7, "output_hidden_states": True, "dtype": torch.bfloat16}
    model = how(tiny / "donor", fields)
    assert {name: getattr(model.config, name) for name in fields} == fields
    assert model.dtype == torch.bfloat16
    assert len(model.eval()(input_ids=some_ids()).hidden_states) == NUM_LAYERS + 3
    assert how(tiny / "donor", {"attn_implementation": "eager"}).config._attn_implementation == "eager"


def test_labels_reach_the_head(tiny_llama: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_llama / "donor", num_labels=4)
    load_head = AutoModelForSequenceClassification.from_pretrained
    assert load_head(tiny_llama / "donor", config=config).config.num_labels == 4
    config.num_labels = 5
    assert load_head(tiny_llama / "donor", config=config).config.num_labels == 5
    assert load_head(tiny_llama / "donor", config=config, num_labels=3).config.num_labels == 3


def test_a_keyword_argument_comes_before_the_configuration(tiny_gpt2: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_gpt2 / "donor")
    config.attn_pdrop, config.n_ctx = 0.5, 3
    model = load(tiny_gpt2 / "donor", config=config, attn_pdrop=0.25)
    assert (model.config.attn_pdrop, model.config.n_ctx) == (0.25, 3)


@pytest.mark.parametrize(
    "name", ["auto_map", "_name_or_path", "quantization_config", "to_dict", "transformers_weights"]
)
def test_what_is_no_field_of_a_model_is_refused(tiny_gpt2: Path, tmp_path: Path, name: str) -> None:
    """A file could otherwise name code, or other weights."""
    loaded(tiny_gpt2).save_pretrained(tmp_path / "thin", thin=True)
    edit_json(tmp_path / "thin" / "config.json", recipient_overrides={name: {"AutoConfig": "x.Y"}}, format_version=2)
    with refused(ConfigurationError, name, "cannot be set", "recipient_overrides"):
        load(tmp_path / "thin")


def test_overrides_must_be_fields(tmp_path: Path) -> None:
    with refused(ConfigurationError, "recipient_overrides", "['x']"):
        TransplantConfig(recipient="user/base", donors={"user/law": 1}, recipient_overrides=["x"])


# -- Reading the configuration of a donor ----------------------------------------------------------------------------


def test_other_tools_read_the_recipients_fields(tiny: Path) -> None:
    config = AutoConfig.from_pretrained(tiny / "donor")
    assert (config.hidden_size, config.vocab_size, config.num_attention_heads) == (32, VOCABULARY, 4)
    assert config.num_hidden_layers == NUM_LAYERS + 2
    plain = AutoConfig.from_pretrained(tiny / "recipient")
    assert config.max_position_embeddings == plain.max_position_embeddings
    assert config.eos_token_id == TOKENS["eos_token_id"]
    config.eos_token_id = [3, 4]
    assert config.eos_token_id == [3, 4]
    pickled = pickle.loads(pickle.dumps(config))  # noqa: S301
    for other in (copy.deepcopy(config), pickled):
        assert (other.recipient_overrides, other.hidden_size) == ({"eos_token_id": [3, 4]}, 32)
    assert TransplantConfig(**config.to_dict()).recipient_overrides == {"eos_token_id": [3, 4]}
    assert not {"hidden_size", "n_embd", "num_hidden_layers", "quantization_config"} & config.to_dict().keys()
    assert not hasattr(config, "quantization_config")
    assert not hasattr(config, "no_such_field")
    assert not hasattr(config, "layer_types")


def test_the_number_of_layers_is_of_those_that_run(tiny_llama: Path, tmp_path: Path) -> None:
    two_donors(tiny_llama).save_pretrained(tmp_path / "two", thin=True)
    assert AutoConfig.from_pretrained(tmp_path / "two").num_hidden_layers == 7
    loaded(tiny_llama, 1, mode="replace").save_pretrained(tmp_path / "replacing", thin=True)
    assert AutoConfig.from_pretrained(tmp_path / "replacing").num_hidden_layers == NUM_LAYERS


def test_what_is_not_at_hand_is_no_attribute(tiny_llama: Path) -> None:
    config = TransplantConfig(recipient="nobody/nothing", donors={"nobody/law": 1})
    with pytest.raises(AttributeError, match="hidden_size"):
        _ = config.hidden_size


def test_the_file_says_when_an_older_release_would_misread_it(tmp_path: Path) -> None:
    config = TransplantConfig(recipient="user/base", donors={"user/law": 1})
    config.save_pretrained(tmp_path)
    assert (written(tmp_path)["format_version"], "recipient_overrides" in written(tmp_path)) == (1, False)
    config.dtype, config.num_labels = torch.bfloat16, 3
    config.save_pretrained(tmp_path)
    assert written(tmp_path)["format_version"] == 2
    again = AutoConfig.from_pretrained(tmp_path)
    assert (again.dtype, again.num_labels, again.id2label[2]) == ("bfloat16", 3, "LABEL_2")


# -- Thin saves ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SCALED)
def test_a_thin_save_keeps_what_scales_logits(tmp_path: Path, kind: str) -> None:
    model_class, config_class, fields = SCALED[kind]
    family = make_family(tmp_path / kind, lambda seed, **more: randomised(model_class(config_class(**SIZES)), seed))
    plain = logits_of(load(family / "donor"))
    for number, how in enumerate((with_kwargs, with_config)):
        model = how(family / "donor", fields)
        wanted = logits_of(model)
        assert not torch.equal(wanted, plain)
        thin = tmp_path / f"thin{number}"
        model.save_pretrained(thin, thin=True)
        assert written(thin)["recipient_overrides"] == fields
        assert written(thin)["format_version"] == 2
        again = load(thin)
        assert torch.equal(logits_of(again), wanted)
        assert torch.equal(logits_of(load_model(thin)), wanted)
        again.save_pretrained(tmp_path / f"again{number}", thin=True)
        assert written(tmp_path / f"again{number}")["recipient_overrides"] == fields
    with again.disable_transplants():
        untouched = AutoModelForCausalLM.from_pretrained(family / "recipient", **fields)
        assert torch.equal(logits_of(again), logits_of(untouched))
    export(thin, tmp_path / "full")
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "full")), wanted)
    found = inspect(thin)
    assert any(next(iter(fields)) in note for note in found.notes)
    assert plan(thin).after.layers == NUM_LAYERS + 2


def test_what_is_set_on_the_model_is_kept_as_in_a_full_save(tiny: Path, tmp_path: Path) -> None:
    fields = {"pad_token_id": 7, "eos_token_id": [2, 5]}
    model = load(tiny / "donor")
    for name, value in fields.items():
        setattr(model.config, name, value)
    model.save_pretrained(tmp_path / "thin", thin=True)
    model.save_pretrained(tmp_path / "full")
    for folder in ("thin", "full"):
        config = load_model(tmp_path / folder).config
        assert {name: getattr(config, name) for name in fields} == fields


def test_a_transplant_format_keeps_them_too(inverse_gpt2: Path, tmp_path: Path) -> None:
    model = load(inverse_gpt2 / "donor")
    model.config.eos_token_id = 5
    model.save_pretrained(tmp_path / "full")
    assert load(tmp_path / "full").config.eos_token_id == 5


def test_how_a_model_is_run_is_not_kept(tiny: Path, tmp_path: Path) -> None:
    model = load(tiny / "donor", dtype=torch.bfloat16, attn_implementation="eager", use_cache=False)
    model.save_pretrained(tmp_path / "thin", thin=True)
    assert (written(tmp_path / "thin")["format_version"], "recipient_overrides" in written(tmp_path / "thin")) == (
        1,
        False,
    )


def test_another_donor_beside_keeps_them(tiny_llama: Path, tmp_path: Path) -> None:
    model = load(tiny_llama / "donor", bos_token_id=9)
    model.config.eos_token_id = 5
    more = transplant(model, str(tiny_llama / "donor"), position=3, name="other")
    assert (more.config.bos_token_id, more.config.eos_token_id) == (9, 5)
    more.save_pretrained(tmp_path / "thin", thin=True)
    assert written(tmp_path / "thin")["recipient_overrides"] == {"bos_token_id": 9, "eos_token_id": 5}


def test_changes_that_could_not_be_loaded_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    for field, value, facts in (
        ("vocab_size", 300, ("lm_head", "another shape")),
        ("hidden_act", "gelu", ("hidden_act", "does not fit")),
        ("rope_parameters", {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}, ("rope_parameters",)),
        ("num_hidden_layers", 3, ("num_hidden_layers", "describes all layers that run")),
    ):
        model = load(tiny_llama / "donor")
        setattr(model.config, field, value)
        with refused(ConfigurationError, field, *facts):
            model.save_pretrained(tmp_path / "thin", thin=True)
        assert not (tmp_path / "thin").exists()


def test_rope_scaling_of_the_recipient_alone_does_not_fit_a_donor(tiny_llama: Path) -> None:
    scaling = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    for how in HOW:
        with refused(CompatibilityError, "rope_parameters", "'factor': 2.0"):
            how(tiny_llama / "donor", {"rope_parameters": scaling})


def test_a_small_change_in_a_wider_layer_is_a_change(tmp_path: Path) -> None:
    family = make_family(tmp_path / "llama", lambda seed, **more: tiny_llama_model(seed).to(torch.bfloat16))
    model = load(family / "donor", dtype=torch.bfloat16)
    layer = layers_of(model)[0].float()
    model.save_pretrained(tmp_path / "thin", thin=True)
    with torch.no_grad():
        layer.mlp.up_proj.weight.mul_(1.001)
    rounded = layer.mlp.up_proj.weight.to(torch.bfloat16)
    assert torch.equal(
        rounded, load(family / "donor", dtype=torch.bfloat16).state_dict()["model.layers.0.mlp.up_proj.weight"]
    )
    with refused(ConfigurationError, "model.layers.0.mlp.up_proj.weight", "changed recipient weights"):
        model.save_pretrained(tmp_path / "again", thin=True)


@pytest.mark.parametrize(
    "overrides",
    [
        {"dtype": "Tensor"},
        {"id2label": 5},
        {"num_hidden_layers": 10**9},
        {"num_labels": "x"},
        {"per_layer_config": 5},
        {"rope_parameters": 5},
        {"sub_configs": {}},
        {"to_dict": 1},
        {"dict_dtype_to_str": 5},
        {"torch_dtype": "load"},
        {"torch_dtype": "nn"},
    ],
)
def test_what_a_configuration_cannot_hold_is_refused(family: Path, overrides: dict[str, Any]) -> None:
    """Whether it is a method, a layer count or a value of a wrong type."""
    edit_json(family / "donor" / "config.json", recipient_overrides=overrides, format_version=2)
    name = next(iter(overrides)).removeprefix("torch_")
    with refused(ConfigurationError, name):
        AutoModelForCausalLM.from_pretrained(family / "donor")


def test_another_number_of_layers_is_not_saved_thin(tiny_llama: Path, tmp_path: Path) -> None:
    """It could not be loaded again."""
    model = load(tiny_llama / "recipient", donors={str(tiny_llama / "donor"): 1}, num_hidden_layers=NUM_LAYERS - 1)
    with refused(ConfigurationError, f"num_hidden_layers={NUM_LAYERS - 1}"):
        model.save_pretrained(tmp_path / "thin", thin=True)


def test_a_field_that_is_deleted_is_the_recipients_again(tiny_llama: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_llama / "donor")
    before = config.to_dict(), config.pad_token_id
    config.pad_token_id, config.use_cache = 7, False
    del config.pad_token_id, config.use_cache
    assert (config.to_dict(), config.pad_token_id) == before
    with pytest.raises(AttributeError):
        del config.never_set
