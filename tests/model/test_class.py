"""What comes back from loading: the recipient's own class, for every head, with or without weights."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
)

from tests.helpers import (
    NUM_LAYERS,
    copied,
    edit_json,
    generated,
    layers_of,
    loaded,
    logits_of,
    some_ids,
)
from transplant_hf import AutoModelWithTransplant, DonorSpec, LayerMap, TransplantConfig, remove_transplants

load = AutoModelWithTransplant.from_pretrained


# -- What comes back -----------------------------------------------------------------------------------------------


def test_every_way_to_load_one_transplant(tiny: Path) -> None:
    donor = tiny / "donor"
    models = [
        AutoModelForCausalLM.from_pretrained(donor),
        load(donor),
        load(str(donor)),
        load(tiny / "recipient", donors={str(donor): 1}),
        load(tiny / "recipient", donors=[DonorSpec(str(donor), 1)]),
        load(tiny / "recipient", donors=[{"donor": str(donor), "position": 1}]),
        load(tiny, subfolder="donor"),
        load(donor, config=TransplantConfig(recipient=str(tiny / "recipient"), donors={str(donor): 1})),
    ]
    for model in models:
        assert torch.equal(logits_of(model), logits_of(models[0]))
        assert model.layer_map == models[0].layer_map
        assert isinstance(model.layer_map, LayerMap)


def test_a_configuration_read_beforehand(tiny_llama: Path) -> None:
    """As training scripts do: first the configuration, then the model."""
    donor = tiny_llama / "donor"
    config = AutoConfig.from_pretrained(donor)
    before = config.to_dict()
    model = AutoModelForCausalLM.from_pretrained(donor, config=config)
    assert torch.equal(logits_of(model), logits_of(load(donor)))
    assert config.to_dict() == before


def test_labels_set_on_a_configuration_read_beforehand(tiny_llama: Path) -> None:
    labels = AutoConfig.from_pretrained(tiny_llama / "donor", num_labels=5)
    classifier = AutoModelForSequenceClassification.from_pretrained(tiny_llama / "donor", config=labels)
    assert classifier.config.num_labels == classifier.score.out_features == 5


def test_an_instance_of_the_recipients_own_class(tiny_gpt2: Path) -> None:
    model = load(tiny_gpt2 / "donor")
    assert isinstance(model, GPT2LMHeadModel)
    assert type(model) is not GPT2LMHeadModel
    assert (type(model).__name__, type(model).__module__) == ("GPT2LMHeadModel", GPT2LMHeadModel.__module__)
    assert type(model.config) is GPT2Config
    assert model.config.architectures == ["GPT2LMHeadModel"]
    assert not model.training
    assert type(load(tiny_gpt2 / "donor")) is type(model)


def test_the_class_without_a_transplant_is_plain(tiny_gpt2: Path, tmp_path: Path) -> None:
    model = load(tiny_gpt2 / "donor")
    model.save_pretrained(tmp_path / "full")
    fresh = type(model)(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16, n_positions=8))
    assert fresh.transplant_config is None
    assert fresh.layer_map == (("recipient", 0),)
    fresh.save_pretrained(tmp_path / "fresh")
    assert json.loads((tmp_path / "fresh" / "config.json").read_text())["model_type"] == "gpt2"
    again = type(model).from_pretrained(tmp_path / "full")
    assert again.transplant_config is None
    assert torch.equal(logits_of(again), logits_of(model))


def test_what_the_model_knows_of_itself(tiny_gpt2: Path) -> None:
    model = load(tiny_gpt2 / "donor")
    config = model.transplant_config
    assert isinstance(config, TransplantConfig)
    assert config.recipient == str(tiny_gpt2 / "recipient")
    assert config.recipient_revision is None
    assert [spec.to_dict() for spec in config.donors] == [
        {"donor": str(tiny_gpt2 / "donor"), "position": 1, "mode": "insert", "name": "donor"}
    ]
    assert model.name_or_path == str(tiny_gpt2 / "donor")
    assert model.config._name_or_path == str(tiny_gpt2 / "donor")
    assert loaded(tiny_gpt2).name_or_path == str(tiny_gpt2 / "recipient")
    assert "|  donor 1" in str(model.layer_map)


def test_the_generation_config_is_kept(tiny: Path, tmp_path: Path) -> None:
    assert load(tiny / "donor").generation_config.max_new_tokens == 11
    assert loaded(tiny).generation_config.max_new_tokens == 11
    family = copied(tiny, tmp_path / "family")
    edit_json(family / "donor" / "generation_config.json", max_new_tokens=3)
    assert load(family / "donor").generation_config.max_new_tokens == 3
    (family / "donor" / "generation_config.json").unlink()
    assert load(family / "donor").generation_config.max_new_tokens == 11


def test_the_files_are_left_alone(tiny_gpt2: Path, tmp_path: Path) -> None:
    family = copied(tiny_gpt2, tmp_path / "family")
    for path in [*family.rglob("*"), family]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = sorted(family.rglob("*"))
    load(family / "donor")
    assert sorted(family.rglob("*")) == before
    for path in [family, *family.rglob("*")]:
        path.chmod(0o755)


# -- Heads ---------------------------------------------------------------------------------------------------------


def test_without_a_head(tiny: Path) -> None:
    model = AutoModel.from_pretrained(tiny / "donor")
    whole = load(tiny / "donor")
    ids = some_ids()
    with torch.no_grad():
        hidden = model(ids, use_cache=False).last_hidden_state
        assert torch.equal(whole.lm_head(hidden), logits_of(whole, ids))
        with model.disable_transplants():
            untouched = AutoModel.from_pretrained(tiny / "recipient")(ids, use_cache=False).last_hidden_state
            assert torch.equal(model(ids, use_cache=False).last_hidden_state, untouched)


def test_classes_of_other_heads(tiny_llama: Path, tiny_gpt2: Path) -> None:
    donor = tiny_llama / "donor"
    assert isinstance(AutoModel.from_pretrained(donor), LlamaModel)
    assert isinstance(AutoModel.from_pretrained(tiny_gpt2 / "donor"), GPT2Model)
    labels = AutoModelForSequenceClassification.from_pretrained(donor, num_labels=5)
    assert isinstance(labels, LlamaForSequenceClassification)
    tokens = AutoModelForTokenClassification.from_pretrained(donor, num_labels=5)
    assert isinstance(tokens, LlamaForTokenClassification)
    for model, shape in ((labels, (2, 5)), (tokens, (2, 12, 5))):
        assert model.config.num_labels == 5
        assert len(model.layer_map) == 6
        with torch.no_grad():
            assert model(some_ids()).logits.shape == shape
    assert torch.equal(labels.model.layers[1].mlp.up_proj.weight, load(donor).model.layers[1].mlp.up_proj.weight)


def test_a_head_is_new_and_reported(tiny: Path) -> None:
    model, info = AutoModelForSequenceClassification.from_pretrained(tiny / "donor", output_loading_info=True)
    assert set(info["missing_keys"]) == {"score.weight"}
    assert model.score.weight.shape[0] == 2


def test_another_head_of_a_recipient(tiny_gpt2: Path) -> None:
    model = loaded(tiny_gpt2, auto_class=AutoModelForTokenClassification, num_labels=3)
    assert type(model).__name__ == "GPT2ForTokenClassification"
    assert model.classifier.out_features == 3


# -- Random weights ------------------------------------------------------------------------------------------------


def test_from_config(tiny: Path) -> None:
    config = AutoConfig.from_pretrained(tiny / "donor")
    for model in (AutoModelWithTransplant.from_config(config), AutoModelForCausalLM.from_config(config)):
        assert len(layers_of(model)) == 6
        assert model.layer_map == load(tiny / "donor").layer_map
        assert not torch.equal(logits_of(model.eval()), logits_of(load(tiny / "donor")))
        assert torch.equal(generated(model, use_cache=True), generated(model, use_cache=False))
        with model.disable_transplants():
            assert len(layers_of(model)) == NUM_LAYERS
    headless = AutoModel.from_config(config, dtype=torch.bfloat16)
    assert headless.dtype == torch.bfloat16
    assert not hasattr(headless, "lm_head")


def test_from_config_reads_no_weights_of_the_recipient(tiny_gpt2: Path, tmp_path: Path) -> None:
    family = copied(tiny_gpt2, tmp_path / "family")
    (family / "recipient" / "model.safetensors").unlink()
    model = AutoModelWithTransplant.from_config(AutoConfig.from_pretrained(family / "donor"))
    assert len(layers_of(model)) == 6


def test_a_model_that_is_let_go_of_is_freed_at_once(tiny: Path) -> None:
    """Not when the garbage collector next looks: two loads after each other must not take twice the memory."""
    gc.collect()
    gc.disable()
    try:
        model = loaded(tiny)
        model.set_strength("donor", 0.5)
        with model.disable_transplants():
            generated(model)
        model.move_donor("donor", 3)
        with model.using("donor"):
            generated(model)
        gone = [weakref.ref(model), weakref.ref(layers_of(model)[3])]
        del model
        assert [one() for one in gone] == [None, None]
    finally:
        gc.enable()


# -- What one sees of it -------------------------------------------------------------------------------------------


def test_one_look_says_what_is_in_the_model(tiny_llama: Path) -> None:
    donors = [DonorSpec(str(tiny_llama / "donor"), 1), DonorSpec(str(tiny_llama / "donor"), 2, "replace", name="code")]
    model = load(tiny_llama / "recipient", donors=donors, keep_replaced=True)
    model.set_strength("donor", 0.5)
    recipient = f"recipient: {(tiny_llama / 'recipient').resolve()}"
    code = "code: replaces layers from position 2, strength 1, on"
    lines = [recipient, "donor: inserted at position 1, strength 0.5, on", code]
    assert str(model.layer_map).splitlines()[-3:] == lines
    assert all(line in model.layer_map._repr_html_() for line in lines)
    assert all(line in repr(model) for line in lines)
    with model.disable_transplants("donor"):
        assert str(model.layer_map).splitlines()[-3:] == [
            recipient,
            "donor: inserted at position 1, strength 0.5, off",
            code,
        ]
    assert str(remove_transplants(load(tiny_llama / "donor"))).count("donor") == 0


def test_trainable_parameters_are_printed_as_peft_prints_them(
    tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peft = pytest.importorskip("peft")
    model = loaded(tiny_llama)
    model.requires_grad_(False)
    layers_of(model)[1].requires_grad_(True)
    model.print_trainable_parameters()
    ours = capsys.readouterr().out
    peft.PeftModel.print_trainable_parameters(_Counted(model))
    assert ours == capsys.readouterr().out


class _Counted:
    """What PEFT needs of a model to print its parameters."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        sizes = [(p.numel(), p.requires_grad) for p in self.model.parameters()]
        return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)
