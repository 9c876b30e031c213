"""Find the output weights of a decoder layer, and the values with which the layer is the identity.

They are found by experiment, not by name. All weights are set to values with which the modules inside the layer return
zeros. Then the weights get their own values back, those of the module that is called first before others, if the layer
stays the identity. The others are the output weights: `o_proj` and `down_proj`, both `c_proj`, fused experts.

In some layers a norm follows an output projection (Gemma 3, OLMo 2, GLM-4). It gives a projection of almost zero its
full size, so that one step away from zero the layer would add as much as a trained one. The norm is called later, so
its weight takes the place of the projection: 0, or -1 in a norm that multiplies by 1 + weight.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedModel

from ..errors import BUILD_ERRORS, CheckpointError, CompatibilityError
from .anatomy import Fingerprint, fingerprint, is_layer_number
from .quantized import is_packed, is_quantized
from .stack import decoder_stack, eval_mode, max_context_length, text_config

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_SEARCH_SEED, _CHECK_SEED = 0, 1
_BATCH, _TOKENS = 3, 8

Path = tuple[int | str, ...]
Stream = tuple[Path, Path]
Weights = dict[str, torch.Tensor]


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
    chosen = tuple(f"{stack_path}.{number}." for number in numbers)
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise CheckpointError(
                f"{name} is offloaded or was never loaded; the model must run for its output weights to be found. "
                "Load it without offload first."
            )
        packed = is_packed(parameter) and (is_quantized(model) or not parameter.is_floating_point())
        if packed and name.startswith(chosen):
            raise CheckpointError(f"{name} is quantized ({parameter.dtype}); a donor needs full precision.")


def _kind(layer: nn.Module, number: int) -> Fingerprint:
    """The structure of a layer without its number: equal for two layers of one kind."""
    return {name: value for name, value in fingerprint(layer).items() if not is_layer_number(name, value, number)}


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


@dataclasses.dataclass(frozen=True)
class Call:
    """How a model called a layer."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    streams: tuple[Stream, ...]  # what goes on to the next layer: its place in the arguments and in the output


def record_calls(model: PreTrainedModel, stack: nn.ModuleList, numbers: Collection[int], seed: int) -> dict[int, Call]:
    """Run a model on a few random tokens and record the calls of some of its layers."""
    # The identity of objects shows what one layer passes to the next, so they are kept until all have run.
    entered: dict[int, Any] = {}
    left: dict[int, Any] = {}
    calls: dict[int, Call] = {}

    def enter(number: int, args: Any, kwargs: Any) -> None:
        if number not in entered:
            entered[number] = (args, kwargs)
            calls[number] = Call(_copied(args), _copied(kwargs), ())

    def leave(number: int, output: Any) -> None:
        left.setdefault(number, output)

    with ExitStack() as hooks:
        for number, layer in enumerate(stack):
            before = layer.register_forward_pre_hook(
                lambda _, args, kwargs, number=number: enter(number, args, kwargs), with_kwargs=True
            )
            after = layer.register_forward_hook(lambda _, args, output, number=number: leave(number, output))
            hooks.callback(before.remove)
            hooks.callback(after.remove)
        _run(model, seed)
    streams = _streams(entered, left)
    if len(streams) > 1:
        used = {place for number, call in calls.items() for place in Replay(stack[number], call).uses(streams)}
        streams = tuple(stream for stream in streams if stream in used)
    return {number: dataclasses.replace(calls[number], streams=streams) for number in numbers if number in calls}


def _run(model: PreTrainedModel, seed: int) -> None:
    try:
        model(input_ids=_some_tokens(model, seed), use_cache=False)
    except BUILD_ERRORS as error:  # what its own code raises for tokens only
        raise CompatibilityError(
            f"{type(model).__name__} cannot run on tokens only, which shows what its layers add to the hidden state: "
            f'{type(error).__name__}: {error}. Start the donor as a copy: init="copy" (--init copy).'
        ) from error


def _some_tokens(model: PreTrainedModel, seed: int) -> torch.Tensor:
    """Random tokens, `[batch, tokens]`, no special ones: those may stand for an image, or hide others."""
    text = text_config(model.config)
    special = set(_special_tokens(model.config.to_dict()))
    usual = [token for token in range(min(text.vocab_size, 1000)) if token not in special]
    length = min(_TOKENS, max_context_length(model.config) or _TOKENS)
    chosen = torch.randint(len(usual), (_BATCH, length), generator=torch.Generator().manual_seed(seed))
    return torch.tensor(usual)[chosen].to(model.device)


def _special_tokens(fields: Mapping[str, Any]) -> Iterator[int]:
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from _special_tokens(value)
        elif str(name).endswith(("token_id", "token_index")):
            yield from (n for n in (value if isinstance(value, list) else [value]) if isinstance(n, int))


def _streams(entered: Mapping[int, Any], left: Mapping[int, Any]) -> tuple[Stream, ...]:
    """Find the parts of a layer's output that are arguments of the next layer: the same tensor objects."""
    ran = [number for number in entered if number in left]
    found: dict[Stream, None] = {}
    for number, following in itertools.pairwise(ran):
        given = {id(tensor): place for place, tensor in _tensors(entered[following])}
        for place, tensor in _tensors(left.get(number)):
            if id(tensor) in given:
                found[given[id(tensor)], place] = None
    # A single layer, or a model that changes the hidden state between layers: by convention it comes first.
    for number in ran[:1]:
        start, to = (next((place for place, _ in _tensors(side[number])), None) for side in (entered, left))
        if start is not None and to is not None and start not in {known for known, _ in found}:
            found[start, to] = None
    return tuple(found)


class Replay:
    """A layer, called as its model called it."""

    def __init__(self, layer: nn.Module, call: Call) -> None:
        self.layer = layer
        self.call = call

    @functools.cached_property
    def nonzero_weights(self) -> Weights:
        """Small values for parameters that are all 0 or -1, such as new biases and output weights of an identity."""
        generator = torch.Generator().manual_seed(0)
        return {
            name: (0.02 * torch.randn(parameter.shape, generator=generator)).to(parameter)
            for name, parameter in self.layer.named_parameters()
            if _is_all(parameter, 0.0) or _is_all(parameter, -1.0)
        }

    def changed(self, values: Mapping[str, float], *, as_it_is: bool = False) -> list[Path]:
        """Return what the layer changes if some of its parameters have constant values, by its place in the output."""
        output = dict(_tensors(self._run(values, {} if as_it_is else self.nonzero_weights)))
        given = dict(_tensors((self.call.args, self.call.kwargs)))
        return [to for start, to in self.call.streams if not _same(given.get(start), output.get(to))]

    def uses(self, streams: Sequence[Stream]) -> list[Stream]:
        """Return the streams that this layer uses: its output changes with them."""
        usual = dict(_tensors(self._run({}, {})))
        found = []
        for start, to in streams:
            changed = dict(_tensors(self._run({}, {}, flip=start)))
            if not all(_same(tensor, changed.get(place)) for place, tensor in usual.items()):
                found.append((start, to))
        return found

    def called(self) -> list[str]:
        """Return the paths of the modules with parameters of their own that the layer calls, by the last calls."""
        order: dict[str, None] = {}

        def note(path: str) -> None:
            order.pop(path, None)
            order[path] = None

        with ExitStack() as hooks:
            for path, module in self.layer.named_modules():
                if path and own_parameters(module):
                    hook = module.register_forward_pre_hook(lambda _, args, path=path: note(path))
                    hooks.callback(hook.remove)
            self._run({}, self.nonzero_weights)
        return list(order)

    def is_silent(self, path: str, names: Sequence[str], value: float) -> bool:
        """Whether a module inside the layer returns only zeros if its own parameters have a constant value."""
        given: list[bool] = []

        def note(output: Any) -> None:
            given.extend(bool(tensor.any()) for _, tensor in _tensors(output))

        with self.layer.get_submodule(path).register_forward_hook(lambda _, args, output: note(output)):
            self._run({f"{path}.{name}": value for name in names}, self.nonzero_weights)
        return bool(given) and not any(given)

    def _run(self, values: Mapping[str, float], others: Weights, flip: Path | None = None) -> Any:
        constants = {name: torch.full_like(self.layer.get_parameter(name), value) for name, value in values.items()}
        weights = {f"layer.{name}": tensor for name, tensor in {**others, **constants}.items()}
        return functional_call(_Bare(self.layer), weights, *_copied((self.call.args, self.call.kwargs), flip))


class _Bare(nn.Module):
    """A layer without its hooks: the hooks of a donor's first and last layer only work together."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer.forward(*args, **kwargs)


def _is_all(parameter: torch.Tensor, value: float) -> bool:
    # Most weights are told by their first number, without a copy of their size.
    return bool((parameter.flatten()[:1] == value).all()) and bool((parameter == value).all())


def own_parameters(module: nn.Module) -> list[str]:
    """Names of a module's own parameters, in the order in which they were registered."""
    return [name for name, _ in module.named_parameters(recurse=False)]


def _same(given: torch.Tensor | None, found: torch.Tensor | None) -> bool:
    if given is None or found is None or given.shape != found.shape:
        return False
    wide = torch.promote_types(given.dtype, found.dtype)
    return torch.equal(given.to(found.device, wide), found.to(wide))


def _tensors(value: Any, place: Path = ()) -> Iterator[tuple[Path, torch.Tensor]]:
    """Every tensor in nested tuples, lists and dictionaries, and its place there."""
    if isinstance(value, torch.Tensor):
        yield place, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, (*place, key))
    elif isinstance(value, tuple | list):
        for number, item in enumerate(value):
            yield from _tensors(item, (*place, number))


def _copied(value: Any, flip: Path | None = None, place: Path = ()) -> Any:
    """Copy the tensors in nested tuples, lists and dictionaries: a layer may change its arguments in place."""
    if isinstance(value, torch.Tensor):
        return value.flip(tuple(range(value.dim()))) if place == flip else value.clone()
    if type(value) is dict:
        return {key: _copied(item, flip, (*place, key)) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_copied(item, flip, (*place, number)) for number, item in enumerate(value))
    return value
