"""Checkpoints of a training run: they hold only what is trained, are complete or ignored, and belong to one run.

Parameters and optimizers that are sharded over processes are gathered for files and filled from them. That is
collective: every process has to call it.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..errors import CheckpointError, ConfigurationError, TrainingError
from ..numeric import is_finite
from ..storage import read_json, write_json, writing

__all__ = [
    "ZERO_3",
    "check_same_run",
    "check_sharding",
    "checkpoints",
    "fill",
    "gathered",
    "last_checkpoint",
    "load_optimizer",
    "load_trained",
    "refuse_sharded",
    "remove_checkpoints",
    "save_optimizer",
    "save_trained",
    "trained_parameters",
    "unsharded",
]

_TRAINED_FILE = "trained.safetensors"
_RUN_FILE = "transplant_run.json"
_STATE_FILE = "trainer_state.json"
_OPTIMIZER_FILE = "optimizer.pt"
_SCHEDULER_FILE = "scheduler.pt"
_DEEPSPEED_FILE = "latest"  # names the folder with the optimizer
# What may differ when a run is resumed: the first rows of a longer run are those of a shorter one.
_LENGTH = {"rows", "max_steps"}
_FOLDER = re.compile(r"checkpoint-(\d+)")


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_trained(folder: Path, tensors: Mapping[str, torch.Tensor], run: Mapping[str, Any]) -> None:
    """Write the trained parameters and what identifies the run."""
    bad = [name for name, tensor in tensors.items() if not is_finite(tensor)]
    if bad:
        raise TrainingError(
            f"{bad[0]}{f' and {len(bad) - 1} more' if len(bad) > 1 else ''} became NaN or infinite; no checkpoint was "
            "written, and the last one is unchanged. Lower the learning rate, and resume from it."
        )
    with writing(folder / _TRAINED_FILE, "Checkpoints before this one are unchanged."):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / _RUN_FILE, dict(run))
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / _TRAINED_FILE)


def load_trained(folder: Path, model: nn.Module) -> None:
    """Read trained parameters back into a model."""
    path, parameters = folder / _TRAINED_FILE, trained_parameters(model)
    try:
        tensors = load_file(path)
    except (FileNotFoundError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Resume from an earlier checkpoint.") from error
    shapes, expected = ({name: list(t.shape) for name, t in found.items()} for found in (tensors, parameters))
    differing = [name for name in sorted({*shapes, *expected}) if shapes.get(name) != expected.get(name)]
    if differing:
        name = differing[0]
        raise CheckpointError(
            f"{path} belongs to another run: {name!r} has shape {shapes.get(name)} there and {expected.get(name)} in "
            f"this run ({len(differing)} parameters differ)."
        )
    for name, parameter in parameters.items():
        fill(parameter, tensors[name])


def checkpoints(output: Path) -> list[tuple[int, Path]]:
    """Return the checkpoints in a run's folder, complete or not, each with its step."""
    if not output.is_dir():
        return []
    found = [(_FOLDER.fullmatch(path.name), path) for path in output.iterdir() if (path / _RUN_FILE).is_file()]
    return sorted((int(match[1]), path) for match, path in found if match)


def last_checkpoint(output: Path) -> Path | None:
    """Return the last complete checkpoint; a killed process may leave an incomplete newer one."""
    complete = [folder for step, folder in checkpoints(output) if _is_complete(folder, step)]
    return complete[-1] if complete else None


def remove_checkpoints(output: Path) -> None:
    """Remove a run's checkpoints from a folder, and the folder if it is empty then."""
    for _, folder in checkpoints(output):
        shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # it does not exist, or has other files
        output.rmdir()


def _is_complete(folder: Path, step: int) -> bool:
    # The state is written last: if it can be read, everything is there.
    optimizer = any((folder / name).is_file() for name in (_OPTIMIZER_FILE, _DEEPSPEED_FILE))
    if not optimizer or not all((folder / name).is_file() for name in (_TRAINED_FILE, _RUN_FILE, _STATE_FILE)):
        return False
    try:
        state = json.loads((folder / _STATE_FILE).read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(state, dict) and state.get("global_step") == step


def check_same_run(folder: Path, run: Mapping[str, Any]) -> None:
    """Refuse to resume from a checkpoint of another run; only the length of the run may differ."""
    saved = read_json(folder / _RUN_FILE, "the checkpoint's run")
    now = json.loads(json.dumps(dict(run)))
    differing = [name for name in sorted({*saved, *now} - _LENGTH) if saved.get(name) != now.get(name)]
    if differing:
        lines = "; ".join(f"{name}: {saved.get(name)!r} there, {now.get(name)!r} now" for name in differing)
        raise ConfigurationError(
            f"{folder} was written by a run with another configuration ({lines}). Use the same configuration, or start "
            "again in another folder."
        )
    step, steps = read_json(folder / _STATE_FILE, "the checkpoint's state").get("global_step"), now.get("max_steps")
    if isinstance(step, int) and isinstance(steps, int) and step > steps:
        raise ConfigurationError(
            f"{folder} is at step {step}, but this run ends at step {steps}. Train for more steps, or start again."
        )


ZERO_3 = (
    "DeepSpeed ZeRO-3 divides a model's weights while it is loaded, before a donor can be inserted. Use stage 2 in the "
    "DeepSpeed configuration, or FSDP2 (fsdp=True)."
)


def check_sharding(trainer: Any) -> None:
    """Refuse ways of sharding under which a part of a model cannot be trained, or its checkpoints not be resumed."""
    deepspeed = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    if deepspeed is not None and deepspeed.zero_stage == 3:
        raise ConfigurationError(ZERO_3)
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        return
    if plugin.fsdp_version != 2:
        raise ConfigurationError(
            'FSDP 1 merges parameters, which donors need one by one. Use fsdp_config={"version": 2}.'
        )
    if plugin.cpu_ram_efficient_loading:
        raise ConfigurationError(
            "cpu_ram_efficient_loading leaves the weights out of all processes but one, and each computes hidden "
            'states before FSDP shards the model. Use fsdp_config={"cpu_ram_efficient_loading": False}.'
        )


def refuse_sharded(model: nn.Module) -> None:
    """Refuse a model that was loaded in parts: a donor is inserted before the model is divided."""
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ConfigurationError(
            f"this {type(model).__name__} is divided over processes already (DistributedConfig, fully_shard), and a "
            "donor has to be inserted before. Load it without, and train with fsdp=True."
        )


def gathered(parameters: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return whole tensors, on the CPU where they were sharded."""
    return {
        name: value.full_tensor().detach().cpu() if isinstance(value, DTensor) else value.detach()
        for name, value in parameters.items()
    }


@torch.no_grad()
def fill(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Copy a whole tensor into a parameter, of which each process may hold a part."""
    if isinstance(parameter, DTensor):
        value = distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    parameter.copy_(value)


@contextmanager
def unsharded(module: nn.Module, needed: bool) -> Iterator[None]:
    """Replace a module's sharded parameters by whole ones inside a `with` block, in the processes that need them."""
    kept: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for owner in module.modules():
            for name, parameter in owner.named_parameters(recurse=False):
                if isinstance(parameter, DTensor):
                    whole = gathered({name: parameter})[name]
                    if needed:
                        kept.append((owner, name, parameter))
                        owner._parameters[name] = nn.Parameter(whole, parameter.requires_grad)
        yield
    finally:
        for owner, name, parameter in kept:
            owner._parameters[name] = parameter


def save_optimizer(trainer: Any, folder: Path) -> None:
    """Write the whole state of an optimizer of sharded parameters: Trainer's own way writes the whole model too."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_optimizer_state_dict(trainer.model, trainer.optimizer.optimizer, options=options)
    if trainer.args.should_save:
        torch.save(state, folder / _OPTIMIZER_FILE)
        torch.save(trainer.lr_scheduler.state_dict(), folder / _SCHEDULER_FILE)


def load_optimizer(trainer: Any, folder: Path) -> None:
    """Read what `save_optimizer` wrote."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    state = torch.load(folder / _OPTIMIZER_FILE, map_location="cpu", weights_only=True)
    options = StateDictOptions(full_state_dict=True)
    set_optimizer_state_dict(trainer.model, trainer.optimizer.optimizer, state, options=options)
    trainer.lr_scheduler.load_state_dict(torch.load(folder / _SCHEDULER_FILE, weights_only=True))
