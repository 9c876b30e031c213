"""Which donors the calls of one thread use, and in which rows of a batch, while the model stays as it is.

All donors run in every call; what one of them adds is left out where it is not wanted. So nothing that calls share is
changed, every layer's cache is filled alike, and a row without donors gets exactly what the recipient computes.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch

from ..architecture import text_config
from ..architecture.exceptions import ROWS_APART
from ..errors import ConfigurationError
from ..numeric import finite_number
from ..splice import Blueprint

__all__ = ["Opening", "Requests", "Wanted", "read_request"]


@dataclasses.dataclass(frozen=True, eq=False)
class Wanted:
    """What a call wants of each donor.

    Args:
        strengths: By donor: a number for all rows, or `[rows]` in float32.
        key: Equal for requests that want the same.
    """

    strengths: Mapping[str, float | torch.Tensor]
    key: Hashable


class Requests(threading.local):
    """What is wanted in this thread; `None` where the model is used as it is set."""

    # Not a context variable: torch.compile reads attributes of a threading.local, and guards on them.
    wanted: Wanted | None = None

    def __reduce__(self) -> Any:
        return Requests, ()


class Opening:
    """A lock under which a model is made ready for requests; a copied or pickled model has it anew."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __reduce__(self) -> Any:
        return Opening, ()


def read_request(blueprint: Blueprint, donors: Any, rows: Sequence[Any] | None) -> Wanted:
    """Turn the arguments of `model.using` into a strength for each donor.

    Args:
        blueprint: What the model runs.
        donors: A donor's name, several, or `{name: strength}`; a strength is a number or one for each row.
        rows: For each row of the batch, what `donors` takes for one; `None` for a row without donors.

    Returns:
        The strengths; 0 for donors that are not named.

    Raises:
        ConfigurationError: No such donor, a strength that is not finite, lists of different lengths, or a donor that
            replaces layers and would have to be left out or scaled.
    """
    if (donors is None) == (rows is None):
        raise ConfigurationError(
            'say which donors to use: using("law"), using({"law": 0.5}), using(()) for none, or one entry for each row '
            'of the batch: using(rows=["law", None]).'
        )
    blueprint.refuse_scaling()
    if rows is None:
        strengths: dict[str, Any] = _of_one(blueprint, donors)
    elif isinstance(rows, str) or not isinstance(rows, Sequence) or not len(rows):
        raise ConfigurationError(f"rows must be a list with an entry for each row of the batch, got {rows!r}.")
    else:
        each = [_of_one(blueprint, () if row is None else row) for row in rows]
        strengths = {name: [row[name] for row in each] for name in each[0]}
    checked = {name: _strength(blueprint, name, value) for name, value in strengths.items()}
    lengths = {name: len(value) for name, value in checked.items() if isinstance(value, tuple)}
    if len(set(lengths.values())) > 1:
        raise ConfigurationError(f"each donor needs a strength for every row of the same batch, got {lengths} of them.")
    _refuse_leaving_out(blueprint, checked)
    if lengths:
        _refuse_rows(blueprint)
    inserted = {name: value for name, value in checked.items() if blueprint.part(name).spec.mode == "insert"}
    tensors = {
        name: torch.tensor(value, dtype=torch.float32) if isinstance(value, tuple) else value
        for name, value in inserted.items()
    }
    return Wanted(tensors, tuple(sorted(inserted.items())))


def _of_one(blueprint: Blueprint, donors: Any) -> dict[str, Any]:
    known = blueprint.splice.names
    if isinstance(donors, Mapping):
        named = dict(donors)
    elif isinstance(donors, str | Iterable):
        chosen = [donors] if isinstance(donors, str) else list(donors)
        named = {name: blueprint.part(name).spec.strength if name in known else None for name in chosen}
    else:
        raise ConfigurationError(f"donors are named by a name, several, or {{name: strength}}; got {donors!r}.")
    for name in named:
        blueprint.check_name(name)
    return {name: named.get(name, 0.0) for name in known}


def _strength(blueprint: Blueprint, name: str, value: Any) -> float | tuple[float, ...]:
    found = tuple(value) if isinstance(value, list | tuple) or getattr(value, "ndim", 0) == 1 else (value,)
    what = f"the strength of donor {name!r}, or each of a list with one for each row,"
    if not found:
        raise ConfigurationError(f"{what} must be a finite number, got {value!r}.")
    each = tuple(finite_number(one, what) for one in found)
    # Where all rows want the same, nothing depends on the size of the batch.
    return each if len(set(each)) > 1 else each[0]


def _refuse_rows(blueprint: Blueprint) -> None:
    model_type = text_config(blueprint.recipient.config).config.model_type
    if model_type in ROWS_APART:
        raise ConfigurationError(
            f"rows of a batch cannot use different donors in a {model_type} model: {ROWS_APART[model_type]}. Make a "
            "call for each choice."
        )


def _refuse_leaving_out(blueprint: Blueprint, strengths: Mapping[str, float | tuple[float, ...]]) -> None:
    for name, value in strengths.items():
        if blueprint.part(name).spec.mode == "replace" and value != 1.0:
            raise ConfigurationError(
                f"donor {name!r} replaces recipient layers, so that a call cannot leave it out or scale it. Name it in "
                f"every call, or switch it off for all calls: disable_transplants({name!r})."
            )
