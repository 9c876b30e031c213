"""The donors that a call uses: the arguments of `model.using`, as a strength for each donor."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..architecture import text_config
from ..architecture.exceptions import ROWS_APART
from ..errors import ConfigurationError
from ..numeric import finite_number
from ..splice import Blueprint


class Rows(NamedTuple):
    """The rows of a batch that use a donor."""

    held: torch.Tensor  # which they are, [batch], on the CPU
    numbers: torch.Tensor  # on the device of the hidden state


@dataclasses.dataclass(frozen=True, eq=False)
class Choice:
    """The donors that a call uses."""

    strengths: Mapping[str, float | torch.Tensor]  # by inserted donor: a number for all rows, or [rows] in float32
    key: Hashable  # equal for choices that are equal
    entries: int | None = None  # how many rows the choice names, one by one; `None` if it holds for any batch
    replacing: frozenset[str] = frozenset()  # donors that replaced layers when the block began: no call leaves them out
    router: Any = None  # chooses the donors within the call, for `using("auto")`; `strengths` are NaN until then
    prompt: Any = None  # for the router: what the call is made with
    routes: tuple[Any, ...] | None = None  # where the router sent each row
    _rows: dict[Hashable, Rows | None] = dataclasses.field(default_factory=dict, init=False)

    def rows(self, name: str, hidden: torch.Tensor) -> Rows | None:
        """The rows of a hidden state `[batch, ...]` that use a donor; `None` if all do, or if the batch is another."""
        key = (name, hidden.shape[0], hidden.device)
        if key not in self._rows:
            strengths = torch.as_tensor(self.strengths.get(name, 0.0)).reshape(-1)
            held = (strengths != 0).repeat_interleave(hidden.shape[0] // len(strengths))
            some = len(held) == hidden.shape[0] and not held.all()
            self._rows[key] = Rows(held, held.nonzero()[:, 0].to(hidden.device)) if some else None
        return self._rows[key]

    def check_rows(self, batch: int, generating: bool = False) -> None:
        """Refuse a batch with another number of rows than the choice names; `generate` may repeat each row."""
        if self.entries is not None and batch != self.entries and not (generating and batch % self.entries == 0):
            raise ConfigurationError(
                f"using(...) has {self.entries} entries, and this call has {batch} rows. Give one entry for each row "
                "of the batch, or in generate() for each text: its beams and returned sequences follow it."
            )

    @property
    def chosen(self) -> set[str]:
        """The inserted donors that are not left out."""
        return {name for name, value in self.strengths.items() if isinstance(value, torch.Tensor) or value != 0}


def parse_choice(blueprint: Blueprint, donors: Any, rows: Sequence[Any] | None) -> Choice:
    """Read the arguments of `model.using`."""
    if (donors is None) == (rows is None):
        raise ConfigurationError(
            'say which donors to use: using("law"), using({"law": 0.5}), using(()) for none, or one entry for each row '
            'of the batch: using(rows=["law", None]).'
        )
    blueprint.refuse_scaling()
    if rows is None:
        strengths: dict[str, Any] = _strengths_by_name(blueprint, donors)
    elif isinstance(rows, str) or not isinstance(rows, Sequence) or not len(rows):
        raise ConfigurationError(f"rows must be a list with an entry for each row of the batch, got {rows!r}.")
    else:
        by_row = [_strengths_by_name(blueprint, () if row is None else row) for row in rows]
        strengths = {name: [row[name] for row in by_row] for name in by_row[0]}
    numbers = {name: _numbers(name, value) for name, value in strengths.items()}
    lengths = {name: len(value) for name, value in strengths.items() if _is_by_row(value)}
    if len(set(lengths.values())) > 1:
        raise ConfigurationError(f"each donor needs a strength for every row of the same batch, got {lengths} of them.")
    for name, value in numbers.items():
        if blueprint.part(name).spec.mode == "replace" and value != 1.0:
            raise ConfigurationError(
                f"donor {name!r} replaces recipient layers, so that a call cannot leave it out or scale it. Name it in "
                f"every call, or switch it off for all calls: disable_transplants({name!r})."
            )
    if lengths:
        refuse_rows(blueprint)
    inserted = {name: value for name, value in numbers.items() if blueprint.part(name).spec.mode == "insert"}
    return choice_of(inserted, entries=next(iter(lengths.values()), None))


def choice_of(strengths: Mapping[str, Any], kind: str = "named", entries: int | None = None) -> Choice:
    """Return the choice of strengths by donor, each a number or a list with one for each row."""
    numbers = {name: _numbers(name, value) for name, value in strengths.items()}
    tensors = {
        name: torch.tensor(value, dtype=torch.float32) if isinstance(value, tuple) else value
        for name, value in numbers.items()
    }
    return Choice(tensors, (kind, *sorted(numbers.items())), entries)


def _strengths_by_name(blueprint: Blueprint, donors: Any) -> dict[str, Any]:
    """The strength of every donor; 0 for those that are not named."""
    own = {part.name: part.spec.strength for part in blueprint.parts}
    if isinstance(donors, Mapping):
        named = dict(donors)
    elif isinstance(donors, str | Iterable):
        named = {name: own.get(name) for name in ([donors] if isinstance(donors, str) else donors)}
    else:
        raise ConfigurationError(f"donors must be a name, several names, or {{name: strength}}; got {donors!r}.")
    for name in named:
        blueprint.check_name(name)
    return {name: named.get(name, 0.0) for name in own}


def _is_by_row(value: Any) -> bool:
    return isinstance(value, list | tuple) or getattr(value, "ndim", 0) == 1


def _numbers(name: str, value: Any) -> float | tuple[float, ...]:
    """Check the strength of one donor: a number, or a tuple with one for each row."""
    values = tuple(value) if _is_by_row(value) else (value,)
    what = f"the strength of donor {name!r}, or each of a list with one for each row,"
    if not values:
        raise ConfigurationError(f"{what} must be a finite number, got {value!r}.")
    numbers = tuple(finite_number(one, what) for one in values)
    # If all rows have the same strength, nothing depends on the size of the batch.
    return numbers if len(set(numbers)) > 1 else numbers[0]


def refuse_rows(blueprint: Blueprint) -> None:
    """Refuse choices by row in a model whose hidden states have the batch elsewhere."""
    model_type = text_config(blueprint.recipient.config).model_type
    if model_type in ROWS_APART:
        raise ConfigurationError(
            f"rows of a batch cannot use different donors in a {model_type} model: {ROWS_APART[model_type]}. Make a "
            "call for each choice."
        )
