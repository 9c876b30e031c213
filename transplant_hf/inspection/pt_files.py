"""`.pt` files, read without running anything in them, and matched with a source model where one is named."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from ..display import dtype_name
from ..donor.from_pt import METADATA_FILE, match_pt_file
from ..errors import CheckpointError, CompatibilityError, ConfigurationError
from ..layer_map import Placement, Splice
from ..pt_files import PtFile
from ..pt_files.layer_names import numbers_in
from ..storage import read_json
from .donors import InspectArguments
from .findings import Numbering, PtInspection, PtTensorFinding

__all__ = ["inspect_pt"]

_MAX_PROBLEMS = 8


def inspect_pt(path: Path, arguments: InspectArguments) -> PtInspection:
    """Inspect a `.pt` file."""
    file = PtFile(path)
    dtypes: Counter[str] = Counter()
    # Tied tensors count once. By their texts: a file can choose numbers whose hashes are all equal.
    for tensor in {repr(tensor): tensor for tensor in file.tensors.values()}.values():
        dtypes[dtype_name(tensor.dtype)] += tensor.num_elements
    beside = path.parent / METADATA_FILE
    found = PtInspection(
        what=arguments.what,
        notes=()
        if arguments.recipient
        else ("name the source model (recipient=, --recipient) to see which of its layers these are.",),
        problems=tuple(_false_claims(file)),
        size=path.stat().st_size,
        tensors={name: PtTensorFinding(t.shape, dtype_name(t.dtype)) for name, t in file.tensors.items()},
        parameters=sum(dtypes.values()),
        dtypes=dict(dtypes.most_common()),
        numbering=_numbering(file.tensors),
        classes=file.classes,
        values=dict(file.values),
        metadata=read_json(beside, "the donor's metadata") if beside.exists() else {},
    )
    if arguments.recipient is None:
        return found
    try:
        return _with_source_model(arguments.recipient, found, path, arguments)
    except (CheckpointError, CompatibilityError, ConfigurationError) as error:
        return dataclasses.replace(found, problems=(*found.problems, str(error)))


def _with_source_model(recipient: str, found: PtInspection, path: Path, arguments: InspectArguments) -> PtInspection:
    matched = match_pt_file(path, recipient, None, None, None, None, arguments.hub)
    position = matched.position if arguments.position is None else arguments.position
    placement = Placement(matched.record.name or path.stem, position, matched.layout.layers)
    return dataclasses.replace(
        found,
        recipient=str(matched.recipient),
        model_type=matched.record.model_type,
        layer_indices=matched.layout.layers,
        prefix=matched.layout.prefix,
        dropped=matched.layout.dropped,
        placed_at=position,
        layer_map=Splice(matched.num_layers, [placement]).layer_map(),
    )


def _false_claims(file: PtFile) -> list[str]:
    """The tensors that claim more than the file holds."""
    problems = []
    for name in file.tensors:
        try:
            file.check_claims(name)
        except CheckpointError as error:
            problems.append(str(error))
    more = len(problems) - _MAX_PROBLEMS
    return [*problems[:_MAX_PROBLEMS], *([f"... and {more:,} more tensors"] if more > 0 else [])]


def _numbering(names: Iterable[str]) -> tuple[Numbering, ...]:
    """Group names by what stands before the first number in them."""
    groups: dict[str, Counter[int]] = {}
    for name in names:
        for _, prefix, number in itertools.islice(numbers_in(name), 1):
            groups.setdefault(prefix, Counter())[number] += 1
    found = [Numbering(prefix, tuple(sorted(counts)), counts.total()) for prefix, counts in groups.items()]
    return tuple(sorted(found, key=lambda group: (-group.tensors, group.prefix)))
