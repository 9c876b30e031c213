"""Runs that are stopped, killed, resumed, or that go wrong."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from tests.helpers import logits_of, refused
from tests.training.helpers import StopAt, losses, noise, recipient, trainer
from transplant_hf import CheckpointError, ConfigurationError, TrainingError
from transplant_hf.training.checkpoints import last_checkpoint


def _stopped(folder: Path, step: int = 5, **fields: object) -> None:
    made = trainer(folder, save_strategy="steps", save_steps=2, **fields)
    made.add_callback(StopAt(step))
    with pytest.raises(KeyboardInterrupt):
        made.train()


@pytest.mark.parametrize("fields", [{}, {"replay": True, "cache_prefix": "off"}, {"method": "standalone"}])
def test_a_resumed_run_ends_as_one_that_was_never_stopped(fields: dict[str, object], tmp_path: Path) -> None:
    fields = dict(fields)
    if fields.pop("replay", False):
        fields["replay_dataset"] = noise(seed=2, name="general")
    whole = trainer(tmp_path / "whole", **fields)
    whole.train()
    _stopped(tmp_path / "run", **fields)
    resumed = trainer(tmp_path / "run", save_strategy="steps", save_steps=2, **fields)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 8
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-5)
    assert torch.allclose(logits_of(resumed.model.eval()), logits_of(whole.model.eval()), atol=1e-5)


def test_checkpoints_hold_the_donor_alone(tmp_path: Path) -> None:
    _stopped(tmp_path)
    folder = last_checkpoint(tmp_path)
    assert folder is not None and folder.name == "checkpoint-4"
    names = {path.name for path in folder.iterdir()}
    assert "trained.safetensors" in names and "model.safetensors" not in names


@pytest.mark.parametrize("lost", ["trainer_state.json", "optimizer.pt", "trained.safetensors"])
def test_a_half_written_checkpoint_is_passed_over(lost: str, tmp_path: Path) -> None:
    _stopped(tmp_path)
    newest = tmp_path / "checkpoint-6"
    shutil.copytree(tmp_path / "checkpoint-4", newest)
    (newest / lost).unlink()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    if lost == "trainer_state.json":
        (newest / lost).write_text('{"global_step": 6, "log_h')
        assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-4"


_KILLED = """
import sys
from pathlib import Path
from transformers import TrainerCallback
from tests.training.helpers import trainer

class Tell(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        print("saved", state.global_step, flush=True)

made = trainer(Path(sys.argv[1]), save_strategy="steps", save_steps=1, max_steps=400)
made.add_callback(Tell())
made.train(resume_from_checkpoint="resume" in sys.argv)
"""


def test_a_killed_run_goes_on_from_a_whole_checkpoint(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", _KILLED, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("saved 3"):
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    folder = last_checkpoint(tmp_path)
    assert folder is not None and int(folder.name.rpartition("-")[2]) >= 2
    resumed = trainer(tmp_path, save_strategy="no", max_steps=400)
    resumed.add_callback(StopAt(int(folder.name.rpartition("-")[2]) + 2))
    with pytest.raises(KeyboardInterrupt):
        resumed.train(resume_from_checkpoint=True)


def test_a_run_can_go_on_for_longer(tmp_path: Path) -> None:
    fields = {"replay_dataset": noise(seed=2, name="general"), "lr_scheduler_type": "constant", "warmup_steps": 0}
    whole = trainer(tmp_path / "whole", max_steps=12, **fields)
    whole.train()
    _stopped(tmp_path / "run", **fields)
    resumed = trainer(tmp_path / "run", max_steps=12, **fields)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 12
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-5)
    with refused(ConfigurationError, "checkpoint-4 is at step 4, but this run ends at step 3", "more steps"):
        trainer(tmp_path / "run", max_steps=3, **fields).train(resume_from_checkpoint=True)


def test_another_runs_checkpoint_is_refused(tmp_path: Path) -> None:
    _stopped(tmp_path)
    other = trainer(tmp_path, learning_rate=3e-3, train_dataset=noise(seed=3))
    with refused(ConfigurationError, "learning_rate: 0.01 there, 0.003 now", "text_sha256", "start again"):
        other.train(resume_from_checkpoint=True)
    for name, value in {"weight_decay": 0.5, "lr_scheduler_type": "constant", "adam_beta1": 0.5}.items():
        other = trainer(tmp_path, **{name: value})
        with refused(ConfigurationError, {"lr_scheduler_type": "schedule"}.get(name, name), f"{value!r} now"):
            other.train(resume_from_checkpoint=True)
    with refused(ConfigurationError, "no complete checkpoint", "empty"):
        trainer(tmp_path / "empty").train(resume_from_checkpoint=True)


def test_a_checkpoint_with_other_weights_is_refused(tmp_path: Path) -> None:
    _stopped(tmp_path)
    path = tmp_path / "checkpoint-4" / "trained.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with refused(CheckpointError, "trained.safetensors cannot be read", "earlier checkpoint"):
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_step(tmp_path: Path) -> None:
    made = trainer(tmp_path, save_strategy="steps", save_steps=2)

    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
            if state.global_step == 4:
                made.model.model.layers[-1].mlp.down_proj.weight.data.fill_(float("nan"))

    made.add_callback(Poison())
    with refused(TrainingError, "the loss became nan at step 5 of 8", "checkpoint-4", "Lower the learning rate"):
        made.train()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-4"


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    made.model.model.layers[3].mlp.down_proj.weight.data.fill_(float("inf"))
    with refused(TrainingError, "model.layers.3.mlp.down_proj.weight", "the last one is unchanged"):
        made.save_model(str(tmp_path / "checkpoint-1"), _internal_call=True)
    assert not (tmp_path / "checkpoint-1").exists()


def test_a_full_disk_ends_the_cache_in_one_sentence(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = {"train_dataset": noise(600), "max_steps": 150, "position": 3}
    made = trainer(tmp_path, cache_prefix="disk", prefix_cache_dir=str(small_disk), **how)
    with refused(ConfigurationError, f"{600 * 16 * 32 * 4:,} bytes", str(small_disk), "--prefix-cache-dir"):
        made.train()
    assert not list(small_disk.iterdir())
    # Other programs may fill it later.
    monkeypatch.setattr("transplant_hf.training.prefix.refuse_small_disk", lambda *args: None)
    with refused(CheckpointError, "the disk is full", "Nothing was left behind"):
        made.train()
    assert not list(small_disk.iterdir())


def test_gradient_checkpointing_and_accumulation_give_the_same_losses(tmp_path: Path) -> None:
    runs = []
    for number, fields in enumerate(
        ({}, {"gradient_checkpointing": True}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2})
    ):
        made = trainer(tmp_path / str(number), recipient(), position=2, **fields)
        made.train()
        runs.append(losses(made))
    assert runs[1] == pytest.approx(runs[0], rel=1e-4)
    assert runs[2] == pytest.approx(runs[0], rel=1e-4)


def test_hidden_states_that_a_killed_run_left_are_used(tmp_path: Path) -> None:
    kept = {"prefix_cache_dir": str(tmp_path / "states"), "position": 3}
    base, first = recipient(), trainer(tmp_path / "a", recipient(), **kept)
    first.train()
    second = trainer(tmp_path / "b", base, learning_rate=3e-3, **kept)
    second.train()
    assert first.cache_seconds > 0 == second.cache_seconds
    assert losses(second)[0] == pytest.approx(losses(first)[0])
    (file,) = (tmp_path / "states").iterdir()
    file.write_bytes(bytes(file.stat().st_size))  # as of another recipient of the same name
    third = trainer(tmp_path / "c", base, **kept)
    third.train()
    assert third.cache_seconds > 0 and losses(third) == pytest.approx(losses(first))
