"""Weight files: what their headers say in sum, and whether their bytes are the recorded ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from ..display import progress_bar
from ..donor.record import FileStamp
from ..storage import sha256_of
from .files import Files, Headers, all_tensors, reading_file
from .findings import FileFinding, Weights

__all__ = ["summarize_weights"]


def summarize_weights(
    files: Files,
    headers: Headers,
    recorded: Mapping[str, FileStamp],
    verify: bool,
    per_layer: Sequence[int] = (),
) -> tuple[Weights, list[str]]:
    """Return the sum of headers, and a line for each file that differs from what is recorded of it."""
    names = sorted({*headers, *recorded})
    hashes = {}
    paths = {name: path for name in names if verify and (path := files.local_path(name)) is not None}
    with progress_bar(len(paths), "Hashing", unit="file") as bar:
        for name, path in paths.items():
            with reading_file(path):
                hashes[name] = sha256_of(path)
            bar.update()
    found, problems = [], []
    for name in names:
        finding, differences = _compare(files, name, recorded.get(name), hashes.get(name))
        found.append(finding)
        problems += differences
    tensors = all_tensors(headers)
    dtypes: Counter[str] = Counter()
    for tensor in tensors.values():
        dtypes[tensor.dtype] += tensor.num_elements
    weights = Weights(
        files=tuple(found),
        tensors=len(tensors),
        parameters=dtypes.total(),
        size=sum(finding.size or 0 for finding in found),
        dtypes=dict(dtypes.most_common()),
        per_layer=tuple(per_layer),
    )
    return weights, problems


def _compare(files: Files, name: str, stamp: FileStamp | None, sha256: str | None) -> tuple[FileFinding, list[str]]:
    """Compare a file's size and sha256 with the record beside it and the listing of the Hub."""
    size, listed = files.size(name), files.hub_sha256(name)
    expected = stamp.sha256 if stamp is not None else listed
    problems = []
    if stamp is not None and size != stamp.size:
        actual = "it is missing" if size is None else f"it has {size:,} bytes"
        problems.append(f"{name}: {actual}, {stamp.size:,} are recorded")
    if sha256 is not None and expected is not None and sha256 != expected:
        origin = "the Hub lists" if stamp is None else "recorded is"
        problems.append(f"{name}: its bytes have sha256 {sha256}, {origin} {expected}")
    if stamp is not None and listed is not None and listed != stamp.sha256:
        problems.append(f"{name}: the Hub lists sha256 {listed}, recorded is {stamp.sha256}")
    if problems:
        state = "differs"
    elif sha256 is not None and expected is not None:
        state = "verified"
    elif stamp is None:
        state = "not recorded"
    else:
        state = "recorded" if listed is None else "same on the Hub"
    return FileFinding(name, size, stamp.sha256 if stamp is not None else None, listed, state), problems
