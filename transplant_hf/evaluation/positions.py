"""Measure donors at every position. The recipient runs once for all, and each position runs only what differs."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from transformers.utils import logging

from ..architecture import eval_mode, is_quantized
from ..display import position_numbers, progress_bar
from ..donor import Donor
from ..donor.place import recommendation
from ..donor.tensors import MemoryTensors
from ..errors import CompatibilityError, ConfigurationError
from ..model.in_memory import remove_transplants, transplant
from ..model.layers_in_files import layers_in_files
from ..numeric import finite_number, whole_number
from ..partial import PartialRun, hidden_states, stack_of
from ..partial.running import recorded_states
from .losses import Perplexity, batch_loss, check_vocabulary, input_device, max_rows
from .measurement import Measurement
from .models_and_texts import LoadedModel
from .reports import SweepReport, SweepRow
from .windows import Batch, Windows

__all__ = ["sweep"]

logger = logging.get_logger(__name__)

_MAX_STATES = 1 << 28  # numbers in the hidden states at all positions: one GiB in float32
_PROBE_TOKENS = 8
_TOLERANCE = 1e-3


def sweep(
    recipient: Any,
    donors: Any,
    text: Any,
    positions: Sequence[int] | None = None,
    strengths: Sequence[float] | None = None,
    *,
    mode: str | None = None,
    **options: Any,
) -> SweepReport:
    """Measure the perplexity of donors, one at a time, at all positions.

    The recipient's hidden states are computed once for each batch of text. Each position runs only the donor, the
    layers after it and the head.

    Args:
        recipient: The untouched recipient: a loaded model, a Hub id or a folder.
        donors: A `Donor`, its Hub id or folder, several of them, `{name: donor}`, or `{donor: position}` to measure a
            donor at that position only; `None` for the donors of the transplant or donor repo that `recipient` names.
        text: `Blocks`, a stream of tokens, a `TextSource`, a file, a folder or the Hub id of a dataset.
        positions: By default all, 0..L.
        strengths: The strengths to measure at each position; by default 1.
        mode: "insert" (the default), or "replace" to run the donor instead of the same number of recipient layers. A
            warning says so if a donor recommends another mode or strength at a position, and none is given.
        **options: The other arguments of `evaluate`, except `recipient`.

    Returns:
        The report; a donor that does not fit at a position has a row with the reason.

    Raises:
        ConfigurationError: The recipient has donors already, or there is nothing to measure.
        CompatibilityError: The model's layers pass on more than a hidden state.
        DataError: Text that is missing or too short, or has tokens of another model.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=8, n_head=2, vocab_size=16, n_positions=8))
        >>> report = sweep(model, Donor.from_model(model, [1], name="law"), torch.arange(16))
        >>> [row.position for row in report.rows]
        [0, 1, 2, 3]
    """
    positions = [whole_number(position, "each position") for position in positions] if positions is not None else None
    defaults = [name for name, value in (("mode", mode), ("strength", strengths)) if value is None]
    mode, strengths = mode or "insert", (1.0,) if strengths is None else strengths
    strengths = tuple(dict.fromkeys(finite_number(strength, "each strength") for strength in strengths))
    if not strengths or (positions is not None and not positions):
        raise ConfigurationError("a sweep needs at least one strength and one position.")
    began = time.perf_counter()
    named = _named_donors(donors)
    measurement = Measurement(recipient, {None: text}, positions=_all_positions(named, positions), **options)
    (windows,) = measurement.windows
    model, found = measurement.model, _donors_in_memory(measurement.loaded, named, positions, mode)
    for name, (donor, at) in found.items():
        _warn_of_defaults(name, donor, at, defaults)
    if is_quantized(model) or layers_in_files(model) is not None:
        reference, places = _measure_in_place(measurement, found, mode, strengths)
    else:
        check_vocabulary(model, windows)
        with eval_mode(model):
            places = list(_places(model, found, mode))
            reference = _measure_all(model, places, windows, strengths, measurement.batch_size, measurement.quiet)
    rows = [
        SweepRow(place.donor, place.position, strength, place.found.get(strength), place.reason)
        for place in places
        for strength in strengths
    ]
    about = measurement.about
    about = {
        "recipient_model": about.pop("model"),
        **about,
        "mode": mode,
        "block_length": windows.block_length,
        "seconds": round(time.perf_counter() - began, 3),
    }
    return SweepReport(tuple(rows), reference, windows.name, about)


# -- Donors and places ---------------------------------------------------------------------------------------------


_Named = list[tuple[Any, Any, Any]]
_Donors = Mapping[str, tuple[Donor, Sequence[int]]]  # with the positions at which each is measured


def _named_donors(donors: Any) -> _Named | None:
    """Return names, donors and positions as they are given; what is not given is `None`."""
    if donors is None:
        return None
    if isinstance(donors, Donor | str | os.PathLike):
        donors = [donors]
    if not isinstance(donors, Mapping):
        return [(None, donor, None) for donor in donors]
    named: _Named = []
    for key, value in donors.items():
        if isinstance(value, list | tuple):
            raise _spread(key, value, "")
        is_place = value is None or isinstance(value, int)  # {donor: position}, or {donor: None}
        named.append((None, key, value) if is_place else (key, value, None))
    return named


def _all_positions(named: _Named | None, positions: Sequence[int] | None) -> list[int]:
    """Return all positions that are measured, or only the first where that is 0."""
    own = [position for _, _, position in named or [(None, None, None)]]
    return [0] if positions is None and None in own else [*(positions or ()), *(p for p in own if p is not None)]


def _donors_in_memory(loaded: LoadedModel, named: _Named | None, positions: Sequence[int] | None, mode: str) -> _Donors:
    """Return the donors by name; take those of a transplant out of it."""
    model = loaded.model
    resident = getattr(model, "strengths", {})
    if named is None and resident and loaded.reference is not None:
        named = []
        for spec in model.transplant_config.donors:
            donor = Donor.from_model(model, model.layer_map.layers_of(spec.name))
            named.append((spec.name, donor.replaced(**recommendation(spec)), None))
    elif resident:
        raise ConfigurationError(
            f"{loaded.reference or 'this model'} has donors already; a sweep starts from the untouched recipient. "
            "Name the recipient and the donors, or a transplant or donor repo alone to sweep its donors."
        )
    elif named is None:
        raise ConfigurationError(f"{loaded.name} has no donors, and none are named. Name a donor to sweep.")
    _remove_donors(model)
    num_layers = len(stack_of(model))
    found: dict[str, tuple[Donor, Sequence[int]]] = {}
    for name, reference, position in named:
        is_donor = isinstance(reference, Donor)
        donor = reference if is_donor else Donor.from_pretrained(reference, **loaded.hub.as_kwargs())
        name = name or donor.name or f"donor {len(found)}"
        if isinstance(donor.position, tuple) and position is None and positions is None:
            raise _spread(name, donor.position, " To measure all of its layers at one place, name positions.")
        if name in found:
            raise ConfigurationError(
                f"two donors are named {name!r}. Name them, donors={{'name': donor}}, or rename a folder."
            )
        # Read once, and checked against the recorded sha256.
        record = dataclasses.replace(donor.record, files={}, name=name)
        in_memory = donor.replaced(record=record, store=MemoryTensors(donor.tensors()), source=None)
        last = num_layers - (donor.num_layers if mode == "replace" else 0)
        at = range(last + 1) if positions is None else dict.fromkeys(positions)
        found[name] = (in_memory, list(at) if position is None else [position])
    if not found:
        raise ConfigurationError("there is no donor to sweep.")
    return found


def _remove_donors(model: Any) -> None:
    if layers_in_files(model) is None:
        remove_transplants(model)
    else:  # a transplant also without donors: its layers in files belong to it
        for name in list(model.strengths):
            model.remove_donor(name)


def _spread(name: Any, positions: Sequence[int], more: str) -> ConfigurationError:
    return ConfigurationError(
        f"{name} is spread through the recipient, at positions {position_numbers(positions)}, and a sweep moves a "
        f"donor as one block of layers. Measure it where it is with evaluate.{more}"
    )


@dataclasses.dataclass
class _Place:
    """A donor at a position, and the perplexity at each strength."""

    donor: str
    position: int
    model: Any = None  # the transplant; None where the donor does not fit
    layers: Sequence[int] = ()  # the donor's running numbers in it
    reason: str | None = None
    found: dict[float, Perplexity] = dataclasses.field(default_factory=dict)


def _places(recipient: Any, donors: _Donors, mode: str, in_place: bool = False) -> Iterator[_Place]:
    """Put each donor at each position, or find out why it does not fit; `in_place` until the next one."""
    for name, (donor, positions) in donors.items():
        first: _Place | None = None
        for position in positions:
            try:
                model = transplant(recipient, donor, position, mode, name=name, strength=1.0, in_place=in_place)
            except (CompatibilityError, ConfigurationError) as error:
                yield _Place(name, position, reason=str(error))
                continue
            place = _Place(name, position, model, model.layer_map.layers_of(name))
            if not in_place:
                first = first or place
                _share_weights(first, place)
            yield place
            if in_place:
                model.remove_donor(name)


def _warn_of_defaults(name: str, donor: Donor, positions: Sequence[int], defaults: Collection[str]) -> None:
    """Say that a donor recommends another mode or strength at a position than the defaults that are measured."""
    settings = {"mode": (donor.mode, "insert"), "strength": (f"{donor.strength:g}", "1")}
    others = {name: values for name, values in settings.items() if name in defaults and values[0] != values[1]}
    if others and donor.position in positions:
        there, here = (", ".join(f"{name} {values[at]}" for name, values in others.items()) for at in (0, 1))
        logger.warning(
            f"donor {name!r} recommends {there} at position {donor.position}, and is measured with {here} there, as at "
            "every position. To measure what it recommends, set mode and strengths (--mode, --strengths)."
        )


def _share_weights(first: _Place, other: _Place) -> None:
    """Let two transplants of a donor share its weights, so that they are in memory once."""
    for number, twin in zip(first.layers, other.layers, strict=True):
        modules = dict(stack_of(first.model)[number].named_modules())
        for path, module in stack_of(other.model)[twin].named_modules():
            for key, _ in module.named_parameters(recurse=False, remove_duplicate=False):
                setattr(module, key, getattr(modules[path], key))


# -- Measuring -----------------------------------------------------------------------------------------------------


def _measure_all(
    model: Any, places: Sequence[_Place], windows: Windows, strengths: tuple[float, ...], batch_size: int, quiet: bool
) -> Perplexity:
    """Measure every place, and return the perplexity of the recipient."""
    fitting = [place for place in places if place.model is not None]
    positions = {place.position for place in fitting}
    width = model.config.get_text_config(decoder=True).hidden_size
    rows_of_states = _MAX_STATES // (max(len(positions), 1) * windows.block_length * width)
    rows = max(1, min(max_rows(model, windows, batch_size), rows_of_states))
    runs = windows.num_batches(rows) * (len(fitting) + 1)
    losses = [dict.fromkeys(strengths, 0.0) for _ in fitting]
    times, loss, seconds = [0.0] * len(fitting), 0.0, 0.0
    with ExitStack() as blocks, progress_bar(runs, "Sweeping", unit="run", quiet=quiet) as bar:
        parts = [_start_part(place, model, next(windows.batches(1)), blocks) for place in fitting]
        for number, batch in enumerate(windows.batches(rows)):
            began = time.perf_counter()
            ids = batch.input_ids.to(input_device(model))
            logits, states = _run(model, ids, positions)
            loss += batch_loss(logits, batch, number, windows.name)
            del logits
            seconds += time.perf_counter() - began
            bar.update()
            for index, (place, part) in enumerate(zip(fitting, parts, strict=True)):
                began = time.perf_counter()
                for strength, logits in _logits(place, part, ids, states[place.position], strengths):
                    losses[index][strength] += batch_loss(logits, batch, number, windows.name)
                times[index] += time.perf_counter() - began
                bar.update()
    tokens = windows.num_predicted
    for place, of_place, whole in zip(fitting, losses, times, strict=True):
        place.found = {s: Perplexity(lost / tokens, tokens, whole / len(strengths)) for s, lost in of_place.items()}
    return Perplexity(loss / tokens, tokens, seconds)


def _measure_in_place(
    measurement: Measurement, donors: _Donors, mode: str, strengths: tuple[float, ...]
) -> tuple[Perplexity, list[_Place]]:
    """Measure the recipient, and each place of a donor in it, one after the other: their weights cannot be shared."""
    model, places = measurement.model, []
    (reference,) = measurement.perplexities().values()
    try:
        for place in _places(model, donors, mode, in_place=True):
            places.append(place)
            for number in place.layers:
                stack_of(model)[number].to(input_device(model))
            for strength in strengths if place.layers else ():
                if strength != model.strengths[place.donor]:
                    model.set_strength(place.donor, strength)
                (place.found[strength],) = measurement.perplexities().values()
    finally:
        _remove_donors(model)
    return reference, places


def _run(model: Any, ids: torch.Tensor, positions: set[int]) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    with recorded_states(model, positions) as states:
        return model(input_ids=ids, use_cache=False).logits, states


def _start_part(place: _Place, recipient: Any, batch: Batch, blocks: ExitStack) -> PartialRun:
    """Let only the donor and what follows it run, and check that this gives what the whole model gives."""
    ids = batch.input_ids[:, :_PROBE_TOKENS].to(input_device(recipient))
    first = place.layers[0]
    whole, states = _run(place.model, ids, {first})
    numbers = range(first, len(stack_of(place.model)))
    part = blocks.enter_context(PartialRun(place.model, numbers))
    alone = part(input_ids=ids, prefix_states=states[first], use_cache=False).logits
    difference = float((whole - alone).abs().max())
    if difference > _TOLERANCE * float(whole.abs().max()):
        raise CompatibilityError(
            f"layers {numbers[0]}..{numbers[-1]} alone give other logits than the whole model (difference "
            f"{difference:.2g}): the layers of this model pass on more than a hidden state. Use evaluate at each "
            "position instead."
        )
    return part


def _logits(
    place: _Place, part: PartialRun, ids: torch.Tensor, entering: torch.Tensor, strengths: tuple[float, ...]
) -> Iterator[tuple[float, torch.Tensor]]:
    """Yield each strength and its logits; the donor runs once for all strengths."""
    after = place.layers[-1] + 1
    leaving = hidden_states(place.model, ids, [after], prefix_states=entering)[after]
    with part.without(place.layers):
        for strength in strengths:
            states = leaving if strength == 1.0 else entering + strength * (leaving - entering)
            yield strength, part(input_ids=ids, prefix_states=states, use_cache=False).logits
