"""The ways in which people save some decoder layers of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.helpers import layers_of

__all__ = ["ALONE", "CHOSEN", "EXTRAS", "FROM_ZERO", "TREES", "WHOLE", "stack_of", "states_of"]

CHOSEN = (1, 2)
States = dict[int, dict[str, torch.Tensor]]


def stack_of(model: Any) -> str:
    """What stands before the layers' numbers in a model's own names."""
    return "transformer.h" if hasattr(model, "transformer") else "model.layers"


def states_of(model: Any) -> States:
    """The chosen layers' state dicts, by their numbers."""
    return {number: dict(layers_of(model)[number].state_dict()) for number in CHOSEN}


def module_list(model: Any) -> dict[str, torch.Tensor]:
    """As `nn.ModuleList` names them."""
    return dict(nn.ModuleList([layers_of(model)[number] for number in CHOSEN]).state_dict())


def named(model: Any) -> dict[str, torch.Tensor]:
    """The chosen layers' tensors by the names that the whole model has for them."""
    return {f"{stack_of(model)}.{n}.{name}": t for n, state in states_of(model).items() for name, t in state.items()}


def behind(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Put something before every name."""
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def in_every_layer(model: Any, wrapper: str) -> dict[str, torch.Tensor]:
    """Names with a wrapper around each layer."""
    return {f"{n}.{wrapper}.{name}": t for n, state in states_of(model).items() for name, t in state.items()}


def as_adapted(model: Any) -> dict[str, torch.Tensor]:
    """Names that PEFT leaves behind when its wrappers stay."""
    tensors = {}
    for name, tensor in named(model).items():
        head, _, last = name.rpartition(".")
        wrapped = f"{head}.base_layer.{last}" if tensor.dim() == 2 else name
        tensors[f"base_model.model.{wrapped}"] = tensor
    return tensors


def turned(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, in another order in memory."""
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


def sliced(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, cut out of something larger."""
    around = torch.full([length + 3 for length in tensor.shape], 7.0, dtype=tensor.dtype)
    part = around[tuple(slice(2, 2 + length) for length in tensor.shape)]
    part.copy_(tensor)
    return part


def changed(model: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """A list of state dicts whose tensors lie otherwise in memory."""
    return [{name: change(tensor) for name, tensor in state.items()} for state in states_of(model).values()]


def with_optimizer(model: Any) -> dict[str, Any]:
    """What a training loop writes."""
    blocks = [layers_of(model)[number] for number in CHOSEN]
    optimizer = torch.optim.AdamW([parameter for block in blocks for parameter in block.parameters()])
    for block in blocks:
        for parameter in block.parameters():
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    model.zero_grad(set_to_none=True)
    states = states_of(model)
    return {
        "epoch": 3,
        "layers": [states[n] for n in CHOSEN],
        "optimizer": optimizer.state_dict(),
        "optimizer_by_name": {"state": {f"{n}.{name}.exp_avg": t for n in CHOSEN for name, t in states[n].items()}},
        "rng": torch.get_rng_state(),
        "loss": [0.5, 0.25],
    }


def tied(model: Any) -> dict[str, Any]:
    """The same tensors under two names."""
    states = states_of(model)
    return {"best": {n: states[n] for n in CHOSEN}, "last": {n: states[n] for n in CHOSEN}}


# Layers that are numbered from 0: which they are must be said.
FROM_ZERO: dict[str, Callable[[Any], Any]] = {
    "a module list": module_list,
    "a list": lambda model: list(states_of(model).values()),
    "a tuple": lambda model: tuple(states_of(model).values()),
    "a list in layers": lambda model: {"layers": list(states_of(model).values()), "step": 3},
    "a list in donor_layers": lambda model: {"donor_layers": list(states_of(model).values()), "config": {"x": [1]}},
    "a module list in state_dict": lambda model: {"state_dict": module_list(model)},
    "two deep": lambda model: {"checkpoint": {"donor": {"layers": list(states_of(model).values())}}},
    "compiled": lambda model: behind("_orig_mod.", module_list(model)),
    "compiled layers": lambda model: in_every_layer(model, "_orig_mod"),
    "an attribute": lambda model: behind("donor.layers.", module_list(model)),
    "turned": lambda model: changed(model, turned),
    "sliced": lambda model: changed(model, sliced),
    "pickled module list": lambda model: nn.ModuleList([layers_of(model)[number] for number in CHOSEN]),
    "pickled blocks": lambda model: [layers_of(model)[number] for number in CHOSEN],
    "pickled blocks in layers": lambda model: {"layers": [layers_of(model)[number] for number in CHOSEN]},
    "beside an optimizer": with_optimizer,
}
FROM_ZERO = {f"{name}, from 0": make for name, make in FROM_ZERO.items()}

# Layers under their own numbers.
NUMBERED: dict[str, Callable[[Any], Any]] = {
    "by number": states_of,
    "by text": lambda model: {str(number): state for number, state in states_of(model).items()},
    "by layer_": lambda model: {f"layer_{number}": state for number, state in states_of(model).items()},
    "by padded number": lambda model: {f"layer_{number:03}": state for number, state in states_of(model).items()},
    "full names": named,
    "full names in model_state_dict": lambda model: {"model_state_dict": named(model), "epoch": 2},
    "parallel": lambda model: behind("module.", named(model)),
    "parallel and compiled": lambda model: behind("module._orig_mod.", named(model)),
    "sharded": lambda model: {
        f"_fsdp_wrapped_module.{stack_of(model)}.{n}._fsdp_wrapped_module._checkpoint_wrapped_module.{name}": tensor
        for n, state in states_of(model).items()
        for name, tensor in state.items()
    },
    "adapted": as_adapted,
    "tied": tied,
}

# All layers of a model, of which some are asked for.
WHOLE: dict[str, Callable[[Any], Any]] = {
    "whole": lambda model: model.state_dict(),
    "whole, without a head": lambda model: model.base_model.state_dict(),
    "whole, nested": lambda model: {"model": {"state_dict": model.state_dict()}},
    "whole, pickled": lambda model: model,
}
TREES = {**FROM_ZERO, **NUMBERED, **WHOLE}

# One layer, without any number.
ALONE: dict[str, Callable[[Any], Any]] = {
    "a layer": lambda model: layers_of(model)[2].state_dict(),
    "a layer in state_dict": lambda model: {"state_dict": layers_of(model)[2].state_dict(), "step": 1},
    "a wrapped layer": lambda model: behind("module.", dict(layers_of(model)[2].state_dict())),
    "a pickled layer": lambda model: layers_of(model)[2],
    "a list of one": lambda model: [layers_of(model)[2].state_dict()],
    "its number": lambda model: {2: layers_of(model)[2].state_dict()},
}

# What older checkpoints and wrappers hold besides: names, after the layer's own where they begin with a dot.
EXTRAS: dict[str, dict[str, torch.Tensor]] = {
    "gpt2": {
        ".attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.uint8),
        ".attn.masked_bias": torch.tensor(-1e4),
        "transformer.wte.weight": torch.ones(260, 32),
        "transformer.ln_f.weight": torch.ones(32),
        "lm_head.weight": torch.ones(260, 32),
    },
    "llama": {
        ".self_attn.rotary_emb.inv_freq": torch.ones(4),
        ".self_attn.rotary_emb.cos_cached": torch.ones(64, 8),
        "model.rotary_emb.inv_freq": torch.ones(4),
        "model.embed_tokens.weight": torch.ones(260, 32),
        "lm_head.weight": torch.ones(260, 32),
    },
    "gpt_oss": {
        ".self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.norm.weight": torch.ones(32),
        "wrapper.0.projection.weight": torch.ones(2),
        "lm_head.weight": torch.ones(260, 32),
    },
}
