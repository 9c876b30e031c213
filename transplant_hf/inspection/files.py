"""The files of a folder or of a repository: what they are called, how large, and the headers among them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import LocalEntryNotFoundError

from ..donor import DONOR_CONFIG
from ..donor.tensors import DONOR_INDEX
from ..errors import CheckpointError
from ..sources import HubOptions, Source, hub_errors, locate
from .headers import TensorHeader, read_header
from .remote import Listed, RemoteFile, listed_files

__all__ = ["BIN_FILES", "MODEL_FILE", "MODEL_INDEX", "SMALL_FILES", "Files", "reading_file"]

MODEL_FILE = "model.safetensors"
MODEL_INDEX = "model.safetensors.index.json"
BIN_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
# All that is ever downloaded.
SMALL_FILES = ("config.json", DONOR_CONFIG, DONOR_INDEX, MODEL_INDEX)


class Files:
    """The files that a name stands for; headers of those on the Hub are fetched by ranges, the small ones lie here.

    Args:
        source: Where the small files are.
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
        small: Sequence[str] = SMALL_FILES,
    ) -> Files:
        """Find what a reference names, and have the small files at hand; see `sources.locate`."""
        source = locate(
            reference, files=small, revision=revision, subfolder=subfolder, relative_to=relative_to, hub=hub
        )
        return cls(source, hub)

    @property
    def folder(self) -> Path:
        """Where the small files are."""
        return self.source.folder

    @property
    def listed(self) -> bool:
        """Whether the Hub lists these files."""
        return self.source.from_hub and not self._offline

    @cached_property
    def _listing(self) -> Mapping[str, Listed]:
        if not self.listed:
            return {}
        source = self.source
        api = HfApi(token=self._hub.token)
        inside = f"{source.subfolder.strip('/')}/" if source.subfolder else ""
        with hub_errors(source.reference, source.revision):
            found = listed_files(api, source.reference, source.revision)
        return {name.removeprefix(inside): file for name, file in found.items() if name.startswith(inside)}

    def has(self, name: str) -> bool:
        """Whether there is a file of that name."""
        return self.at_hand(name) is not None or name in self._listing

    def names(self) -> list[str]:
        """The names of all files that are known of."""
        return sorted({path.name for path in self.folder.glob("*") if path.is_file()} | set(self._listing))

    def at_hand(self, name: str) -> Path | None:
        """The file on this machine, if it is here."""
        path = self.folder / name
        return path if path.is_file() else None

    def size(self, name: str) -> int | None:
        """A file's size; `None` when there is none."""
        if name in self._listing:
            return self._listing[name].size
        path = self.at_hand(name)
        return path.stat().st_size if path is not None else None

    def hub_sha256(self, name: str) -> str | None:
        """The sha256 that the Hub lists for a large file."""
        return self._listing[name].sha256 if name in self._listing else None

    def header(self, name: str) -> dict[str, TensorHeader]:
        """Read the header of a safetensors file.

        Raises:
            CheckpointError: Missing, or malformed.
            HubError: Out of reach.
        """
        path = self.at_hand(name)
        if path is not None:
            with reading_file(path), path.open("rb") as file:

                def read(start: int, count: int) -> bytes:
                    file.seek(start)
                    return file.read(count)

                return read_header(read, path.stat().st_size, str(path))
        source = self.source
        if source.from_hub and self._offline:
            with hub_errors(source.reference, source.revision):
                raise LocalEntryNotFoundError(f"{name} is not in the cache.")
        size = self.size(name)
        if size is None:
            raise CheckpointError(f"weights are missing: there is no {name} in {self.source}.")
        inner = f"{source.subfolder.strip('/')}/{name}" if source.subfolder else name
        remote = RemoteFile(source.reference, inner, source.revision, self._hub.token)
        with hub_errors(source.reference, source.revision):
            return read_header(remote.read, size, f"{source}/{inner}")


@contextmanager
def reading_file(path: Path) -> Iterator[None]:
    """Turn what a disk refuses into one sentence."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
