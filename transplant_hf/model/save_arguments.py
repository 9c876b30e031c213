"""The arguments of `save_pretrained`: where Transformers does not write the files, each is honored or refused."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..errors import ConfigurationError

PUSH_ARGS = ("commit_message", "commit_description", "private", "token", "revision", "create_pr")

_HONORED = ("is_main_process", "max_shard_size", "save_original_format", "save_peft_format", "state_dict", "token")
# What else Transformers knows or knew: the values that ask for nothing else than what is done, and what to do instead.
_FIXED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    **dict.fromkeys((*PUSH_ARGS, "repo_id"), ((None, False), "it goes with push_to_hub=True")),
    "variant": ((None,), "a variant is a weight file of a plain checkpoint. Save into a folder of its own instead"),
    "distributed_checkpoint": ((None, False), "pass state_dict= with gathered weights instead"),
    "safe_serialization": ((None, True), "weights are always written as safetensors"),
    "save_function": ((None,), "weights are always written as safetensors; is_main_process= says who writes"),
}
# Their functions for `save_function` let the main process alone write, as `is_main_process` does.
_KNOWN_WRITERS = ("accelerate", "torch", "torch_xla")


def by_name(native: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return all arguments by their names."""
    parameters = list(inspect.signature(native).parameters.values())[1:]
    names = [one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD]
    twice = [name for name in names[: len(args)] if name in kwargs]
    if len(args) > len(names) or twice:
        wrong = f"{twice[0]!r} is given twice" if twice else f"{len(args) + 1} positional arguments are too many"
        raise ConfigurationError(f"save_pretrained: {wrong}. Pass arguments by name: {', '.join(names)}.")
    return {**dict(zip(names, args, strict=False)), **kwargs}


def refuse_arguments(what: str, kwargs: Mapping[str, Any]) -> None:
    """Refuse what a save that Transformers does not write cannot honor."""
    wrong = []
    for name, value in kwargs.items():
        allowed, advice = _FIXED.get(name, ((), ""))
        module = str(getattr(value, "__module__", "")).partition(".")[0]
        if name in _HONORED or any(value is one for one in allowed):
            continue
        if name == "save_function" and module in _KNOWN_WRITERS:
            continue
        if not advice:
            close = difflib.get_close_matches(name, (*_HONORED, *_FIXED), 1)
            advice = f"there is no such argument{f' (is {close[0]} meant?)' if close else ''}"
        wrong.append(f"{name}={value!r}: {advice}")
    if wrong:
        raise ConfigurationError(f"{what} cannot be saved with {'; '.join(wrong)}.")


def checked_state(model: Any, given: Mapping[str, torch.Tensor] | None) -> dict[str, torch.Tensor] | None:
    """Return the whole `state_dict=` of a save; tied weights may be in it once."""
    if given is None:
        return None
    own: dict[str, torch.Tensor] = model.state_dict()
    lacking = [name for name in own if name not in given]
    twins = {tensor.data_ptr(): name for name, tensor in own.items() if name in given} if lacking else {}
    twins.pop(0, None)  # without memory
    state = {**given, **{name: given[twins[own[name].data_ptr()]] for name in lacking if own[name].data_ptr() in twins}}
    shapes = {
        name: (list(state[name].shape), list(tensor.shape))
        for name, tensor in own.items()
        if name in state and tensor.numel() and state[name].shape != tensor.shape
    }
    unknown, missing = [name for name in state if name not in own], [name for name in own if name not in state]
    for names, wrong in ((unknown, "is no tensor of it"), (missing, "is missing"), (list(shapes), "has another shape")):
        if names:
            rest = f", and {len(names) - 1} more" if len(names) > 1 else ""
            both = f" ({shapes[names[0]][0]}, not {shapes[names[0]][1]})" if names[0] in shapes else ""
            raise ConfigurationError(
                f"state_dict= is not this {type(model).__name__}'s: {names[0]} {wrong}{both}{rest}. Pass what "
                "model.state_dict() of this very model has, gathered and without the prefixes of wrappers."
            )
    return state
