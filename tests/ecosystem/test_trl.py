"""Rows of TRL's trainers: every loss is that of the same layers in an ordinary model."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ecosystem.cases import Case
from tests.ecosystem.steps import aligned, only_donor
from tests.helpers import logits_of
from transplant_hf import AutoModelWithTransplant

SECTION = "Training"
pytestmark = pytest.mark.slow
TEXTS = ["the court finds", "a clause of it", "no party may", "under the law"]


def trained(kind: str, case: Case, model: Any, folder: Path, **given: Any) -> list[float]:
    """Train with one of TRL's trainers; return the loss of each step."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    config, trainer, rows = {
        "sft": (trl.SFTConfig, trl.SFTTrainer, {"text": TEXTS}),
        "dpo": (
            trl.DPOConfig,
            trl.DPOTrainer,
            {"prompt": TEXTS, "chosen": [" is so"] * 4, "rejected": [" was not"] * 4},
        ),
    }[kind]
    settings = config(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        max_length=32,
        seed=5,
    )
    run = trainer(
        model=model,
        args=settings,
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=case.tokenizer,
        **given,
    )
    run.train()
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def assert_same(case: Case, models: list[Any], run: Callable[[int, Any], list[float]]) -> None:
    """Train the transplant and the reference likewise, and compare every loss and what they are afterwards."""
    losses = [run(number, model) for number, model in enumerate(models)]
    assert len(losses[0]) == 3
    assert losses[0] == losses[1]
    assert torch.equal(*(logits_of(model.eval(), case.ids) for model in models))


@pytest.mark.ecosystem(section=SECTION, feature="TRL `SFTTrainer`: all weights, only the donor, LoRA")
@pytest.mark.parametrize("what", ["all weights", "only the donor", "lora"])
def test_sft(case: Case, what: str, tmp_path: Path) -> None:
    models = [aligned(case.load()), aligned(case.independent())]
    given: dict[str, Any] = {}
    if what == "only the donor":
        models = [only_donor(case, model) for model in models]
    elif what == "lora":
        peft = pytest.importorskip("peft")
        names = ["c_attn"] if case.architecture == "gpt2" else ["q_proj", "v_proj"]
        given = {"peft_config": peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=names)}
    assert_same(case, models, lambda number, model: trained("sft", case, model, tmp_path / str(number), **given))


@pytest.mark.ecosystem(section=SECTION, feature="TRL `DPOTrainer`, a transplant with a name")
def test_dpo_by_name(case: Case, tmp_path: Path) -> None:
    models = [aligned(AutoModelWithTransplant.from_pretrained(case.thin)), aligned(case.independent())]
    assert_same(case, models, lambda number, model: trained("dpo", case, model, tmp_path / str(number)))


@pytest.mark.ecosystem(section=SECTION, feature="TRL `DPOTrainer`, put together by `donors=`, `ref_model` given")
def test_dpo_with_a_reference(case: Case, tmp_path: Path) -> None:
    models, references = [[aligned(case.load()), aligned(case.independent())] for _ in range(2)]
    assert_same(
        case,
        models,
        lambda number, model: trained("dpo", case, model, tmp_path / str(number), ref_model=references[number]),
    )


@pytest.mark.ecosystem(section=SECTION, feature="TRL `DPOTrainer`, put together by `donors=`, no `ref_model`")
def test_dpo_without_a_reference(case: Case, tmp_path: Path) -> None:
    first = trained("dpo", case, aligned(case.load()), tmp_path)[0]
    if first != pytest.approx(math.log(2), abs=1e-2):
        pytest.xfail(
            "TRL loads the reference by the recipient's name, without the donor: give it as ref_model: https://huggingface.co/docs/trl/dpo_trainer"
        )
    native = trained("dpo", case, aligned(case.independent()), tmp_path)[0]
    assert first == native
