"""Weight files together: found by their index, read by their headers, compared with what is recorded of them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from ..donor.record import FileStamp
from ..donor.tensors import check_shards, read_shard_index
from ..errors import CheckpointError
from ..storage import sha256_of
from .files import Files, reading_file
from .findings import FileFinding, Weights
from .headers import TensorHeader

__all__ = ["WeightHeaders", "read_weights", "summary"]

_AT_ONCE = 8
# Hashing less is done before a bar could be read.
_PROGRESS_FROM = 1 << 28


@dataclasses.dataclass(frozen=True)
class WeightHeaders:
    """The headers of all weight files.

    Args:
        files: For each file, its tensors.
    """

    files: Mapping[str, Mapping[str, TensorHeader]]

    def flat(self) -> dict[str, TensorHeader]:
        """All tensors by name."""
        return {name: tensor for tensors in self.files.values() for name, tensor in tensors.items()}


def read_weights(files: Files, name: str, index: str) -> WeightHeaders:
    """Read the headers of one weight file, or of all shards that an index names.

    Args:
        files: The files.
        name: The weight file, or the index.
        index: What the index is called.

    Raises:
        CheckpointError: Malformed, missing, or names that lead out of the folder.
        HubError: Out of reach.
    """
    if name != index:
        return WeightHeaders({name: files.header(name)})
    where = f"{files.source}/{index}"
    weight_map = read_shard_index(files.folder / index, where)
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not files.has(name)]
    if missing and not (files.source.from_hub and not files.listed):
        raise CheckpointError(f"{where} names {len(missing)} files that are missing, first {missing[0]!r}.")
    # A header each: waiting for the Hub is nearly all of the time.
    with ThreadPoolExecutor(_AT_ONCE, "headers") as pool:
        found = dict(zip(names, pool.map(files.header, names), strict=True))
    check_shards(weight_map, found, where)
    return WeightHeaders(found)


def summary(
    files: Files, headers: WeightHeaders, recorded: Mapping[str, FileStamp], verify: bool
) -> tuple[Weights, list[str]]:
    """Sum the headers up, and compare the files with what is recorded of them.

    Args:
        files: The files.
        headers: Their headers.
        recorded: sha256 and size, by name.
        verify: Hash the files that are on this machine.

    Returns:
        The summary, and a line for each file that is not as recorded.
    """
    names = sorted({*headers.files, *recorded})
    paths = {name: path for name in names if verify and (path := files.at_hand(name)) is not None}
    total = sum(path.stat().st_size for path in paths.values())
    hashes = {}
    for name, path in tqdm(paths.items(), desc="Hashing", unit="file", disable=total < _PROGRESS_FROM):
        with reading_file(path):
            hashes[name] = sha256_of(path)
    findings, problems = [], []
    for name in names:
        finding, wrong = _compared(files, name, recorded.get(name), hashes.get(name))
        findings.append(finding)
        problems += wrong
    tensors = headers.flat()
    dtypes: Counter[str] = Counter()
    for tensor in tensors.values():
        dtypes[tensor.dtype] += tensor.num_elements
    weights = Weights(
        files=tuple(findings),
        tensors=len(tensors),
        parameters=sum(dtypes.values()),
        size=sum(finding.size or 0 for finding in findings),
        dtypes=dict(dtypes.most_common()),
    )
    return weights, problems


def _compared(files: Files, name: str, stamp: FileStamp | None, found: str | None) -> tuple[FileFinding, list[str]]:
    size, listed = files.size(name), files.hub_sha256(name)
    expected = stamp.sha256 if stamp is not None else listed
    wrong: list[str] = []
    if stamp is not None and size != stamp.size:
        seen = "it is missing" if size is None else f"it has {size:,} bytes"
        wrong.append(f"{name}: {seen}, {stamp.size:,} are recorded")
    if found is not None and expected is not None and found != expected:
        wrong.append(f"{name}: its bytes have sha256 {found}, {_origin(stamp)} {expected}")
    if stamp is not None and listed is not None and listed != stamp.sha256:
        wrong.append(f"{name}: the Hub lists sha256 {listed}, recorded is {stamp.sha256}")
    if wrong:
        state = "differs"
    elif found is not None and expected is not None:
        state = "verified"
    elif stamp is None:
        state = "not recorded"
    else:
        state = "recorded" if listed is None else "same on the Hub"
    return FileFinding(name, size, stamp.sha256 if stamp is not None else None, listed, state), wrong


def _origin(stamp: FileStamp | None) -> str:
    return "the Hub lists" if stamp is None else "recorded is"
