"""Parameters and optimizers that are sharded over processes, gathered for files and filled from them.

Everything here is collective: every process has to call it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..errors import ConfigurationError

__all__ = [
    "ZERO_3",
    "check_sharding",
    "fill",
    "gathered",
    "load_optimizer",
    "optimizer_state",
    "refuse_sharded",
    "unsharded",
]

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


def optimizer_state(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """Return the whole state of an optimizer of sharded parameters, on the CPU."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = get_optimizer_state_dict(model, optimizer.optimizer, options=options)
    return state


def load_optimizer(path: Path, model: nn.Module, optimizer: Any) -> None:
    """Read what `optimizer_state` returned back into an optimizer."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    state = torch.load(path, map_location="cpu", weights_only=True)
    set_optimizer_state_dict(model, optimizer.optimizer, state, options=StateDictOptions(full_state_dict=True))
