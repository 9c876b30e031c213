"""Files of a folder or repository: their names, sizes and safetensors headers. Weights on the Hub stay there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.hf_api import RepoSibling

from ..donor import DONOR_CONFIG
from ..donor.tensors import DONOR_INDEX, FileTensors, TensorInfo, check_shards, read_shard_index
from ..errors import CheckpointError
from ..sources import HubOptions, Source, hub_errors, locate
from .headers import read_header

__all__ = ["BIN_FILES", "MODEL_FILES", "Files", "HeaderTensors", "all_tensors", "reading_file"]

MODEL_INDEX = "model.safetensors.index.json"
MODEL_FILES = ("model.safetensors", MODEL_INDEX)  # in the order in which Transformers looks for them
BIN_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_DOWNLOADED = ("config.json", DONOR_CONFIG, DONOR_INDEX, MODEL_INDEX)
_AT_ONCE = 8  # headers of shards that are fetched at the same time

Headers = Mapping[str, Mapping[str, TensorInfo]]  # by file, then by tensor


class Files:
    """The files of a folder or repository. Configurations are downloaded, of weight files only the headers.

    Args:
        source: Where the configurations are.
        hub: How to reach the Hub.
    """

    def __init__(self, source: Source, hub: HubOptions) -> None:
        self.source = source
        self._hub = hub
        self._offline = hub.local_files_only or constants.HF_HUB_OFFLINE

    @classmethod
    def find(
        cls,
        reference: str,
        hub: HubOptions,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        relative_to: Source | None = None,
    ) -> Files:
        """Find what a reference names and download its configurations; see `sources.locate`."""
        places = {"revision": revision, "subfolder": subfolder, "relative_to": relative_to}
        return cls(locate(reference, files=_DOWNLOADED, hub=hub, **places), hub)  # type: ignore[arg-type]

    @property
    def folder(self) -> Path:
        """Where the configurations are."""
        return self.source.folder

    @cached_property
    def _listing(self) -> Mapping[str, RepoSibling]:
        """The files in the repository; empty for a folder, and offline."""
        source = self.source
        if not source.from_hub or self._offline:
            return {}
        inside = f"{source.subfolder.strip('/')}/" if source.subfolder else ""
        with hub_errors(source.reference, source.revision):
            info = HfApi(token=self._hub.token).model_info(
                source.reference, revision=source.revision, files_metadata=True
            )
        files = {file.rfilename: file for file in info.siblings or ()}
        return {name.removeprefix(inside): file for name, file in files.items() if name.startswith(inside)}

    def has(self, name: str) -> bool:
        """Whether there is a file of that name."""
        return self.local_path(name) is not None or name in self._listing

    def names(self) -> list[str]:
        """The names of all known files."""
        return sorted({path.name for path in self.folder.glob("*") if path.is_file()} | set(self._listing))

    def local_path(self, name: str) -> Path | None:
        """The path of a file that is on this machine."""
        path = self.folder / name
        return path if path.is_file() else None

    def size(self, name: str) -> int | None:
        """The size of a file in bytes; `None` when there is none."""
        if name in self._listing:
            return self._listing[name].size
        path = self.local_path(name)
        return path.stat().st_size if path is not None else None

    def hub_sha256(self, name: str) -> str | None:
        """The sha256 that the Hub lists for a large file."""
        lfs = self._listing[name].lfs if name in self._listing else None
        return lfs.sha256 if lfs else None

    def headers(self, names: Sequence[str]) -> Headers:
        """Read the headers of a weight file, or of all shards that an index names."""
        name = next((name for name in names if self.has(name)), names[-1])
        if not name.endswith(".index.json"):
            return {name: self._header(name)}
        where = f"{self.source}/{name}"
        weight_map = read_shard_index(self.folder / name, where)
        shards = sorted(set(weight_map.values()))
        missing = [shard for shard in shards if not self.has(shard)]
        if missing and not (self.source.from_hub and self._offline):
            raise CheckpointError(f"{where} names {len(missing)} files that are missing, first {missing[0]!r}.")
        with ThreadPoolExecutor(_AT_ONCE, "headers") as pool:
            headers = dict(zip(shards, pool.map(self._header, shards), strict=True))
        check_shards(weight_map, headers, where)
        return headers

    def _header(self, name: str) -> Mapping[str, TensorInfo]:
        path = self.local_path(name)
        if path is not None:
            with reading_file(path):
                return FileTensors([path]).infos()
        source, size = self.source, self.size(name)
        if source.from_hub and self._offline:
            with hub_errors(source.reference, source.revision):
                raise LocalEntryNotFoundError(f"{name} is not in the cache.")
        if size is None:
            raise CheckpointError(f"weights are missing: there is no {name} in {source}.")
        inner = f"{source.subfolder.strip('/')}/{name}" if source.subfolder else name
        with hub_errors(source.reference, source.revision):
            return read_header(source.reference, inner, source.revision, size, self._hub.token)


class HeaderTensors:
    """The tensors of a donor by their headers; they cannot be read.

    Args:
        tensors: What the headers say, by name.
        where: Where they are, for the message when a tensor is asked for.
    """

    def __init__(self, tensors: Mapping[str, TensorInfo], where: str) -> None:
        self._infos = tensors
        self._where = where

    def infos(self) -> Mapping[str, TensorInfo]:
        """Describe every tensor."""
        return self._infos

    def slices(self) -> Mapping[str, Any]:
        """Refuse: only headers were read."""
        raise CheckpointError(f"only headers of {self._where} were read; open it with Donor.from_pretrained.")


def all_tensors(headers: Headers) -> dict[str, TensorInfo]:
    """Return the tensors of all files by name."""
    return {name: tensor for tensors in headers.values() for name, tensor in tensors.items()}


@contextmanager
def reading_file(path: Path) -> Iterator[None]:
    """Turn errors of the disk into a CheckpointError."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
