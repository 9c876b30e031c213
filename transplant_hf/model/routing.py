"""`using("auto")`: each row of a batch uses the donor whose domain its prompt looks like.

The hidden state that enters the first donor is that of the recipient alone: the recipient's layers before it run once.
The domain that it looks like decides the choice of the call. If that is not sure, how well each donor predicts the
first tokens from it counts too. A cache that is filled keeps the choice for the calls that follow.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import Cache

from ..donor.signature import FEWEST_TOKENS, PROBE_TOKENS, Discriminant, Signature, describe_rows
from ..errors import ConfigurationError
from ..layer_map import RECIPIENT
from ..splice import Blueprint
from .calls import CACHE_ARGUMENTS
from .choice import Choice, choice_of, refuse_rows
from .output_form import OutputForm
from .prompt_gain import gains
from .using import CallChoices

AUTO = "auto"
# How far the hidden states of the probe may be from those that a signature was made with, in parts of their length.
# Quantization to 4 bits changes them by a tenth; another recipient or position by more than their length.
_TOLERANCE = 0.25
# The logarithm of odds by the signatures takes hidden states for a Gaussian, and is too large: it has a weight. Where
# its best choice is ahead of all others by more than `SURE`, it decides alone. Otherwise that of the prompt's tokens is
# added, and it favors a donor by at most as much. Chosen on held-out rows (docs/compose.md).
WEIGHT, SURE = 0.2, 8.0


class Route(NamedTuple):
    """Where a row went.

    Args:
        donor: The donor's name; `None` for the untouched recipient.
        score: The logarithm of the odds that the prompt is text for the donor and not for the recipient; the highest of
            all donors. NaN for a prompt that is too short.
    """

    donor: str | None
    score: float


class _ProbeRead(Exception):  # noqa: N818 - not an error
    """Ends a forward pass once the hidden state of the probe is known."""


class Router:
    """Chooses donors by the hidden state that enters the first of them.

    Args:
        signatures: By donor name.
        strengths: The strength of each donor where it is used.
        threshold: The score from which on a row uses a donor.
        place: The names of the modules from the model to the layers, and the number of the first donor's first layer.
    """

    def __init__(
        self,
        signatures: Mapping[str, Signature],
        strengths: Mapping[str, float],
        threshold: float,
        place: tuple[tuple[str, ...], int],
    ) -> None:
        self.signatures, self.strengths, self.threshold, self.place = signatures, strengths, threshold, place
        self._discriminant = Discriminant(list(signatures.values()))

    def choose(self, choice: Choice, hidden: torch.Tensor, choices: CallChoices, form: OutputForm) -> Choice:
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
        scores = WEIGHT * self._discriminant.scores(rows)
        first, second = torch.nn.functional.pad(scores, (0, 1), value=self.threshold).topk(2).values.unbind(1)
        if len(unsure := (first - second <= SURE).nonzero()[:, 0]):
            ahead = (first[unsure, None] - max(self.threshold, 0) - SURE).clamp(min=0)
            gained = gains(choice.prompt.of(unsure), hidden[unsure], self.strengths, self.place, choices, form)
            scores[unsure] += (0 if gained is None else gained.to(scores)) - ahead
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


def read_probe(decoder: Any, place: tuple[Sequence[str], int], device: torch.device) -> torch.Tensor:
    """Describe tokens 0, 1, ... where they enter the first donor, `[hidden]`; the layers before it run."""
    me, found = threading.get_ident(), []

    def read(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == me:
            found.append((args[0] if args else kwargs["hidden_states"]).detach())
            raise _ProbeRead

    hook = getattr(decoder, place[0][-1])[place[1]].register_forward_pre_hook(read, with_kwargs=True, prepend=True)
    try:
        with torch.no_grad(), suppress(_ProbeRead):
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
    signatures = {
        part.name: Signature.from_dict(part.donor.record.signature or {}, f"donor {part.name!r}") for part in parts
    }
    running = blueprint.running(frozenset(disabled))
    number = next(n for n, stage in enumerate(running) if stage.slot.source != RECIPIENT)
    hidden = blueprint.recipient.config.get_text_config(decoder=True).hidden_size
    for name, signature in signatures.items():
        if signature.position != number or len(signature.domain) != hidden:
            raise ConfigurationError(
                f"the signature of donor {name!r} is for position {signature.position} (hidden size "
                f"{len(signature.domain)}); the first donor of this model runs at position {number} (hidden size "
                f"{hidden}), where rows are told apart. Sign the donor there: transplant-hf sign "
                f"{blueprint.part(name).spec.donor} --text TEXT --general TEXT --position {number}."
            )
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
