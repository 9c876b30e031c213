"""Adapters beside a recipient, a donor or a transplant are loaded with it, on the layers they were trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.helpers import edit_json, logits_of, refused
from transplant_hf import AutoModelWithTransplant, ConfigurationError
from transplant_hf.exporting import export

peft = pytest.importorskip("peft")


def adapted(model: Any, seed: int = 0) -> Any:
    """A model with a LoRA that changes the output."""
    torch.manual_seed(seed)
    fields = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **fields)).eval()


def put_beside(folder: Path) -> None:
    """Lay an adapter of a model into its folder."""
    adapted(AutoModelForCausalLM.from_pretrained(folder)).save_pretrained(folder)


def adapted_layers(model: Any) -> list[int]:
    names = (name for name, _ in model.named_parameters() if "lora_" in name)
    return sorted({int(name.partition("layers.")[2].partition(".")[0]) for name in names})


def test_one_beside_the_recipient_is_on_its_layers_alone(family: Path) -> None:
    put_beside(family / "recipient")
    plain = AutoModelForCausalLM.from_pretrained(family / "recipient")
    model: Any = AutoModelForCausalLM.from_pretrained(family / "donor")
    assert adapted_layers(model) == [
        number for number, (source, _) in enumerate(model.layer_map) if source == "recipient"
    ]
    with model.disable_transplants():
        assert torch.equal(logits_of(model), logits_of(plain))
    assert not torch.equal(logits_of(model), logits_of(plain))


def test_one_beside_the_recipient_goes_with_donors_named_in_the_call(family: Path) -> None:
    put_beside(family / "recipient")
    plain = AutoModelForCausalLM.from_pretrained(family / "recipient")
    model = AutoModelWithTransplant.from_pretrained(family / "recipient", donors={str(family / "donor"): 2})
    with model.disable_transplants():
        assert torch.equal(logits_of(model), logits_of(plain))


def test_one_of_replaced_layers_needs_them(family: Path) -> None:
    put_beside(family / "recipient")
    edit_json(family / "donor" / "config.json", donors=[{"donor": ".", "position": 1, "mode": "replace"}])
    with refused(ConfigurationError, "adapter", str(family / "recipient"), "keep_replaced=True", "merge"):
        AutoModelForCausalLM.from_pretrained(family / "donor")
    plain = AutoModelForCausalLM.from_pretrained(family / "recipient")
    model = AutoModelWithTransplant.from_pretrained(family / "donor", keep_replaced=True)
    with model.disable_transplants():
        assert torch.equal(logits_of(model), logits_of(plain))


def test_one_beside_a_donor_is_on_the_transplant(family: Path) -> None:
    model = adapted(AutoModelForCausalLM.from_pretrained(family / "donor"))
    model.save_pretrained(family / "donor")
    for load in (AutoModelForCausalLM.from_pretrained, AutoModelWithTransplant.from_pretrained):
        assert torch.equal(logits_of(load(family / "donor")), logits_of(model))
    again = peft.AutoPeftModelForCausalLM.from_pretrained(family / "donor")
    assert torch.equal(logits_of(again), logits_of(model))


def test_an_adapter_of_a_transplant_by_its_own_name(family: Path, tmp_path: Path) -> None:
    model = adapted(AutoModelForCausalLM.from_pretrained(family / "donor"))
    model.save_pretrained(tmp_path / "adapter")
    for load in (AutoModelForCausalLM.from_pretrained, AutoModelWithTransplant.from_pretrained):
        assert torch.equal(logits_of(load(tmp_path / "adapter")), logits_of(model))


def test_an_adapter_of_a_recipient_named_as_the_recipient(family: Path, tmp_path: Path) -> None:
    adapted(AutoModelForCausalLM.from_pretrained(family / "recipient")).save_pretrained(tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    model = AutoModelWithTransplant.from_pretrained(tmp_path / "adapter", donors={str(family / "donor"): 1})
    assert model.transplant_config.recipient == str(family / "recipient")
    with model.disable_transplants():
        assert torch.equal(logits_of(model), logits_of(plain))
    edit_json(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path="")
    with refused(ConfigurationError, "no model", "base_model_name_or_path", str(tmp_path / "adapter")):
        AutoModelWithTransplant.from_pretrained(tmp_path / "adapter", donors={str(family / "donor"): 1})


def test_two_at_once_are_refused(family: Path) -> None:
    adapted(AutoModelForCausalLM.from_pretrained(family / "donor")).save_pretrained(family / "donor")
    put_beside(family / "recipient")
    with refused(ConfigurationError, str(family / "donor"), str(family / "recipient"), "cannot be loaded together"):
        AutoModelForCausalLM.from_pretrained(family / "donor")


@pytest.mark.parametrize("beside", ["recipient", "donor"])
def test_no_export_leaves_one_out(beside: str, family: Path, tmp_path: Path) -> None:
    put_beside(family / beside)
    with refused(ConfigurationError, str(family / beside), "adapter_config.json", "merge_and_unload"):
        export(family / "donor", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_peft_it_is_no_secret(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_beside(family / "donor")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with refused(ConfigurationError, "PEFT", "pip install peft", str(family / "donor")):
        AutoModelWithTransplant.from_pretrained(family / "donor")
