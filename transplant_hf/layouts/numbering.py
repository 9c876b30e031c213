"""Which of the source model's layers the numbers in a file mean."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import CheckpointError, ConfigurationError
from ..numeric import consecutive_layers

__all__ = ["choose_layers"]


def choose_layers(
    numbers: Sequence[int], num_layers: int, known: Sequence[int] | None, wanted: Sequence[int] | None, what: str
) -> dict[int, int]:
    """Choose layers of a file and say which ones of the source model they are.

    Args:
        numbers: The layers' numbers in the file, in order.
        num_layers: How many layers the source model has.
        known: The layer indices that the author recorded, if any.
        wanted: The layer indices that are asked for, if any.
        what: The file, for messages.

    Returns:
        The source model's numbers by the file's.

    Raises:
        CheckpointError: The file holds other layers than recorded or asked for.
        ConfigurationError: Nothing says which layers they are, or they are not consecutive.

    Example:
        >>> choose_layers([0, 1, 2], 12, known=[4, 5, 6], wanted=None, what="donor.pt")
        {0: 4, 1: 5, 2: 6}
        >>> choose_layers(range(12), 12, known=None, wanted=[4, 5], what="model.pt")
        {4: 4, 5: 5}
    """
    known = _checked(known, num_layers, "the metadata's layer_indices", what) if known is not None else None
    wanted = _checked(wanted, num_layers, "layers", what) if wanted is not None else None
    sources = _sources(list(numbers), num_layers, known, wanted, what)
    asked = wanted if wanted is not None else known
    chosen = {number: source for number, source in sources.items() if asked is None or source in asked}
    missing = sorted(set(asked or ()) - set(chosen.values()))
    if missing:
        raise CheckpointError(
            f"{what} holds layers {sorted(sources.values())} of the source model, asked for {list(asked or ())}: "
            f"{missing} are missing."
        )
    _checked(sorted(chosen.values()), num_layers, "the file's layer numbers", what)
    return chosen


def _checked(given: Sequence[int], num_layers: int, origin: str, what: str) -> list[int]:
    layers = consecutive_layers(given, f"{what}: {origin}")
    if layers[0] < 0 or layers[-1] >= num_layers:
        raise ConfigurationError(
            f"{what}: {origin} {layers} are outside 0..{num_layers - 1}: the source model has {num_layers} layers."
        )
    return layers


def _sources(
    numbers: list[int], num_layers: int, known: Sequence[int] | None, wanted: Sequence[int] | None, what: str
) -> dict[int, int]:
    whole_model = numbers == list(range(num_layers))
    from_zero = numbers == list(range(len(numbers)))
    if known is not None:
        if numbers == list(known) or (whole_model and len(known) < num_layers):
            return {number: number for number in numbers}
        if from_zero and len(numbers) == len(known):
            return dict(zip(numbers, known, strict=True))
        raise CheckpointError(
            f"{what} holds {len(numbers)} layers numbered {numbers}, the metadata records {len(known)}: {list(known)}. "
            "Pass the right metadata, or a file with those layers alone."
        )
    if from_zero and not whole_model:
        if wanted is not None and len(wanted) == len(numbers):
            return dict(zip(numbers, wanted, strict=True))
        raise ConfigurationError(
            f"{what} numbers its {len(numbers)} layers from 0 and no metadata says which of the source model's "
            f"{num_layers} they are; pass layers=, such as layers=[{', '.join(map(str, range(4, 4 + len(numbers))))}]."
        )
    if whole_model and wanted is None and num_layers > 1:
        raise ConfigurationError(
            f"{what} holds all {num_layers} layers of the model; say which make the donor, such as layers=[4, 5, 6]."
        )
    return {number: number for number in numbers}
