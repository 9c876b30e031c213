"""How much better each donor predicts the beginning of a prompt than the untouched recipient does.

The states that enter the first donor are known within a call: only the layers after them run again, with each donor,
for the first tokens of each row. They run in a shell of the model, whose layers before the donors pass the states on.
Shell and model share all other modules, and nothing in the model changes: other threads may run it at the same time.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ..donor.signature import TOKENS
from .choice import Choice, choice_of
from .output_form import OutputForm
from .using import CallChoices

_ROWS = 16  # at one time: logits of a large vocabulary take much memory
_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


class _OtherForm(Exception):  # noqa: N818 - not an error
    """Ends the measurement where layers return more than a hidden state."""


class Prompt(NamedTuple):
    """What a call is made with, for the router.

    Args:
        mask: Which tokens are no padding, `[rows, tokens]`.
        ids: The tokens, `[rows, tokens]`; `None` if the call has embeddings instead.
        model: The model with its head.
    """

    mask: torch.Tensor | None
    ids: torch.Tensor | None
    model: Any

    def of(self, rows: torch.Tensor) -> Prompt:
        """Return some rows, by their numbers."""
        mask, ids = (None if one is None else one[rows.to(one.device)] for one in self[:2])
        return Prompt(mask, ids, self.model)


def gains(
    prompt: Prompt,
    hidden: torch.Tensor,
    strengths: Mapping[str, float],
    place: tuple[Sequence[str], int],
    choices: CallChoices,
    form: OutputForm,
) -> torch.Tensor | None:
    """Return how much donors lower the loss of the first tokens, summed, `[rows, donors]`.

    Args:
        prompt: The prompt.
        hidden: What enters the first donor, `[rows, tokens, hidden]`.
        strengths: The donors, each with its strength.
        place: The names of the modules from the model to the layers, and the number of the first donor's first layer.
        choices: Those of the model, within the call.
        form: How layers return their hidden state.

    Returns:
        `None` where tokens are not known or the model has no head for them, and for models that are being trained,
        whose modules are wrapped, or whose layers return more than a hidden state.
    """
    if not _can_measure(prompt, hidden, place[0]):
        return None
    ids, mask, states = _beginning(prompt, hidden.detach())
    losses = []
    try:
        for name in (None, *strengths):
            choice = choice_of({one: strength * (one == name) for one, strength in strengths.items()})
            parts = zip(ids.split(_ROWS), mask.split(_ROWS), states.split(_ROWS), strict=True)
            found = [_loss(prompt.model, one, two, three, choice, place, choices, form) for one, two, three in parts]
            losses.append(torch.cat(found))
    except _OtherForm:
        return None
    return losses[0][:, None] - torch.stack(losses[1:], 1)


def _can_measure(prompt: Prompt, hidden: torch.Tensor, path: Sequence[str]) -> bool:
    model, ids = prompt.model, prompt.ids
    if model is None or model.training or ids is None or ids.shape != hidden.shape[:2] or model.device != hidden.device:
        return False
    modules = [model]
    for name in path[:-1]:
        modules.append(modules[-1]._modules[name])
    # A wrapper, as of Accelerate for a model on several devices, would call the module itself.
    return model.get_output_embeddings() is not None and not any("forward" in vars(module) for module in modules)


def _beginning(prompt: Prompt, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the first tokens of each row that are no padding: ids, mask and states."""
    ids, mask = prompt.ids, prompt.mask
    assert ids is not None
    if mask is None:
        return ids[:, :TOKENS], torch.ones_like(ids[:, :TOKENS]), hidden[:, :TOKENS]
    mask = mask.to(ids.device) != 0
    order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)[:, : min(TOKENS, int(mask.sum(1).max()))]
    return ids.gather(1, order), mask.gather(1, order).to(ids.dtype), hidden[torch.arange(len(ids))[:, None], order]


@torch.no_grad()
def _loss(
    model: Any,
    ids: torch.Tensor,
    mask: torch.Tensor,
    states: torch.Tensor,
    choice: Choice,
    place: tuple[Sequence[str], int],
    choices: CallChoices,
    form: OutputForm,
) -> torch.Tensor:
    """Return the loss of each row, summed over its tokens, with one choice of donors."""
    rest = _rest_of(model, *place, states, form)
    before = choices.current()
    assert before is not None
    choices.change_call(choice)
    try:
        # Without the context of the call, to which what it records of layers belongs.
        given = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        logits = contextvars.Context().run(lambda: rest(**given)).logits[:, :-1].float()
    finally:
        choices.change_call(before)
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return torch.where(mask[:, 1:] != 0, losses, 0.0).sum(1)


def _rest_of(model: Any, path: Sequence[str], first: int, states: torch.Tensor, form: OutputForm) -> Any:
    """A shell of a model whose layers before the first donor return these states."""
    shell = owner = _shell(model)
    for name in path[:-1]:
        owner._modules[name] = owner = _shell(owner._modules[name])
    layers = list(owner._modules[path[-1]])
    for number in range(first):
        layers[number] = _passing(layers[number], states, form)
    owner._modules[path[-1]] = nn.ModuleList(layers)
    return shell


def _shell(module: nn.Module) -> Any:
    """A module with the attributes and submodules of another one, and with no hooks."""
    kind: Any = type(module)
    shell = kind.__new__(kind)
    vars(shell).update(vars(module))
    vars(shell).update({name: type(vars(module)[name])() for name in _HOOKS}, _modules=dict(module._modules))
    return shell


def _passing(layer: nn.Module, states: torch.Tensor, form: OutputForm) -> Any:
    """A layer that returns these states; it runs only to learn in what form."""
    run: Callable[..., Any] = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not form.known:
            form.learn(run(*args, **kwargs))
            if not form.known:
                raise _OtherForm
        return form.wrap(states)

    passing = _shell(layer)
    passing.forward = forward
    return passing
