"""`.pt` files, described without unpickling, and held against a source model where one is named."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..archive import PtFile
from ..donor.from_pt import METADATA_FILE, open_pt
from ..errors import CheckpointError, CompatibilityError, ConfigurationError
from ..layer_map import Placement, Splice
from ..storage import read_json
from .donors import Asked
from .findings import Numbering, PtInspection, PtTensorFinding

__all__ = ["inspect_pt"]

_NUMBERED = re.compile(r"(.*?)(\d{1,9})")
_MOST_PROBLEMS = 8


def inspect_pt(path: Path, asked: Asked) -> PtInspection:
    """Inspect a `.pt` file.

    Args:
        path: The file.
        asked: What is wanted.

    Raises:
        CheckpointError: Not a file that torch.save wrote, or damaged.
        HubError: The recipient is out of reach.
    """
    file = PtFile(path)
    problems = _false_claims(file)
    dtypes: Counter[str] = Counter()
    # By their texts: hashes of numbers, which a file can choose, could all be equal.
    for ref in {repr(ref): ref for ref in file.tensors.values()}.values():
        dtypes[_plain(ref.dtype)] += ref.num_elements
    beside = path.parent / METADATA_FILE
    found = PtInspection(
        what=asked.what,
        notes=() if asked.recipient else ("name the source model to see which of its layers these are.",),
        problems=tuple(problems),
        size=path.stat().st_size,
        tensors={name: PtTensorFinding(ref.shape, _plain(ref.dtype)) for name, ref in file.tensors.items()},
        parameters=sum(dtypes.values()),
        dtypes=dict(dtypes.most_common()),
        numbering=_numbering(file.tensors),
        classes=tuple(sorted(file.classes)),
        values=dict(file.values),
        metadata=read_json(beside, "the donor's metadata") if beside.exists() else {},
    )
    if asked.recipient is None:
        return found
    try:
        return _held_against(asked.recipient, found, path, asked)
    except (CheckpointError, CompatibilityError, ConfigurationError) as error:
        return dataclasses.replace(found, problems=(*found.problems, str(error)))


def _held_against(recipient: str, found: PtInspection, path: Path, asked: Asked) -> PtInspection:
    opened = open_pt(path, recipient, None, None, None, None, asked.hub)
    place = opened.position if asked.position is None else asked.position
    placement = Placement(opened.record.name or path.stem, place, opened.layout.layers)
    return dataclasses.replace(
        found,
        recipient=str(opened.recipient),
        model_type=opened.record.model_type,
        layer_indices=opened.layout.layers,
        prefix=opened.layout.prefix,
        dropped=opened.layout.dropped,
        placed_at=place,
        layer_map=Splice(opened.num_layers, [placement]).layer_map(),
    )


def _false_claims(file: PtFile) -> list[str]:
    """Tensors that claim more than the file holds."""
    problems = []
    for name in file.tensors:
        try:
            file.region(name)
        except CheckpointError as error:
            problems.append(str(error))
    more = len(problems) - _MOST_PROBLEMS
    return [*problems[:_MOST_PROBLEMS], *([f"... and {more:,} more tensors"] if more > 0 else [])]


def _numbering(names: Iterable[str]) -> tuple[Numbering, ...]:
    """Group names by what stands before the first number in them."""
    groups: dict[str, Counter[int]] = {}
    for name in names:
        pieces = name.split(".")
        for at, piece in enumerate(pieces):
            match = _NUMBERED.fullmatch(piece)
            if match is not None:
                prefix = ".".join([*pieces[:at], *([match[1]] if match[1] else [])])
                groups.setdefault(prefix, Counter())[int(match[2])] += 1
                break
    found = [Numbering(prefix, tuple(sorted(counts)), counts.total()) for prefix, counts in groups.items()]
    return tuple(sorted(found, key=lambda group: (-group.tensors, group.prefix)))


def _plain(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
