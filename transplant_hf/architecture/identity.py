"""Find the output weights of a decoder layer, and the values with which the layer is the identity.

They are found by experiment, not by name. The weights of modules are set to zero, the module called last first, until
the layer returns its input unchanged. Then each module gets its weights back, the earliest first, if the layer stays
the identity. The others are the output projections: `o_proj` and `down_proj`, both `c_proj`, fused experts.

In some layers a norm follows an output projection (Gemma 3, OLMo 2, GLM-4). It gives a projection of almost zero its
full size, so that one step away from zero the layer would add as much as a trained one. There the weight of the norm
takes the place of the projection: 0, or -1 in a norm that multiplies by 1 + weight.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence

from torch import nn
from transformers import PreTrainedModel

from ..errors import CheckpointError, CompatibilityError
from .context import eval_mode
from .fingerprint import Fingerprint, fingerprint, is_layer_number
from .gguf import is_quantized
from .quantized import is_packed
from .replay import Call, Replay, own_parameters, record_calls
from .stack import decoder_stack

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_SEARCH_SEED, _CHECK_SEED = 0, 1


@dataclasses.dataclass(frozen=True)
class _Part:
    """A module whose output can be made zero."""

    path: str  # the number of an expert is left out
    calls: tuple[str, ...]  # the paths of those that ran
    names: tuple[str, ...]  # their own parameters that must be zero
    matrix: bool  # whether one of these is a matrix; a norm has none
    value: float = 0.0  # with which the output is zero


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
            if not Replay(stack[number], others[number]).is_identity(weights[number], as_it_is=True):
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
    parts = _parts(replay)
    for allowed in ([part for part in parts if part.matrix], parts):
        for count in range(1, len(allowed) + 1):
            if replay.is_identity(_weights(layer, allowed[:count])):
                return _output_weights(replay, parts, allowed[:count])
    if len(replay.changed(_weights(layer, parts))) < len(call.streams):
        raise _no_identity(
            what, f"it passes {len(call.streams)} values to the next layer, and returns only some of them unchanged"
        )
    raise _no_identity(
        what,
        "with every output in it at zero it still changes the hidden state, like layers that normalize or scale it "
        "after the addition",
    )


def _parts(replay: Replay) -> list[_Part]:
    """List the modules of a layer whose output can be made zero, the last called first; experts count as one."""
    together: dict[str, list[str]] = {}
    for path in reversed(replay.called()):
        together.setdefault(_NUMBER.sub("#", path), []).append(path)
    parts = []
    for pattern, calls in together.items():
        own = own_parameters(replay.layer.get_submodule(calls[0]))
        names = _zeroed_for_silence(replay, calls[0], own)
        matrix = any(replay.layer.get_parameter(f"{calls[0]}.{name}").dim() > 1 for name in names)
        # A bias added to the output of inner modules does not make it zero alone, but may have to be zero too.
        parts.append(_Part(pattern, tuple(calls), names or tuple(own), matrix))
    # Weights of a module that is never called are used by its parent.
    uncalled = [path for path, _ in replay.layer.named_modules() if path and _NUMBER.sub("#", path) not in together]
    own_of = {path: tuple(own_parameters(replay.layer.get_submodule(path))) for path in uncalled}
    return parts + [_Part(_NUMBER.sub("#", path), (), own, False) for path, own in own_of.items() if own]


def _zeroed_for_silence(replay: Replay, path: str, names: Sequence[str]) -> tuple[str, ...]:
    """Return the own parameters of a module that must be zero for a zero output; empty if that is not enough."""
    start = next((n for n in reversed(range(len(names))) if replay.is_silent(path, names[n:])), len(names))
    needed = list(names[start:])
    for name in names[start:]:
        without = [other for other in needed if other != name]
        if without and replay.is_silent(path, without):
            needed = without
    return tuple(needed)


def _output_weights(replay: Replay, parts: Sequence[_Part], silent: Sequence[_Part]) -> dict[str, float]:
    """Return the weights of the parts without which the layer is not the identity, and norms where these follow."""
    kept = _needed(replay, silent)
    for part in kept.copy():
        others = [other for other in kept if other is not part]
        if replay.is_identity(_weights(replay.layer, others)):  # the norm of another part made it superfluous
            kept = others
        elif not replay.adds_in_proportion(_weights(replay.layer, [part]), _weights(replay.layer, others)):
            kept = [*others, _norm_after(replay, parts[: parts.index(part)], others) or part]
    weights = _weights(replay.layer, kept)
    # Numbered modules need not be experts: of two in sequence, zeros in the first would stop gradients of the second.
    for path in (path for part in kept if len(part.calls) > 1 for path in reversed(part.calls)):
        without = {name: value for name, value in weights.items() if name.rpartition(".")[0] != path}
        if replay.is_identity(without):
            weights = without
    return weights


def _needed(replay: Replay, parts: Sequence[_Part]) -> list[_Part]:
    """Drop modules whose weights need not be zero, the earliest called first."""
    kept = list(parts)
    for part in reversed(parts):
        fewer = [other for other in kept if other is not part]
        if replay.is_identity(_weights(replay.layer, fewer)):
            kept = fewer
    return kept


def _norm_after(replay: Replay, later: Sequence[_Part], others: Sequence[_Part]) -> _Part | None:
    """Return the last norm whose weights, at zero or -1, make the layer the identity together with other parts."""
    norms = [part for part in later if part.calls and not part.matrix]
    candidates = (dataclasses.replace(norm, value=value) for norm in norms for value in (0.0, -1.0))
    return next((norm for norm in candidates if replay.is_identity(_weights(replay.layer, [*others, norm]))), None)


def _weights(layer: nn.Module, parts: Iterable[_Part]) -> dict[str, float]:
    """The parameters of some parts and their values, in the layer's order; experts that no token chose are included."""
    own = {(part.path, name): part.value for part in parts for name in part.names}
    split = [(name, *name.rpartition(".")[::2]) for name, _ in layer.named_parameters()]
    found = {name: own.get((_NUMBER.sub("#", path), last)) for name, path, last in split}
    return {name: value for name, value in found.items() if value is not None}
