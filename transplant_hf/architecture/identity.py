"""Find the output weights of a decoder layer, and the values with which the layer is the identity.

They are found by experiment, not by name. All weights are set to values with which the modules inside the layer return
zeros. Then the weights get their own values back, those of the module that is called first before others, if the layer
stays the identity. The others are the output weights: `o_proj` and `down_proj`, both `c_proj`, fused experts.

In some layers a norm follows an output projection (Gemma 3, OLMo 2, GLM-4). It gives a projection of almost zero its
full size, so that one step away from zero the layer would add as much as a trained one. The norm is called later, so
its weight takes the place of the projection: 0, or -1 in a norm that multiplies by 1 + weight.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from ..errors import CheckpointError, CompatibilityError
from .fingerprint import Fingerprint, fingerprint, is_layer_number
from .quantized import is_packed, is_quantized
from .replay import Call, Replay, own_parameters, record_calls
from .stack import decoder_stack, eval_mode

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_SEARCH_SEED, _CHECK_SEED = 0, 1


def output_weights(model: PreTrainedModel, stack_path: str, numbers: Sequence[int]) -> dict[int, dict[str, float]]:
    """Return the output weights of several layers, each with its value in a layer that is the identity.

    Layers of one kind are searched once.
    """
    stack = decoder_stack(model, stack_path)
    _refuse_unreadable(model, stack_path, numbers)
    weights: dict[int, dict[str, float]] = {}
    kinds = {number: _kind(stack[number], number) for number in numbers}
    with eval_mode(model):
        calls, others = (record_calls(model, stack, numbers, seed) for seed in (_SEARCH_SEED, _CHECK_SEED))
        for number in numbers:
            what = f"layer {number} of {type(model).__name__} ({stack_path}.{number}, {type(stack[number]).__name__})"
            if number not in calls or number not in others:
                raise _no_identity(what, "it did not run on plain tokens")
            known = next((other for other in weights if kinds[other] == kinds[number]), None)
            weights[number] = weights[known] if known is not None else _found(stack[number], calls[number], what)
            if Replay(stack[number], others[number]).changed(weights[number], as_it_is=True):
                raise _no_identity(what, f"without {', '.join(weights[number])} it still acts on other tokens")
    return weights


def _refuse_unreadable(model: PreTrainedModel, stack_path: str, numbers: Sequence[int]) -> None:
    """Refuse weights that are not there, and layers that are quantized; others may be."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise CheckpointError(
                f"{name} is offloaded or was never loaded; the model must run for its output weights to be found. "
                "Load it without offload first."
            )
    for number in numbers:
        for name, parameter in decoder_stack(model, stack_path)[number].named_parameters():
            if is_packed(parameter) and (is_quantized(model) or not parameter.is_floating_point()):
                raise CheckpointError(
                    f"{stack_path}.{number}.{name} is quantized ({parameter.dtype}); a donor needs full precision."
                )


def _kind(layer: nn.Module, number: int) -> Fingerprint:
    """The structure of a layer without its number: equal for two layers of one kind."""
    made_of = fingerprint(layer)
    return {name: value for name, value in made_of.items() if not is_layer_number(name, value, number)}


def _no_identity(what: str, reason: str) -> CompatibilityError:
    return CompatibilityError(
        f'{what} cannot start as the identity: {reason}. Start it as a copy: init="copy" (--init copy).'
    )


def _found(layer: nn.Module, call: Call, what: str) -> dict[str, float]:
    replay = Replay(layer, call)
    called = replay.called()
    # Weights of a module that is never called are used by its parent. Experts count as one: tokens choose a few.
    order = {_NUMBER.sub("#", path): place for place, path in enumerate(called)}
    weights: dict[str, float] = {}
    groups: dict[tuple[str, str], list[str]] = {}
    for path, module in layer.named_modules():
        own = own_parameters(module) if path else []
        value = _silencing_value(replay, path, own)
        for name in own:
            weights[f"{path}.{name}"] = value
            groups.setdefault((_NUMBER.sub("#", path), name), []).append(f"{path}.{name}")
    changed = replay.changed(weights)
    if changed:
        several = f"it passes {len(call.streams)} values to the next layer, and returns only some of them unchanged"
        normalized = (
            "with every output in it at zero it still changes the hidden state, like layers that normalize or scale it "
            "after the addition"
        )
        raise _no_identity(what, several if len(changed) < len(call.streams) else normalized)
    one_by_one = [[name for name in weights if name.rpartition(".")[0] == path] for path in called]
    # Numbered modules need not be experts: of two in sequence, zeros in the first would stop gradients of the second.
    for names in (*(groups[key] for key in sorted(groups, key=lambda key: order.get(key[0], -1))), *one_by_one):
        fewer = {name: value for name, value in weights.items() if name not in names}
        if len(fewer) < len(weights) and not replay.changed(fewer):
            weights = fewer
    return weights


def _silencing_value(replay: Replay, path: str, names: Sequence[str]) -> float:
    """The value of a module's own parameters with which it returns zeros: 0, or -1 in some norms."""
    if any(replay.layer.get_parameter(f"{path}.{name}").dim() > 1 for name in names):
        return 0.0
    return -1.0 if not replay.is_silent(path, names, 0.0) and replay.is_silent(path, names, -1.0) else 0.0
