"""`using("auto")`: each row of a batch uses the donor whose domain its prompt looks like.

The hidden state that enters the first donor is that of the recipient alone: the recipient's layers before it run once.
The domain that it looks like decides the choice of the call. If that is not sure, how well each donor predicts the
first tokens from it counts too. A cache that is filled keeps the choice for the calls that follow.
"""

from __future__ import annotations

import contextvars
import dataclasses
import functools
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import Cache

from ..donor.signature import FEWEST_TOKENS, PROBE_TOKENS, TOKENS, Discriminant, Signature, describe_rows
from ..errors import ConfigurationError
from ..layer_map import RECIPIENT
from ..splice import Blueprint
from .calls import CACHE_ARGUMENTS, OutputForm
from .choice import Choice, choice_of, refuse_rows
from .using import CallChoices

AUTO = "auto"
# How far the hidden states of the probe may be from those that a signature was made with, in parts of their length.
# Quantization to 4 bits changes them by a tenth; another recipient or position by more than their length.
_TOLERANCE = 0.25
# The logarithm of odds by the signatures takes hidden states for a Gaussian, and is too large: it has a weight. Where
# its best choice is ahead of all others by more than `_SURE`, it decides alone. Otherwise that of the prompt's tokens
# is added, and it favors a donor by at most as much. Chosen on held-out rows (docs/compose.md).
_WEIGHT, _SURE = 0.2, 8.0
_ROWS = 16  # of which losses are computed at one time: logits of a large vocabulary take much memory


class Route(NamedTuple):
    """Where a row went.

    Args:
        donor: The donor's name; `None` for the untouched recipient.
        score: The logarithm of the odds that the prompt is text for the donor and not for the recipient; the highest of
            all donors. NaN for a prompt that is too short.
    """

    donor: str | None
    score: float


class Prompt(NamedTuple):
    """What a call is made with."""

    mask: torch.Tensor | None  # which tokens are no padding, [rows, tokens]
    ids: torch.Tensor | None  # [rows, tokens]; `None` if the call has embeddings instead
    model: Any  # with its head


def odds_of(
    discriminant: Discriminant, rows: torch.Tensor, threshold: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the logarithm of odds that a row is text for a donor, by signatures alone, `[rows, donors]`.

    Also the rows for which these do not decide alone, `[rows]`; and what is taken from the scores of such rows before
    the gains of the donors are added, `[rows, 1]`.
    """
    scores = _WEIGHT * discriminant.scores(rows)
    first, second = nn.functional.pad(scores, (0, 1), value=threshold).topk(2).values.unbind(1)
    return scores, first - second <= _SURE, (first[:, None] - max(threshold, 0) - _SURE).clamp(min=0)


class _Stop(Exception):  # noqa: N818 - not an error
    """Ends a forward pass once the hidden state of the probe is known, or where layers return more than one."""


@dataclasses.dataclass(frozen=True, eq=False)
class Router:
    """Chooses donors by the hidden state that enters the first of them."""

    signatures: Mapping[str, Signature]  # by donor
    strengths: Mapping[str, float]  # of each donor where it is used
    threshold: float  # the score from which on a row uses a donor
    # The names of the modules from the model to the layers, and the number of the first donor's first layer.
    place: tuple[tuple[str, ...], int]

    @functools.cached_property
    def _discriminant(self) -> Discriminant:
        return Discriminant(list(self.signatures.values()))

    def choose(self, choice: Choice, hidden: torch.Tensor, choices: CallChoices) -> Choice:
        """Return the choice of a call, given what enters the first donor, `[rows, tokens, hidden]`."""
        mask = choice.prompt.mask
        if mask is not None and mask.shape[1] != hidden.shape[1]:
            raise ConfigurationError(
                f'using("auto") reads the prompt in the first call with a cache, but the attention mask has '
                f"{mask.shape[1]} tokens and the call {hidden.shape[1]}: the cache was filled before. Create a new one."
            )
        rows = describe_rows(hidden.detach(), mask)
        long = torch.tensor([hidden.shape[1]] * len(rows)) if mask is None else mask.sum(1).cpu()
        spoiled = (~rows.isfinite().all(1).cpu() & (long >= FEWEST_TOKENS)).nonzero()[:, 0].tolist()
        if spoiled:
            raise ConfigurationError(
                f"the hidden states that enter the first donor are not finite in rows {spoiled}, so that no donor can "
                "be chosen for them: the recipient's weights contain NaN or infinity, or its dtype is too small."
            )
        scores, unsure, excess = odds_of(self._discriminant, rows, self.threshold)
        if len(numbers := unsure.nonzero()[:, 0]):
            gained = self._gains(choice.prompt, numbers, hidden.detach(), choices)
            scores[numbers] += (0 if gained is None else gained.to(scores)) - excess[numbers]
        best, number = scores.max(1)
        names = list(self.signatures)
        routes = tuple(
            Route(names[n] if score > self.threshold else None, score)
            for score, n in zip(best.tolist(), number.tolist(), strict=True)
        )
        strengths = {name: [self.strengths[name] * (route.donor == name) for route in routes] for name in names}
        return dataclasses.replace(choice_of(strengths, AUTO), replacing=choice.replacing, routes=routes)

    def check(self, probe: torch.Tensor) -> None:
        """Refuse a model whose hidden states are not those that the signatures were made with."""
        for name, signature in self.signatures.items():
            away = float((probe - signature.probe).norm() / signature.probe.norm())
            if not away <= _TOLERANCE:
                raise ConfigurationError(
                    f"the signature of donor {name!r} was made with other hidden states at position "
                    f"{signature.position}: those of this model differ by {away:.2f} of their length, at most "
                    f"{_TOLERANCE} is allowed. It belongs to another recipient, or this one was changed. Sign the "
                    "donor with this one: transplant-hf sign DONOR --text TEXT --general TEXT --recipient RECIPIENT."
                )

    # -- How much better each donor predicts the beginning of a prompt than the untouched recipient does ---------------
    # The states that enter the first donor are known within a call: only the layers after them run again, with each
    # donor, for the first tokens of each row. They run in a shell of the model, whose layers before the donors pass the
    # states on. Shell and model share all other modules, and nothing in the model changes: other threads may run it at
    # the same time.

    def _gains(
        self, prompt: Prompt, numbers: torch.Tensor, hidden: torch.Tensor, choices: CallChoices
    ) -> torch.Tensor | None:
        """Return how much donors lower the loss of the first tokens of some rows, summed, `[rows, donors]`.

        `None` where tokens are not known or the model has no head for them, and for models that are being trained,
        whose modules are wrapped, or whose layers return more than a hidden state.
        """
        model, ids = prompt.model, prompt.ids
        if model is None or model.training or ids is None or model.get_output_embeddings() is None:
            return None
        modules = [model]
        for name in self.place[0][:-1]:
            modules.append(modules[-1]._modules[name])
        # A wrapper, as of Accelerate for a model on several devices, would call the module itself.
        wrapped = any("forward" in vars(module) for module in modules)
        if ids.shape != hidden.shape[:2] or model.device != hidden.device or wrapped:
            return None
        ids, mask, states = _beginning(prompt, numbers, hidden)
        losses = []
        try:
            for donor in (None, *self.strengths):
                choice = choice_of({one: strength * (one == donor) for one, strength in self.strengths.items()})
                parts = zip(ids.split(_ROWS), mask.split(_ROWS), states.split(_ROWS), strict=True)
                losses.append(torch.cat([self._loss(model, part, choice, choices) for part in parts]))
        except _Stop:
            return None
        return losses[0][:, None] - torch.stack(losses[1:], 1)

    @torch.no_grad()
    def _loss(self, model: Any, part: Sequence[torch.Tensor], choice: Choice, choices: CallChoices) -> torch.Tensor:
        """Return the loss of each row, summed over its tokens, with one choice of donors."""
        (ids, mask, states), (path, first) = part, self.place
        rest = owner = _shell(model)
        for name in path[:-1]:
            owner._modules[name] = owner = _shell(owner._modules[name])
        layers = list(owner._modules[path[-1]])
        layers[:first] = [_passing(layer, states, choices.form) for layer in layers[:first]]
        owner._modules[path[-1]] = nn.ModuleList(layers)
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


def _beginning(
    prompt: Prompt, numbers: torch.Tensor, hidden: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the first tokens of some rows that are no padding: ids, mask and states."""
    assert prompt.ids is not None
    ids, hidden = prompt.ids[numbers.to(prompt.ids.device)], hidden[numbers]
    if prompt.mask is None:
        return ids[:, :TOKENS], torch.ones_like(ids[:, :TOKENS]), hidden[:, :TOKENS]
    mask = prompt.mask[numbers.to(prompt.mask.device)].to(ids.device) != 0
    order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)[:, : min(TOKENS, int(mask.sum(1).max()))]
    return ids.gather(1, order), mask.gather(1, order).to(ids.dtype), hidden[torch.arange(len(ids))[:, None], order]


def _shell(module: nn.Module) -> Any:
    """A module with the attributes and submodules of another one, and with no hooks."""
    kind: Any = type(module)
    shell = kind.__new__(kind)
    vars(shell).update(vars(module))
    hooks = {name: held for name, held in vars(module).items() if "forward" in name and "hooks" in name}
    vars(shell).update({name: type(held)() for name, held in hooks.items()}, _modules=dict(module._modules))
    return shell


def _passing(layer: nn.Module, states: torch.Tensor, form: OutputForm) -> Any:
    """A layer that returns these states; it runs only to learn in what form."""
    run: Callable[..., Any] = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not form.known:
            form.learn(run(*args, **kwargs))
            if not form.known:
                raise _Stop
        return form.wrap(states)

    passing = _shell(layer)
    passing.forward = forward
    return passing


def read_probe(decoder: Any, place: tuple[tuple[str, ...], int], device: torch.device) -> torch.Tensor:
    """Describe tokens 0, 1, ... where they enter the first donor, `[hidden]`; the layers before it run."""
    me, found = threading.get_ident(), []

    def read(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == me:
            found.append((args[0] if args else kwargs["hidden_states"]).detach())
            raise _Stop

    hook = getattr(decoder, place[0][-1])[place[1]].register_forward_pre_hook(read, with_kwargs=True, prepend=True)
    try:
        with torch.no_grad(), suppress(_Stop):
            decoder(input_ids=torch.arange(PROBE_TOKENS, device=device)[None], use_cache=False)
    finally:
        hook.remove()
    return describe_rows(found[0])[0].cpu()


def routed_choice(blueprint: Blueprint, disabled: Collection[str], threshold: float = 0.0) -> Choice:
    """Return the choice of `using("auto")`, whose donors are chosen within the call."""
    blueprint.refuse_scaling()
    refuse_rows(blueprint)
    parts = [part for part in blueprint.parts if part.name not in disabled]
    if not parts:
        raise ConfigurationError('using("auto") has no donor to choose: all of them are switched off.')
    running = blueprint.running(frozenset(disabled))
    number = next(n for n, stage in enumerate(running) if stage.slot.source != RECIPIENT)
    hidden = blueprint.recipient.config.get_text_config(decoder=True).hidden_size
    signatures: dict[str, Signature] = {}
    for part in parts:
        if part.spec.mode == "replace":
            raise ConfigurationError(
                f"donor {part.name!r} replaces recipient layers, so that a row cannot leave it out: "
                f'using("auto") is for inserted donors. Switch it off: disable_transplants({part.name!r}).'
            )
        if part.donor.record.signature is None:
            raise ConfigurationError(
                f"donor {part.name!r} has no signature, by which a router knows its domain. Make one: "
                f"transplant-hf sign {part.spec.donor} --text TEXT --general TEXT."
            )
        signature = Signature.from_dict(part.donor.record.signature, f"donor {part.name!r}")
        if signature.position != number or len(signature.domain) != hidden:
            raise ConfigurationError(
                f"the signature of donor {part.name!r} is for position {signature.position} (hidden size "
                f"{len(signature.domain)}); the first donor of this model runs at position {number} (hidden size "
                f"{hidden}), where rows are told apart. Sign the donor there: transplant-hf sign "
                f"{part.spec.donor} --text TEXT --general TEXT --position {number}."
            )
        signatures[part.name] = signature
    strengths = {part.name: part.spec.strength for part in parts}
    router = Router(signatures, strengths, threshold, (tuple(blueprint.recipient.stack_path.split(".")), number))
    return Choice(dict.fromkeys(strengths, torch.nan), AUTO, router=router)


def mask_of_prompt(given: Mapping[str, Any]) -> torch.Tensor | None:
    """Return which tokens of a call are no padding, `[rows, tokens]`; refuse calls whose rows are not one text each."""
    for name in CACHE_ARGUMENTS:
        if given.get(name) is not None and not isinstance(given[name], Cache):
            raise ConfigurationError(
                f'using("auto") keeps the choice of each row with the cache, and a {type(given[name]).__name__} '
                f"({name}=) cannot hold it. Name the donors of each row: using(rows=[...])."
            )
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    if mask is not None and not (isinstance(mask, torch.Tensor) and mask.dim() == 2):
        raise ConfigurationError(
            'using("auto") reads padding from an attention mask [rows, tokens], and this call has another kind, as '
            "with a static cache. Use a dynamic cache, or name the donors of each row: using(rows=[...])."
        )
    packed = given.get("cu_seq_lens_q") is not None
    if isinstance(positions, torch.Tensor) and positions.dim() == 2:
        back = positions.diff(dim=1) < 0
        packed |= bool((back if mask is None else back & (mask[:, 1:] != 0) & (mask[:, :-1] != 0)).any())
    if packed:
        raise ConfigurationError(
            'using("auto") chooses donors for each row, and rows of this call hold several texts. Give each a row of '
            "its own."
        )
    return mask
