"""Training a transplant with the tools people use: `Trainer` and PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from tests.helpers import NUM_LAYERS, generated, layers_of, loaded, logits_of, plain, refused, some_ids
from transplant_hf import AutoModelWithTransplant, CheckpointError, ConfigurationError, Donor, transplant
from transplant_hf.texts import Blocks

TEXTS = Blocks(some_ids(8, 12))


def trainer(model: Any, folder: Path, **arguments: Any) -> Trainer:
    defaults = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
    }
    args = TrainingArguments(**{**defaults, **arguments})
    return Trainer(model=model, args=args, train_dataset=TEXTS, eval_dataset=TEXTS)


def freeze_recipient(model: Any) -> None:
    model.requires_grad_(False)
    for number in model.layer_map.layers_of("donor"):
        layers_of(model)[number].requires_grad_(True)


def test_trainer_full(tiny_llama: Path, tmp_path: Path) -> None:
    model = loaded(tiny_llama, 1)
    before = logits_of(model)
    run = trainer(model, tmp_path / "run")
    run.train()
    run.save_model(str(tmp_path / "full"))
    model.eval()
    assert not torch.equal(logits_of(model), before)
    assert torch.equal(logits_of(plain(tmp_path / "full")), logits_of(model))


def test_trainer_donor_only_and_thin(tiny: Path, tmp_path: Path) -> None:
    model = loaded(tiny, 1)
    freeze_recipient(model)
    trainer(model, tmp_path / "run").train()
    model.eval()
    model.save_pretrained(tmp_path / "thin", thin=True)
    again = AutoModelWithTransplant.from_pretrained(tmp_path / "thin")
    assert torch.equal(logits_of(again), logits_of(model))
    assert not torch.equal(logits_of(again), logits_of(loaded(tiny, 1)))
    with model.disable_transplants():
        assert torch.equal(logits_of(model), logits_of(plain(tiny / "recipient")))


def test_trainer_goes_on_from_its_own_checkpoint(tiny_llama: Path, tmp_path: Path) -> None:
    """Checkpoints of a run are full saves, and are read back into a transplanted model."""
    arguments = {"save_strategy": "steps", "save_steps": 1, "seed": 5}
    whole = loaded(tiny_llama, 1)
    trainer(whole, tmp_path / "run", **arguments).train()
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}
    again = loaded(tiny_llama, 1)
    trainer(again, tmp_path / "run", **arguments).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    torch.testing.assert_close(logits_of(again.eval()), logits_of(whole.eval()), rtol=1e-4, atol=1e-4)


def test_trainer_evaluates_with_donors_off(tiny_llama: Path, tmp_path: Path) -> None:
    model = loaded(tiny_llama, 1)
    outside = trainer(model, tmp_path / "run").evaluate(TEXTS)["eval_loss"]
    with model.disable_transplants():
        inside = trainer(model, tmp_path / "run").evaluate(TEXTS)["eval_loss"]
    recipient = trainer(plain(tiny_llama / "recipient"), tmp_path / "run").evaluate(TEXTS)["eval_loss"]
    assert inside == recipient != outside


def test_gradient_checkpointing(tiny_llama: Path, tmp_path: Path) -> None:
    model = loaded(tiny_llama, 1)
    one = loaded(tiny_llama, 1)
    trainer(model, tmp_path / "a", gradient_checkpointing=True, seed=5).train()
    trainer(one, tmp_path / "b", seed=5).train()
    torch.testing.assert_close(logits_of(model.eval()), logits_of(one.eval()), rtol=1e-4, atol=1e-4)


# -- PEFT ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["thin", "loaded"])
def test_lora(tiny_llama: Path, tmp_path: Path, kind: str) -> None:
    """Default target modules, one step, saved, and put on a fresh model."""
    peft = pytest.importorskip("peft")

    def fresh() -> Any:
        donor = tiny_llama / "donor"
        return AutoModelWithTransplant.from_pretrained(donor) if kind == "thin" else loaded(tiny_llama, 1)

    torch.manual_seed(0)
    model = peft.get_peft_model(fresh(), peft.LoraConfig(task_type="CAUSAL_LM", r=4))
    adapted = {name.split(".layers.")[1].split(".")[0] for name, p in model.named_parameters() if "lora_" in name}
    assert adapted == {str(number) for number in range(NUM_LAYERS + 2)}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        model(some_ids(), labels=some_ids()).loss.backward()
        optimizer.step()
    model.eval()
    after = logits_of(model)
    assert not torch.equal(after, logits_of(fresh()))
    model.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all("lora_" in name for name in saved), "embeddings are in the adapter too"
    again = peft.PeftModel.from_pretrained(fresh(), tmp_path / "adapter")
    assert torch.equal(logits_of(again), after)
    assert torch.equal(generated(again, use_cache=True), generated(again, use_cache=False))
    assert torch.equal(logits_of(model.merge_and_unload()), logits_of(again.merge_and_unload()))


def test_lora_by_its_own_name(tiny_llama: Path, tmp_path: Path) -> None:
    """An adapter trained on a thin repo names that repo as its base, and finds it."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = AutoModelWithTransplant.from_pretrained(tiny_llama / "donor")
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path / "adapter")
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert len(again.base_model.model.layer_map) == NUM_LAYERS + 2
    assert torch.equal(logits_of(again), logits_of(model))


def test_adapters_of_transformers_own_interface(tiny_llama: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = loaded(tiny_llama, 1)
    torch.manual_seed(0)
    model.add_adapter(peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"]))
    model.eval()
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    again = loaded(tiny_llama, 1)
    again.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits_of(again), logits_of(model))
    again.disable_adapters()
    assert torch.equal(logits_of(again), logits_of(loaded(tiny_llama, 1)))


@pytest.mark.parametrize("position", [0, 4])
def test_lora_and_the_switch(tiny_llama: Path, position: int) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(loaded(tiny_llama, position), peft.LoraConfig(task_type="CAUSAL_LM", r=4)).eval()
    with model.disable_transplants():
        assert torch.equal(logits_of(model), logits_of(plain(tiny_llama / "recipient")))
        assert torch.equal(generated(model), generated(plain(tiny_llama / "recipient")))
    assert torch.equal(logits_of(model), logits_of(loaded(tiny_llama, position)))


@pytest.mark.parametrize("kind", ["recipient", "transplant"])
def test_layers_with_an_adapter_are_no_donor_and_no_recipient(tiny_llama: Path, tmp_path: Path, kind: str) -> None:
    """An adapter renames the weights that it stands before: what is made of them would be random there."""
    peft = pytest.importorskip("peft")
    base = plain(tiny_llama / "recipient") if kind == "recipient" else loaded(tiny_llama, 1)
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", r=4)).get_base_model()
    with refused(CheckpointError, "layers.1 has an adapter", "base_layer", "merge_and_unload"):
        Donor.from_model(model, [1, 2]).tensors()
    with refused(ConfigurationError, "has adapters attached", "unload"):
        transplant(model, Donor.from_pretrained(tiny_llama / "donor"), 1, name="second")
    if kind == "transplant":
        with refused(ConfigurationError, "thin save", "an adapter is attached", "unload"):
            model.save_pretrained(tmp_path / "thin", thin=True)


def test_a_recipient_in_memory_keeps_its_parametrizations(tiny_llama: Path) -> None:
    recipient, wanted = plain(tiny_llama / "recipient"), loaded(tiny_llama, 1)
    for projection in (recipient.model.layers[2].self_attn.q_proj, wanted.model.layers[4].self_attn.q_proj):
        torch.nn.utils.parametrizations.weight_norm(projection)
    model = transplant(recipient, Donor.from_pretrained(tiny_llama / "donor"), 1)
    for parameters in (recipient.model.layers[2].parameters(), wanted.model.layers[4].parameters()):
        with torch.no_grad():
            for parameter in parameters:
                parameter.mul_(0.5)
    assert torch.equal(logits_of(model), logits_of(wanted))
