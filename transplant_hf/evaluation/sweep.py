"""Donors at every position: the recipient runs once for all, each position only what differs."""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from tqdm import tqdm

from ..architecture import choose_block_length, eval_mode
from ..donor import Donor
from ..donor.tensors import MemoryTensors
from ..errors import CompatibilityError, ConfigurationError
from ..model.memory import remove_transplants, transplant
from ..numeric import finite_number, whole_number
from ..partial import PartialRun, hidden_states, running_only, stack_of
from ..partial.running import hidden_argument
from ..texts import TextSource
from .losses import batch_loss, check_vocabulary, device_of, rows_at_once
from .perplexity import Perplexity
from .reading import Opened, find_tokenizer, open_model, read_text
from .report import SweepReport, SweepRow
from .windows import Batch, Windows

__all__ = ["sweep"]

_QUICK = 1.0  # seconds, below which no progress bar is shown
# How many numbers the hidden states at all positions may be: one gibibyte in float32.
_MOST_STATES = 1 << 28
_PROBE_TOKENS = 8
_TOLERANCE = 1e-3


@dataclasses.dataclass
class _Place:
    """A donor at a position.

    Args:
        donor: Its name.
        position: How many recipient layers run before it.
        reason: Why it cannot go there.
        model: The transplant.
        own: The donor's running numbers in it.
        losses: The summed loss at each strength.
        seconds: How long its part took, at all strengths.
    """

    donor: str
    position: int
    reason: str | None = None
    model: Any = None
    own: Sequence[int] = ()
    part: PartialRun | None = None
    losses: dict[float, float] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0


def sweep(
    recipient: Any,
    donors: Any,
    text: Any,
    positions: Sequence[int] | None = None,
    strengths: Sequence[float] = (1.0,),
    *,
    mode: str = "insert",
    tokenizer: Any = None,
    block_length: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    max_tokens: int | None = None,
    revision: str | None = None,
    quiet: bool = False,
    **kwargs: Any,
) -> SweepReport:
    """Measure the perplexity of donors, each by itself, at all positions.

    The recipient's hidden states are computed once for each batch of text; each position runs the donor, the layers
    after it and the head alone.

    Args:
        recipient: The untouched recipient: a loaded model, a Hub id or a folder.
        donors: A `Donor`, its Hub id or folder, several of them, or `{name: donor}`; `None` for the donors of the
            transplant or donor repo that `recipient` names.
        text: `Blocks`, a stream of tokens, a `TextSource`, a file, a folder or the Hub id of a dataset.
        positions: By default all, 0..L.
        strengths: How much of what the donor adds is kept; each is measured.
        mode: "insert", or "replace" to run the donor instead of as many recipient layers.
        tokenizer: The recipient's tokenizer; by default the one beside it.
        block_length: As in `evaluate`.
        stride: As in `evaluate`.
        batch_size: Windows that are read at once.
        max_tokens: Read no further in the text.
        revision: The recipient's revision, where it is named.
        quiet: Show no progress bar of its own; Transformers keeps those of its loading.
        **kwargs: As in `from_pretrained`.

    Returns:
        The report; a donor that cannot go to a position has a row with the reason.

    Raises:
        ConfigurationError: The recipient holds donors already, or nothing to measure is named.
        CompatibilityError: A model whose layers hand on more than a hidden state.
        DataError: Text that is missing or too short, or of another model's tokens.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=8, n_head=2, vocab_size=16, n_positions=8))
        >>> report = sweep(model, Donor.from_model(model, [1], name="law"), torch.arange(16))
        >>> [row.position for row in report.rows]
        [0, 1, 2, 3]
    """
    positions = [whole_number(position, "each position") for position in positions] if positions is not None else None
    strengths = [finite_number(strength, "each strength") for strength in strengths]
    if not strengths or (positions is not None and not positions):
        raise ConfigurationError("a sweep needs at least one strength and one position.")
    began = time.perf_counter()
    opened = open_model(recipient, revision, kwargs)
    donors = _donors(opened, donors)
    model = opened.model
    tokenizer_of = functools.cache(lambda: tokenizer if tokenizer is not None else find_tokenizer(opened))
    tokens, start = read_text(text, model, tokenizer_of, max_tokens=max_tokens, token=kwargs.get("token"), quiet=quiet)
    length = choose_block_length(model.config, block_length) if isinstance(tokens, torch.Tensor) else block_length
    windows = Windows(tokens, length, stride, start, _name_of(text))
    check_vocabulary(model, windows, windows.name)
    with eval_mode(model):
        places = list(_places(model, donors, positions, mode))
        total = _run(model, places, windows, tuple(dict.fromkeys(strengths)), batch_size, quiet)
    rows = tuple(row for place in places for row in _rows(place, strengths, windows.num_predicted))
    about = {
        "recipient_model": opened.reference or opened.name,
        "revision": revision,
        "mode": mode,
        "block_length": windows.block_length,
        "stride": stride,
        "seconds": round(time.perf_counter() - began, 3),
    }
    return SweepReport(rows, total, windows.name, about)


def _name_of(text: Any) -> str | None:
    if isinstance(text, torch.Tensor):
        return None
    return str(TextSource.parse(os.fspath(text)).name if isinstance(text, str | os.PathLike) else text.name)


def _donors(opened: Opened, donors: Any) -> dict[str, Donor]:
    """Return the donors, and leave the recipient alone in a transplant that was named."""
    state = getattr(opened.model, "_transplant", None)
    if donors is not None and state is None:
        return _resident(donors, opened.hub.as_kwargs())
    if donors is not None or (state is not None and opened.reference is None):
        raise ConfigurationError(
            f"{opened.reference or 'this model'} holds donors already; a sweep starts from the untouched recipient. "
            "Name the recipient and the donors beside it, or a transplant or donor repo alone, to sweep its donors."
        )
    if state is None:
        raise ConfigurationError(f"{opened.name} holds no donors, and none are named beside it: there is no donor.")
    held = [
        Donor.from_model(opened.model, opened.model.layer_map.layers_of(name), name=name)
        for name in state.blueprint.splice.names
    ]
    found = _resident(held, {})
    remove_transplants(opened.model)
    return found


def _resident(donors: Any, hub: Mapping[str, Any]) -> dict[str, Donor]:
    """Open the donors and read each once, checked against its recorded sha256."""
    if isinstance(donors, Donor | str | os.PathLike):
        donors = [donors]
    pairs = donors.items() if isinstance(donors, Mapping) else [(None, donor) for donor in donors]
    found: dict[str, Donor] = {}
    for given, donor in pairs:
        opened = donor if isinstance(donor, Donor) else Donor.from_pretrained(donor, **hub)
        name = given or opened.name or f"donor {len(found)}"
        if name in found:
            raise ConfigurationError(f"two donors are named {name!r}. Name them: donors={{'name': donor}}.")
        record = dataclasses.replace(opened.record, files={}, name=name)
        found[name] = opened.replaced(record=record, store=MemoryTensors(opened.tensors()), source=None)
    if not found:
        raise ConfigurationError("there is no donor to sweep.")
    return found


def _places(
    recipient: Any, donors: Mapping[str, Donor], positions: Sequence[int] | None, mode: str
) -> Iterator[_Place]:
    """Put each donor at each position, or find out why it cannot go there."""
    layers = len(stack_of(recipient))
    for name, donor in donors.items():
        last = layers - (donor.num_layers if mode == "replace" else 0)
        first: _Place | None = None
        for position in dict.fromkeys(range(last + 1) if positions is None else positions):
            place = _Place(name, position)
            try:
                place.model = transplant(recipient, donor, position, mode, name=name)
            except (CompatibilityError, ConfigurationError) as error:
                place.reason = str(error)
            else:
                place.own = place.model.layer_map.layers_of(name)
                if first is not None:
                    _share(first, place)
                first = first or place
            yield place


def _share(first: _Place, other: _Place) -> None:
    """Let the donor's weights be those of another transplant: one copy of them is enough."""
    ours, theirs = stack_of(first.model), stack_of(other.model)
    for number, twin in zip(first.own, other.own, strict=True):
        modules = dict(ours[number].named_modules())
        for path, module in theirs[twin].named_modules():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[key] = modules[path]._parameters[key]


def _run(
    model: Any,
    places: Sequence[_Place],
    windows: Windows,
    strengths: tuple[float, ...],
    batch_size: int,
    quiet: bool,
) -> Perplexity:
    """Measure every place, and the recipient itself."""
    going = [place for place in places if place.reason is None]
    wanted = {place.position for place in going}
    rows = min(rows_at_once(model, windows, batch_size), _rows_of_states(model, windows, len(wanted)))
    runs = windows.num_batches(rows) * (len(going) + 1)
    total, seconds = 0.0, 0.0
    with (
        ExitStack() as parts,
        tqdm(total=runs, desc="Sweeping", unit="run", delay=_QUICK, disable=quiet, leave=False) as bar,
    ):
        for place in going:
            _start(place, model, next(windows.batches(1)), parts)
        for number, batch in enumerate(windows.batches(rows)):
            began = time.perf_counter()
            ids = batch.input_ids.to(device_of(model))
            logits, states = _states_and_logits(model, ids, wanted)
            total += batch_loss(logits, batch, number, windows.name)
            del logits
            seconds += time.perf_counter() - began
            bar.update()
            for place in going:
                _measure(place, ids, states[place.position], batch, strengths, number, windows.name)
                bar.update()
    return Perplexity(total / windows.num_predicted, windows.num_predicted, seconds)


def _states_and_logits(
    model: Any, ids: torch.Tensor, positions: Collection[int]
) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """Run a model once, and keep the hidden state at each position."""
    stack = stack_of(model)
    found: dict[int, torch.Tensor] = {}

    def before(position: int) -> Any:
        return lambda module, args, kwargs: found.__setitem__(position, hidden_argument(args, kwargs)[0])

    def after(module: Any, args: Any, output: Any) -> None:
        found[len(stack)] = output if isinstance(output, torch.Tensor) else output[0]

    hooks = [stack[p].register_forward_pre_hook(before(p), with_kwargs=True) for p in positions if p < len(stack)]
    hooks += [stack[-1].register_forward_hook(after)] if len(stack) in positions else []
    try:
        return model(input_ids=ids, use_cache=False).logits, found
    finally:
        for hook in hooks:
            hook.remove()


def _rows_of_states(model: Any, windows: Windows, positions: int) -> int:
    width = model.config.get_text_config(decoder=True).hidden_size
    return max(1, _MOST_STATES // (max(positions, 1) * windows.block_length * width))


def _start(place: _Place, recipient: Any, batch: Batch, parts: ExitStack) -> None:
    """Let only the donor and what follows it run, once it is seen that this gives what the whole model gives."""
    ids = batch.input_ids[:, :_PROBE_TOKENS].to(device_of(recipient))
    first = place.own[0]
    whole, states = _states_and_logits(place.model, ids, [first])
    numbers = range(first, len(stack_of(place.model)))
    place.part = parts.enter_context(running_only(place.model, numbers))
    alone = place.part(input_ids=ids, prefix_states=states[first], use_cache=False).logits
    difference = float((whole - alone).abs().max())
    if difference > _TOLERANCE * float(whole.abs().max()):
        raise CompatibilityError(
            f"layers {numbers[0]}..{numbers[-1]} by themselves give other logits than the whole model (difference "
            f"{difference:.2g}): layers of this model hand on more than a hidden state. Use evaluate at each position "
            "instead."
        )


def _measure(
    place: _Place,
    ids: torch.Tensor,
    entered: torch.Tensor,
    batch: Batch,
    strengths: tuple[float, ...],
    number: int,
    name: str,
) -> None:
    began = time.perf_counter()
    assert place.part is not None
    if strengths == (1.0,):
        logits = place.part(input_ids=ids, prefix_states=entered, use_cache=False).logits
        _add(place, 1.0, batch_loss(logits, batch, number, name))
    else:
        # The donor runs once for all strengths.
        after = place.own[-1] + 1
        left = hidden_states(place.model, ids, [after], prefix_states=entered)[after]
        with place.part.without(place.own):
            for strength in strengths:
                states = left if strength == 1.0 else entered + strength * (left - entered)
                logits = place.part(input_ids=ids, prefix_states=states, use_cache=False).logits
                _add(place, strength, batch_loss(logits, batch, number, name))
    place.seconds += time.perf_counter() - began


def _add(place: _Place, strength: float, loss: float) -> None:
    place.losses[strength] = place.losses.get(strength, 0.0) + loss


def _rows(place: _Place, strengths: Sequence[float], tokens: int) -> Iterator[SweepRow]:
    chosen = tuple(dict.fromkeys(map(float, strengths)))
    for strength in chosen:
        if place.reason is not None:
            yield SweepRow(place.donor, place.position, strength, reason=place.reason)
        else:
            found = Perplexity(place.losses[strength] / tokens, tokens, place.seconds / len(chosen))
            yield SweepRow(place.donor, place.position, strength, found)
