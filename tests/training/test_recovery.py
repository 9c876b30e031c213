"""Parts of a transplant that are trained together after it was made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.helpers import copied, logits_of, refused
from tests.training.helpers import StopAt, noise
from transplant_hf import AutoModelWithTransplant, ConfigurationError, Donor, DonorSpec
from transplant_hf.training import RecoveryArguments, RecoveryTrainer


def recovery(folder: Path, model: Any, **fields: Any) -> RecoveryTrainer:
    known: dict[str, Any] = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return RecoveryTrainer(model, RecoveryArguments(str(folder), **{**known, **fields}), noise())


def test_neighbors_become_donors_of_one_layer_and_the_recipient_stays(tiny: Path, tmp_path: Path) -> None:
    family = copied(tiny, tmp_path / "family")
    made = recovery(tmp_path / "run", family / "donor")
    before = logits_of(made.model)
    made.train()
    model = made.model.eval()
    assert list(model.layer_map) == [
        ("recovered-0", 0), ("donor", 1), ("donor", 2), ("recovered-1", 1), ("recipient", 2), ("recipient", 3)
    ]  # fmt: skip
    after = logits_of(model)
    assert not torch.allclose(after, before)
    made.save_transplant(family / "recovered")
    assert sorted(path.name for path in (family / "recovered").iterdir() if path.is_dir()) == [
        "donor", "recovered-0", "recovered-1"
    ]  # fmt: skip
    loaded = AutoModelForCausalLM.from_pretrained(family / "recovered")
    assert torch.allclose(logits_of(loaded), after, atol=1e-6)
    kept = AutoModelWithTransplant.from_pretrained(family / "recovered", keep_replaced=True)
    with kept.disable_transplants():
        assert torch.allclose(logits_of(kept), logits_of(AutoModelForCausalLM.from_pretrained(family / "recipient")))
    told = Donor.from_pretrained(family / "recovered", subfolder="donor").metadata["recovered"]
    assert (told["parts"], told["steps"]) == (["donor", "neighbors"], 4)


def test_a_spread_donor_has_neighbors_at_each_place(tiny_llama: Path, tmp_path: Path) -> None:
    family = copied(tiny_llama, tmp_path / "family")
    spread = [DonorSpec(str(family / "donor"), (1, 3), name="law")]
    model = AutoModelWithTransplant.from_pretrained(family / "recipient", donors=spread)
    made = recovery(tmp_path / "run", model)
    assert {slot.source for slot in made.transplant.layer_map} == {"law", *(f"recovered-{n}" for n in range(4))}


def test_the_transplant_starts_as_it_was(tiny_llama: Path, tmp_path: Path) -> None:
    before = logits_of(AutoModelWithTransplant.from_pretrained(tiny_llama / "donor"))
    made = recovery(tmp_path, tiny_llama / "donor", parts=["donor", "neighbors", "norms", "gate"])
    assert torch.allclose(logits_of(made.model), before, atol=1e-6)


@pytest.mark.parametrize(
    ("parts", "trained"),
    [
        (["norms"], {"layernorm"}),
        (["gate"], {"gate"}),
        (["donor"], {"self_attn", "mlp", "layernorm"}),
    ],
)
def test_only_the_chosen_parts_are_trained(
    parts: list[str], trained: set[str], tiny_llama: Path, tmp_path: Path
) -> None:
    made = recovery(tmp_path, tiny_llama / "donor", parts=parts)
    names = {name for name, parameter in made.model.named_parameters() if parameter.requires_grad}
    assert names and all(any(part in name for part in trained) for name in names)
    before = {name: parameter.clone() for name, parameter in made.model.named_parameters() if name not in names}
    made.train()
    for name, parameter in made.model.named_parameters():
        if name in before:
            assert torch.equal(parameter, before[name]), name


def test_a_trained_gate_becomes_the_strength(tiny_llama: Path, tmp_path: Path) -> None:
    family = copied(tiny_llama, tmp_path / "family")
    made = recovery(tmp_path / "run", family / "donor", parts=["gate"], gate_learning_rate=0.1)
    made.train()
    assert made.trainable_parameters == 1
    strength = made.model.strengths["donor"]
    assert strength != 1.0
    after = logits_of(made.model.eval())
    made.save_model(str(family / "gated"))
    loaded = AutoModelForCausalLM.from_pretrained(family / "gated")
    assert loaded.strengths == {"donor": pytest.approx(strength)}
    assert torch.allclose(logits_of(loaded), after, atol=1e-5)


def test_what_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with refused(ConfigurationError, "has no donors", "donors="):
        recovery(tmp_path, tiny_llama / "recipient")
    with refused(ConfigurationError, "no donor is named law", "donor"):
        recovery(tmp_path, tiny_llama / "donor", donors=["law"])
    with refused(ConfigurationError, "neighbors (--neighbors) is 2", "['gate']"):
        RecoveryArguments(str(tmp_path), parts=["gate"], neighbors=2)
    with refused(ConfigurationError, "parts must be among", "'heads'"):
        recovery(tmp_path, tiny_llama / "donor", parts=["heads"])


def test_a_checkpoint_of_other_rows_or_another_rate_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "parts": ["donor", "gate"]}
    recovery(tmp_path, tiny_llama / "donor", **fields).train()
    for name, value in {"seed": 7, "per_device_train_batch_size": 2, "gate_learning_rate": 1.0}.items():
        other = recovery(tmp_path, tiny_llama / "donor", **{**fields, "max_steps": 8, name: value})
        with refused(ConfigurationError, "another configuration", f"{value} now"):
            other.train(resume_from_checkpoint=True)
    again = recovery(tmp_path, tiny_llama / "donor", **{**fields, "max_steps": 8})
    assert again.train(resume_from_checkpoint=True).global_step == 8


def test_a_stopped_run_leaves_a_model_that_can_be_used_and_trained(tiny_llama: Path, tmp_path: Path) -> None:
    model = AutoModelWithTransplant.from_pretrained(tiny_llama / "donor")
    fields: dict[str, Any] = {"parts": ["gate"], "gate_learning_rate": 0.1, "save_strategy": "steps", "save_steps": 1}
    whole = recovery(tmp_path / "whole", tiny_llama / "donor", **fields)
    whole.train()
    recovery(tmp_path / "never", model, **fields)
    made = recovery(tmp_path / "run", model, **fields)
    made.add_callback(StopAt(3))
    with pytest.raises(KeyboardInterrupt):
        made.train()
    model.set_strength("donor", 0.5)
    made.remove_callback(StopAt)
    made.train(resume_from_checkpoint=True)
    assert model.strengths == whole.transplant.strengths
