"""Checkpoints of a training run: only what is trained, told whole from half-written, and bound to their run."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..errors import CheckpointError, ConfigurationError, TrainingError
from ..numeric import is_finite
from ..storage import read_json, write_json, writing

__all__ = [
    "check_same_run",
    "checkpoints",
    "last_checkpoint",
    "load_trained",
    "remove_checkpoints",
    "save_trained",
    "trained_tensors",
]

TRAINED_FILE = "trained.safetensors"
RUN_FILE = "transplant_run.json"
_STATE_FILE = "trainer_state.json"
_OPTIMIZER_FILE = "optimizer.pt"
# What may differ when a run is resumed: the first rows of a longer run are those of a shorter one.
_LENGTH = {"rows", "max_steps"}
_FOLDER = re.compile(r"checkpoint-(\d+)")


def trained_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_trained(
    folder: Path, model: nn.Module, run: Mapping[str, Any], state: Mapping[str, Any] | None = None
) -> None:
    """Write the trained parameters and what identifies the run.

    Args:
        folder: The checkpoint's folder.
        model: The model.
        run: What a run must agree in to be resumed.
        state: Gathered parameters where the model itself holds shards.

    Raises:
        TrainingError: A parameter is not finite; nothing is written.
        CheckpointError: The disk is full.
    """
    tensors = {
        name: (state[name] if state else parameter).detach().contiguous()
        for name, parameter in trained_tensors(model).items()
    }
    bad = [name for name, tensor in tensors.items() if not is_finite(tensor)]
    if bad:
        raise TrainingError(
            f"{bad[0]}{f' and {len(bad) - 1} more' if len(bad) > 1 else ''} became NaN or infinite; no checkpoint was "
            "written, the last one is as it was. Lower the learning rate, and resume from it."
        )
    with writing(folder / TRAINED_FILE, "Checkpoints before this one are unchanged."):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / RUN_FILE, dict(run))
        save_file(tensors, folder / TRAINED_FILE)


def load_trained(folder: Path, model: nn.Module) -> None:
    """Read trained parameters back into a model.

    Raises:
        CheckpointError: Other parameters than the model trains, or other shapes.
    """
    path = folder / TRAINED_FILE
    try:
        tensors = load_file(path)
    except (FileNotFoundError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Resume from an earlier checkpoint.") from error
    wanted = trained_tensors(model)
    strays = sorted(set(tensors) ^ set(wanted))
    if strays:
        raise CheckpointError(
            f"{path} holds {len(tensors)} parameters, this run trains {len(wanted)}; first difference: {strays[0]!r}. "
            "It is of another run."
        )
    with torch.no_grad():
        for name, parameter in wanted.items():
            if tensors[name].shape != parameter.shape:
                raise CheckpointError(
                    f"{path}: {name} has shape {list(tensors[name].shape)}, this run's has {list(parameter.shape)}."
                )
            parameter.copy_(tensors[name])


def last_checkpoint(output: Path) -> Path | None:
    """Return the last checkpoint that was written whole; a killed process may leave a newer one half-written."""
    whole = [(number, folder) for number, folder in checkpoints(output) if _is_whole(folder, number)]
    return max(whole)[1] if whole else None


def checkpoints(output: Path) -> list[tuple[int, Path]]:
    """Return the checkpoints that a run wrote into a folder, whole or not, each with its step."""
    if not output.is_dir():
        return []
    found = [(_FOLDER.fullmatch(path.name), path) for path in output.iterdir() if (path / RUN_FILE).is_file()]
    return [(int(match[1]), path) for match, path in found if match]


def remove_checkpoints(output: Path) -> None:
    """Remove a run's checkpoints from a folder, and the folder if nothing else is in it."""
    for _, folder in checkpoints(output):
        shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # it is not there, or holds other files
        output.rmdir()


def _is_whole(folder: Path, number: int) -> bool:
    # The state is written last, so that one that can be read tells that all is there.
    if not all((folder / name).is_file() for name in (TRAINED_FILE, RUN_FILE, _OPTIMIZER_FILE, _STATE_FILE)):
        return False
    try:
        state = json.loads((folder / _STATE_FILE).read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(state, dict) and state.get("global_step") == number


def check_same_run(folder: Path, run: Mapping[str, Any]) -> None:
    """Refuse to resume a run from a checkpoint of another; only how long it is may differ.

    Raises:
        ConfigurationError: With everything that differs.
        CheckpointError: The checkpoint is not whole.
    """
    saved = read_json(folder / RUN_FILE, "the checkpoint's run")
    now = json.loads(json.dumps(dict(run)))
    differing = [name for name in sorted({*saved, *now} - _LENGTH) if saved.get(name) != now.get(name)]
    if differing:
        lines = "; ".join(f"{name}: {saved.get(name)!r} there, {now.get(name)!r} now" for name in differing)
        raise ConfigurationError(
            f"{folder} was written by a run with another configuration ({lines}). Use the same configuration, or start "
            "anew in another folder."
        )
    step, steps = read_json(folder / _STATE_FILE, "the checkpoint's state").get("global_step"), now.get("max_steps")
    if isinstance(step, int) and isinstance(steps, int) and step > steps:
        raise ConfigurationError(
            f"{folder} is at step {step}, and this run shall end at step {steps}. Train for more steps, or start again."
        )
