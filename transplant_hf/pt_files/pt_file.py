"""`PtFile`: the tensors of a `torch.save` file, described by a child process and mapped from the file."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError

_PROGRAM = Path(__file__).with_name("pickle_process.py")
_MEMORY = 1 << 30
_SECONDS = 20
_CRC_STEP = 1 << 26
_STARTS = (b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.")  # since torch 1.6, and before
_MAX_REASON = 300
_DTYPES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
    "UntypedStorage": torch.uint8,
}
_SEE = "Get the file again from its author."


@dataclasses.dataclass(frozen=True)
class PtTensor:
    """The description of a tensor in a file."""

    storage: str
    storage_bytes: int  # as the pickle claims
    dtype: torch.dtype
    offset: int  # elements of the storage before the first one
    shape: tuple[int, ...]
    stride: tuple[int, ...]  # elements from one entry to the next

    @property
    def num_elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def claimed_bytes(self) -> int:
        """How many bytes its storage must have, and must not be less than its own size: no expanded tensors."""
        if not self.num_elements:
            return 0
        last = self.offset + sum((length - 1) * step for length, step in zip(self.shape, self.stride, strict=True))
        return max(last + 1, self.num_elements) * self.dtype.itemsize


class PtFile:
    """A file that `torch.save` wrote, of any size."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser()
        _refuse_other_files(self.path)
        self._stamp = _stamp(self.path)
        found = _describe(self.path)
        self.tensors: Mapping[str, PtTensor] = {
            name: _pt_tensor(self.path, *fields) for name, fields in found["tensors"].items()
        }
        self.values: Mapping[str, Any] = found["values"]
        self.classes: tuple[str, ...] = tuple(found["classes"])
        self._storages: Mapping[str, tuple[int, int, int | None]] = (
            found["storages"] if "storages" in found else self._legacy_storages(found)
        )
        self._checked: set[str] = set()

    def check_claims(self, name: str) -> None:
        """Compare what a tensor claims with the bytes that the file has for it."""
        tensor = self.tensors[name]
        if tensor.storage not in self._storages:
            raise CheckpointError(
                f"{self.path}: the bytes of tensor {name!r} are missing (storage {tensor.storage[:80]!r}). {_SEE}"
            )
        start, size, _ = self._storages[tensor.storage]
        if tensor.storage_bytes != size or start + size > self._stamp[0]:
            raise CheckpointError(
                f"{self.path}: the storage of tensor {name!r} claims {tensor.storage_bytes} bytes, the file holds "
                f"{min(size, max(0, self._stamp[0] - start))}. {_SEE}"
            )
        if tensor.claimed_bytes > size:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} of shape {list(tensor.shape)} claims {tensor.claimed_bytes} bytes, its "
                f"storage holds {size}. An expanded tensor must be saved with .contiguous()."
            )

    def open_tensors(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Map tensors from the file; each call maps it again, so that no two results share memory.

        Contiguous tensors stay in the file until they are used. Others, and tensors that share their storage with one
        before, are copied into memory.
        """
        try:
            unchanged = _stamp(self.path) == self._stamp
            whole: Any = torch.UntypedStorage.from_file(str(self.path), False, self._stamp[0]) if unchanged else None
            unchanged = unchanged and _stamp(self.path) == self._stamp
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"{self.path} can no longer be read: {error}. Open it again.") from error
        if not unchanged:
            raise CheckpointError(f"{self.path} was changed or replaced after it was opened. Open it again.")
        tensors: dict[str, torch.Tensor] = {}
        used: set[str] = set()
        for name in names:
            self.check_claims(name)
            found = self.tensors[name]
            tensor = torch.empty(0, dtype=found.dtype)
            if found.num_elements:
                storage = self._checked_storage(whole, found, name)
                tensor.set_(storage, found.offset, found.shape, found.stride)
            is_view = found.storage in used or not tensor.is_contiguous()
            used.add(found.storage)
            tensors[name] = tensor.clone(memory_format=torch.contiguous_format) if is_view else tensor.view(found.shape)
        return tensors

    def _checked_storage(self, whole: Any, tensor: PtTensor, name: str) -> Any:
        start, size, crc = self._storages[tensor.storage]
        storage = whole[start : start + size]
        if crc is not None and tensor.storage not in self._checked:
            if _crc_of(storage) != crc:
                raise CheckpointError(
                    f"{self.path}: the bytes of tensor {name!r} do not have the checksum recorded for them: the file "
                    f"was changed or damaged. {_SEE}"
                )
            self._checked.add(tensor.storage)
        return storage.clone() if start % tensor.dtype.itemsize else storage  # torch wants aligned numbers

    def _legacy_storages(self, found: Mapping[str, Any]) -> dict[str, tuple[int, int, None]]:
        """Files from before torch 1.6: each storage after its number of elements, without checksums."""
        storages: dict[str, tuple[int, int, None]] = {}
        start = found["legacy_start"]
        for key, kind, elements in found["legacy_storages"]:
            start += 8
            size = elements * _DTYPES[kind].itemsize if kind in _DTYPES else self._stamp[0]
            if start + size > self._stamp[0]:
                raise CheckpointError(
                    f"{self.path}: storage {key[:80]!r} should hold {size} bytes from {start}; the file has "
                    f"{self._stamp[0]}. {_SEE}"
                )
            storages[key] = (start, size, None)
            start += size
        return storages


def _stamp(path: Path) -> tuple[int, int, int, int]:
    """What tells a file from one that replaced it or that was written to."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_dev, found.st_ino


def _crc_of(storage: Any) -> int:
    data = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
    crc = 0
    for start in range(0, len(data), _CRC_STEP):
        crc = zlib.crc32(data[start : start + _CRC_STEP].data, crc)
    return crc


def _describe(path: Path) -> dict[str, Any]:
    """Run the child process, and return its answer."""
    command = [sys.executable, "-I", "-S", str(_PROGRAM), str(path.absolute()), str(_MEMORY), str(_SECONDS)]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=3 * _SECONDS, check=False)
        found = json.loads(done.stdout) if done.returncode == 0 and done.stdout else {}
        stopped = f"the process that reads it was stopped by signal {-done.returncode}"
        reason = (done.stderr.decode(errors="replace").splitlines() or [stopped])[-1]
    except subprocess.TimeoutExpired:
        reason, found = f"it takes over {3 * _SECONDS} seconds", {}
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: the interpreter {sys.executable!r} (sys.executable) does not start: {error}."
        ) from error
    if "refused" in found:
        raise CheckpointError(f"{path} {found['refused']}")
    if not found:
        reason = "".join(character if character.isprintable() else "?" for character in reason[:_MAX_REASON])
        raise CheckpointError(
            f"{path} could not be read ({reason}): it is truncated, damaged, not written by torch.save, or takes "
            f"more than {_SECONDS} seconds or {_MEMORY >> 30} GiB to read. Download it again, or save it again."
        )
    return dict(found)


def _pt_tensor(
    path: Path, key: str, kind: str, elements: int, dtype: str | None, offset: int, shape: list[int], stride: list[int]
) -> PtTensor:
    stored = _DTYPES.get(kind)
    own = stored if dtype is None else getattr(torch, dtype.removeprefix("torch."), None)
    if stored is None or not isinstance(own, torch.dtype):
        raise CheckpointError(f"{path} holds a tensor of type {dtype or kind}, which torch {torch.__version__} lacks.")
    return PtTensor(key, elements * stored.itemsize, own, offset, tuple(shape), tuple(stride))


def _refuse_other_files(path: Path) -> None:
    try:
        if path.is_dir():
            inside = ", ".join(sorted(file.name for file in path.glob("*.pt"))) or "none"
            raise CheckpointError(f"{path} is a folder, not a file that torch.save wrote. Files in it: {inside}.")
        if not path.is_file():
            raise CheckpointError(f"there is no file {path}.")
        with path.open("rb") as file:
            start = file.read(512)
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        raise CheckpointError(f"{path} cannot be read: {error}. Check its permissions and the disk.") from error
    if not start.startswith(_STARTS):
        raise CheckpointError(f"{path} is not a file that torch.save wrote: {_kind_of(start)}.")


def _kind_of(start: bytes) -> str:
    text = start.lstrip().lower()
    if not start:
        return "it is empty. Get the file again from its author"
    if text.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file it points to. Fetch it with `git lfs pull` or `hf download`"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page, perhaps an error or log-in page saved under this name. Download it with `hf download`"
    if start[8:9] == b"{":
        return "it is a safetensors file; open a donor's folder with Donor.from_pretrained"
    if start.startswith(b"GGUF"):
        return (
            "it is a GGUF file: a whole model, not a donor. Load it as a recipient, with AutoModelWithTransplant."
            "from_pretrained(folder, gguf_file=name, donors=...), or with --gguf-file on the command line"
        )
    if start.startswith(b"PK\x05\x06"):
        return "it is an empty zip archive. Get the file again from its author"
    if start.startswith(b"\x80"):
        return "it is a pickle of another kind; write it again with torch.save"
    return f"it begins with {start[:16]!r}. Get the file again from its author"
