"""Rows of training: every loss is that of the same layers in an ordinary model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from tests.ecosystem.cases import Case
from tests.ecosystem.steps import aligned, donor_parameters, only_donor, steps
from tests.helpers import generated, layers_of, logits_of, some_ids
from transplant_hf import AutoModelWithTransplant
from transplant_hf.texts import Blocks

SECTION = "Training"
pytestmark = pytest.mark.slow


ROWS = Blocks(some_ids(12, 10))


def trained(model: Any, folder: Path, resume: Path | None = None, **arguments: Any) -> list[float]:
    """Train with `Trainer`; return the loss of each step."""
    known: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 5,
    }
    settings = TrainingArguments(**{**known, **arguments})
    run = Trainer(model=model, args=settings, train_dataset=ROWS, eval_dataset=ROWS)
    run.train(resume_from_checkpoint=str(resume) if resume else None)
    model.eval()
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def gradients(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of one step in training mode, by parameter."""
    model.train()
    torch.manual_seed(0)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    model.eval()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert wanted
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.ecosystem(section=SECTION, feature="gradient checkpointing: the same gradients, all weights trained")
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(case: Case, reentrant: bool) -> None:
    model = aligned(case.load())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_equal(gradients(model, case.ids), gradients(aligned(case.independent()), case.ids))


@pytest.mark.ecosystem(section=SECTION, feature="gradient checkpointing: the same gradients, only the donor trained")
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_of_a_donor(case: Case, reentrant: bool) -> None:
    model, native = only_donor(case, aligned(case.load())), only_donor(case, aligned(case.independent()))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:  # as Transformers and PEFT do where the embeddings are frozen
        model.enable_input_require_grads()
    found = gradients(model, case.ids)
    assert len(found) == len(donor_parameters(case, model))
    assert_equal(found, gradients(native, case.ids))


@pytest.mark.ecosystem(section=SECTION, feature="a loop of one's own, with the donor switched off in between")
def test_own_loop(case: Case) -> None:
    model, native = aligned(case.load()), aligned(case.independent())
    batches = [some_ids(2, 7, seed) for seed in range(4)]
    losses = []
    for batch in batches:
        losses += steps(model, [batch])
        with model.disable_transplants():
            generated(model, batch, new=2)
    wanted = [loss for batch in batches for loss in steps(native, [batch])]
    assert losses == wanted
    assert torch.equal(logits_of(model, case.ids), logits_of(native, case.ids))


@pytest.mark.ecosystem(section=SECTION, feature="`Trainer`, all weights: the same losses, saved as a plain checkpoint")
def test_trainer(case: Case, tmp_path: Path) -> None:
    model, native = aligned(case.load()), aligned(case.independent())
    assert trained(model, tmp_path / "a") == trained(native, tmp_path / "b")
    model.save_pretrained(tmp_path / "full")
    again = type(native).from_pretrained(tmp_path / "full")
    assert torch.equal(logits_of(aligned(again), case.ids), logits_of(native, case.ids))


@pytest.mark.ecosystem(section=SECTION, feature="`Trainer`, only the donor: the rest unchanged bit by bit, saved thin")
def test_trainer_of_a_donor(case: Case, tmp_path: Path) -> None:
    model, native = only_donor(case, aligned(case.load())), only_donor(case, aligned(case.independent()))
    assert trained(model, tmp_path / "a") == trained(native, tmp_path / "b")
    with model.disable_transplants():
        untouched = aligned(case.recipient_model())
        for name, tensor in untouched.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor), name
        assert torch.equal(logits_of(model, case.ids), logits_of(untouched, case.ids))
    model.save_pretrained(tmp_path / "thin", thin=True)
    again = aligned(AutoModelWithTransplant.from_pretrained(tmp_path / "thin"))
    assert torch.equal(logits_of(again, case.ids), logits_of(native, case.ids))


@pytest.mark.ecosystem(section=SECTION, feature="`Trainer` resumed from a checkpoint as if never interrupted")
@pytest.mark.parametrize("what", ["all weights", "only the donor"])
def test_trainer_resumes(case: Case, what: str, tmp_path: Path) -> None:
    def fresh() -> Any:
        model = aligned(case.load())
        return model if what == "all weights" else only_donor(case, model)

    model = fresh()
    losses = trained(model, tmp_path / "run", save_strategy="steps", save_steps=2)
    again = fresh()
    resumed = trained(again, tmp_path / "again", tmp_path / "run" / "checkpoint-2")
    assert resumed[-2:] == losses[-2:]
    assert torch.equal(logits_of(again, case.ids), logits_of(model, case.ids))


@pytest.mark.ecosystem(
    section=SECTION, feature="`Trainer` with `load_best_model_at_end`, `gradient_checkpointing`, `bf16`"
)
@pytest.mark.parametrize("option", ["best", "checkpointing", "bf16"])
def test_trainer_options(case: Case, option: str, tmp_path: Path) -> None:
    options: dict[str, dict[str, Any]] = {
        "best": {
            "load_best_model_at_end": True,
            "metric_for_best_model": "loss",
            "save_strategy": "steps",
            "save_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 1,
        },
        "checkpointing": {"gradient_checkpointing": True},
        "bf16": {"bf16": True},
    }
    found = []
    for number, model in enumerate((aligned(case.load()), aligned(case.independent()))):
        losses = trained(model, tmp_path / str(number), **options[option])
        found.append((losses, logits_of(model, case.ids)))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.ecosystem(section=SECTION, feature="Accelerate: `prepare`, `accumulate`, `save_state`, `load_state`")
def test_accelerator(case: Case, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    found = []
    for model in (aligned(case.load()), aligned(case.independent())):
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        prepared, optimizer = accelerator.prepare(model, optimizer)
        losses = []
        for number in range(6):
            if number == 4:
                folder = accelerator.save_state(str(tmp_path / f"state-{len(found)}"))
            with accelerator.accumulate(prepared):
                ids = some_ids(2, 7, number)
                loss = prepared(input_ids=ids, labels=ids).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
        after = logits_of(accelerator.unwrap_model(prepared), case.ids)
        accelerator.load_state(folder)
        found.append((losses, after, logits_of(prepared, case.ids)))
    assert found[0][0] == found[1][0]
    for ours, theirs in zip(found[0][1:], found[1][1:], strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(found[0][1], found[0][2])


@pytest.mark.ecosystem(section=SECTION, feature="layers frozen and unfrozen by number, layer-wise learning rates")
def test_layerwise(case: Case) -> None:
    found = []
    for model in (aligned(case.load()), aligned(case.independent())):
        groups = [
            {"params": layer.parameters(), "lr": 10.0 ** -(2 + n % 3)} for n, layer in enumerate(layers_of(model))
        ]
        optimizer = torch.optim.SGD(groups, lr=1e-2)
        for _ in range(3):
            model(input_ids=case.ids, labels=case.ids).loss.backward()
            optimizer.step()
            model.zero_grad()
        found.append(logits_of(model, case.ids))
    assert torch.equal(*found)
