"""Files of a folder or repository: sizes, sha256 and safetensors headers. Weights on the Hub stay there."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_session, hf_hub_url
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

from ..display import progress_bar
from ..donor import DONOR_CONFIG
from ..donor.record import FileStamp
from ..donor.tensors import DONOR_FILE, DONOR_INDEX, FileTensors, TensorInfo, check_shards, read_shard_index
from ..errors import CheckpointError
from ..sources import HubOptions, Source, at_revision, hub_errors, locate
from ..storage import sha256_of
from .findings import FileFinding, Weights

MODEL_INDEX = "model.safetensors.index.json"
MODEL_FILES = ("model.safetensors", MODEL_INDEX)  # in the order in which Transformers looks for them
BIN_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_DOWNLOADED = ("config.json", DONOR_CONFIG, DONOR_INDEX, MODEL_INDEX)
_AT_ONCE = 8  # headers of shards that are fetched at the same time
_FIRST_READ = 1 << 15  # bytes: most headers are shorter
_MAX_HEADER = 100_000_000  # bytes, by the definition of the format

Headers = Mapping[str, Mapping[str, TensorInfo]]  # by file, then by tensor


class Files:
    """The files of a folder or repository. Configurations are downloaded, of weight files only the headers."""

    def __init__(self, source: Source, hub: HubOptions) -> None:
        self.source = source
        self._hub = hub
        self._offline = source.from_hub and (hub.local_files_only or constants.HF_HUB_OFFLINE)

    @classmethod
    def find(cls, reference: str, hub: HubOptions, **places: Any) -> Files:
        """Find what a reference names and download its configurations; `places` are arguments of `sources.locate`."""
        return cls(locate(reference, files=_DOWNLOADED, hub=hub, **places), hub)

    @cached_property
    def _listing(self) -> Mapping[str, RepoSibling]:
        """The files in the repository; empty for a folder, and offline."""
        source = self.source
        if not source.from_hub or self._offline:
            return {}
        with hub_errors(source.reference, source.revision):
            info = HfApi(token=self._hub.token).model_info(
                source.reference, revision=source.revision, files_metadata=True
            )
        inside = self._path_in_repo("")
        files = {file.rfilename: file for file in info.siblings or ()}
        return {name.removeprefix(inside): file for name, file in files.items() if name.startswith(inside)}

    def _path_in_repo(self, name: str) -> str:
        return f"{self.source.subfolder.strip('/')}/{name}" if self.source.subfolder else name

    def has(self, name: str) -> bool:
        """Whether there is a file of that name."""
        return self.local_path(name) is not None or name in self._listing

    def local_path(self, name: str) -> Path | None:
        """The path of a file that is on this machine."""
        path = self.source.folder / name
        return path if path.is_file() else None

    def compare(self, name: str, stamp: FileStamp | None, sha256: str | None) -> tuple[FileFinding, list[str]]:
        """Compare size and sha256 of a file with the record beside it and with the listing of the Hub."""
        size, on_hub = self._size(name), self._listing.get(name)
        listed = on_hub.lfs.sha256 if on_hub is not None and on_hub.lfs else None  # of large files only
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

    def _size(self, name: str) -> int | None:
        if name in self._listing:
            return self._listing[name].size
        path = self.local_path(name)
        return path.stat().st_size if path is not None else None

    def headers(self, names: Sequence[str]) -> Headers:
        """Read the headers of the first of these weight files that exists, or of all shards that an index names."""
        name = next((name for name in names if self.has(name)), names[-1])
        if not name.endswith(".index.json"):
            return {name: self._header(name)}
        where = f"{self.source}/{name}"
        weight_map = read_shard_index(self.source.folder / name, where)
        shards = sorted(set(weight_map.values()))
        missing = [shard for shard in shards if not self.has(shard)]
        if missing and not self._offline:
            raise CheckpointError(f"{where} names {len(missing)} files that are missing, first {missing[0]!r}.")
        with ThreadPoolExecutor(_AT_ONCE, "headers") as pool:
            headers = dict(zip(shards, pool.map(self._header, shards), strict=True))
        check_shards(weight_map, headers, where)
        return headers

    def _header(self, name: str) -> Mapping[str, TensorInfo]:
        path = self.local_path(name)
        if path is not None:
            with _reading(path):
                return FileTensors([path]).infos()
        source, size = self.source, self._size(name)
        with hub_errors(source.reference, source.revision):
            if self._offline:
                raise LocalEntryNotFoundError(f"{name} is not in the cache.")
            if size is None:
                raise CheckpointError(f"weights are missing: there is no {name} in {source}.")
            return _read_header(source.reference, self._path_in_repo(name), source.revision, size, self._hub.token)


class HeaderTensors:
    """The tensors of a donor by their headers; they cannot be read."""

    def __init__(self, files: Files) -> None:
        self._files = files

    @cached_property
    def headers(self) -> Headers:
        """The headers by file."""
        return self._files.headers((DONOR_INDEX, DONOR_FILE))

    def infos(self) -> Mapping[str, TensorInfo]:
        """Return the header of every tensor."""
        return all_tensors(self.headers)

    def slices(self) -> Mapping[str, Any]:
        """Refuse: only headers were read."""
        raise CheckpointError(f"only headers of {self._files.source} were read; open it with Donor.from_pretrained.")


def all_tensors(headers: Headers) -> dict[str, TensorInfo]:
    """Return the tensors of all files by name."""
    return {name: tensor for tensors in headers.values() for name, tensor in tensors.items()}


def summarize_weights(
    files: Files, headers: Headers, recorded: Mapping[str, FileStamp], verify: bool, per_layer: Sequence[int] = ()
) -> tuple[Weights, list[str]]:
    """Return the sum of headers, and a line for each file that differs from what is recorded of it."""
    names = sorted({*headers, *recorded})
    paths = {name: path for name in names if verify and (path := files.local_path(name)) is not None}
    hashes = {}
    with progress_bar(len(paths), "Hashing", unit="file") as bar:
        for name, path in paths.items():
            with _reading(path):
                hashes[name] = sha256_of(path)
            bar.update()
    compared = [files.compare(name, recorded.get(name), hashes.get(name)) for name in names]
    tensors = all_tensors(headers)
    dtypes: Counter[str] = Counter()
    for tensor in tensors.values():
        dtypes[tensor.dtype] += tensor.num_elements
    weights = Weights(
        files=tuple(finding for finding, _ in compared),
        tensors=len(tensors),
        parameters=dtypes.total(),
        size=sum(finding.size or 0 for finding, _ in compared),
        dtypes=dict(dtypes.most_common()),
        per_layer=tuple(per_layer),
    )
    return weights, [problem for _, problems in compared for problem in problems]


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn errors of the disk into a CheckpointError."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


# -- Headers on the Hub ----------------------------------------------------------------------------------------------
#
# `HfApi.parse_safetensors_file_metadata` multiplies the entries of a shape before anything is checked, so a header with
# the shape `["a", 9999999999]` makes it allocate 10 GB. It also does not compare a header with the size of its file.


def _read_header(
    repo: str, path: str, revision: str | None, size: int, token: str | bool | None
) -> dict[str, TensorInfo]:
    """Read the header of a safetensors file in a repository."""
    where = f"{at_revision(repo, revision)}/{path}"
    start = fetch_range(repo, path, revision, 0, min(size, _FIRST_READ), token)
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or length > min(size - 8, _MAX_HEADER):
        raise CheckpointError(
            f"{where} is not a whole safetensors file: its header should have {length:,} bytes, the file has {size:,}. "
            "Is it truncated, or a Git LFS pointer?"
        )
    start += fetch_range(repo, path, revision, len(start), 8 + length - len(start), token)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "header.safetensors")
        try:
            with file.open("wb") as out:
                out.write(start[: 8 + length])
                out.truncate(size)  # a hole in the place of the tensors, which takes no space on the disk
            found = FileTensors([file]).infos()
        except OSError as error:
            raise CheckpointError(f"the header of {where} ({size:,} bytes) cannot be checked: {error}") from error
        except CheckpointError as error:
            raise CheckpointError(str(error).replace(str(file), where)) from error
    return {name: TensorInfo(tensor.shape, tensor.dtype) for name, tensor in found.items()}


def fetch_range(repo: str, path: str, revision: str | None, start: int, count: int, token: str | bool | None) -> bytes:
    """Fetch some bytes of a file; fewer where the file ends. A server that ignores ranges is not read to the end."""
    if count <= 0:
        return b""
    headers = {
        **build_hf_headers(token=token),
        "Range": f"bytes={start}-{start + count - 1}",
        "Accept-Encoding": "identity",
    }
    url = hf_hub_url(repo, path, revision=revision)
    found = bytearray()
    with get_session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as answer:
        if answer.is_error:
            answer.read()
        hf_raise_for_status(answer)
        skip = 0 if answer.status_code == 206 else start
        for chunk in answer.iter_bytes():
            found += chunk
            if len(found) >= skip + count:
                break
    return bytes(found[skip : skip + count])
