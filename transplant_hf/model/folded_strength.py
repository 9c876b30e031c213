"""The strength of a donor as weights, for a plain checkpoint.

If a donor's layer adds all its parts to the same hidden state, scaled output weights scale what the layer adds.
This holds where attention and MLP run in parallel on the same input (GPT-NeoX, Falcon, Cohere, Phi), and not where one
reads what the other added. Both are run on a few tokens and compared.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..architecture import decoder_stack, eval_mode, output_weights
from ..architecture.identity import Call, record_calls
from ..errors import CheckpointError, CompatibilityError
from ..splice import Blueprint

_TOLERANCE = 1e-5  # of what the layer adds, in float32
_SEED = 0


def folded_strengths(
    model: Any, blueprint: Blueprint, state: Mapping[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor] | None:
    """Return weights with which the donors compute the same at strength 1 as they do now at their strengths."""
    scaled = {name: blueprint.part(name) for name in blueprint.scaled}
    plain = blueprint.state(()).native and not blueprint.side_by_side_groups
    # At strength 0 the file would not have the donor's weights.
    if not plain or any(part.donor.num_layers > 1 or part.spec.strength == 0 for part in scaled.values()):
        return None
    path = blueprint.recipient.stack_path
    stack, layer_map = decoder_stack(model, path), blueprint.layer_map()
    numbers = {name: layer_map.layers_of(name)[0] for name in scaled}
    try:
        weights = output_weights(model, path, list(numbers.values()))
        with eval_mode(model):
            calls = record_calls(model, stack, list(numbers.values()), _SEED)
    except (CompatibilityError, CheckpointError):  # the output weights of a layer are unknown
        return None
    folded: dict[str, torch.Tensor] = {}
    for name, number in numbers.items():
        strength = scaled[name].spec.strength
        layer = stack[number]
        silent = weights[number]
        own = {key: _scaled(layer.get_parameter(key).detach(), silent[key], strength) for key in silent}
        if not _computes_the_same(layer, own, strength, calls[number]):
            return None
        for key, tensor in own.items():
            place = f"{path}.{number}.{key}"
            folded[place] = tensor if state is None else _scaled(state[place], silent[key], strength)
    return folded


def _scaled(weight: torch.Tensor, silent: float, strength: float) -> torch.Tensor:
    """Scale how far a weight is from the value with which the layer adds nothing."""
    return silent + (weight - silent) * strength


@torch.no_grad()
def _computes_the_same(layer: nn.Module, weights: Mapping[str, torch.Tensor], strength: float, call: Call) -> bool:
    """Run a layer with scaled output, and with scaled weights, and compare."""
    if len(call.streams) != 1:
        return False
    start, to = call.streams[0]
    bare = copy.deepcopy(layer).float().eval()
    bare._forward_hooks.clear()
    bare._forward_pre_hooks.clear()
    args, kwargs = _in_float((call.args, call.kwargs))
    entered = _at((args, kwargs), start).clone()
    added = _at(bare(*args, **kwargs), to) - entered
    for name, tensor in weights.items():
        bare.get_parameter(name).copy_(tensor)
    args, kwargs = _in_float((call.args, call.kwargs))
    found = _at(bare(*args, **kwargs), to) - entered
    return bool((found - strength * added).norm() <= _TOLERANCE * abs(strength) * added.norm())


def _at(value: Any, place: tuple[int | str, ...]) -> torch.Tensor:
    for key in place:
        value = value[key]
    found: torch.Tensor = value
    return found


def _in_float(value: Any) -> Any:
    """Copy nested tuples, lists and dictionaries, their floating point tensors in float32."""
    if isinstance(value, torch.Tensor):
        return value.float().clone() if value.is_floating_point() else value.clone()
    if type(value) is dict:
        return {key: _in_float(item) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_in_float(item) for item in value)
    return value
