"""Where the parts of a `torch.save` file lie: its pickle, and the bytes of each storage.

Both formats are read: the zip archive that torch writes since 1.6, and the row of pickles from before. Offsets and
sizes are checked against the file before anything relies on them.
"""

from __future__ import annotations

import dataclasses
import io
import os
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import CheckpointError
from .descriptions import StorageRef
from .unpickle import PICKLE_LIMIT, inert_load

__all__ = ["Container", "Region", "Stamp", "open_container"]

_ZIP_START = b"PK\x03\x04"
_ZIP_END = b"PK\x05\x06"
_LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_ENCRYPTED = 0x1
_MOST_LISTED = 1 << 24
_LONGEST_END = (1 << 16) + 22 + 20 + 56  # a comment, the end record, and what zip64 puts before it
_DRIVE = re.compile(r"[A-Za-z]:")
_SEE = "Get the file again from its author"


@dataclasses.dataclass(frozen=True)
class Region:
    """Bytes of a file.

    Args:
        start: Where they begin.
        size: How many there are.
        crc: Their CRC-32 as recorded; `None` in files that record none.
    """

    start: int
    size: int
    crc: int | None = None

    @property
    def end(self) -> int:
        """Where the next byte after them lies."""
        return self.start + self.size


@dataclasses.dataclass(frozen=True)
class Stamp:
    """By what a file is known again: another one in its place, or one that was written to, has another stamp.

    Args:
        device: What it lies on.
        inode: Its number there.
        size: How many bytes it has.
        changed: When it was last written to, in nanoseconds.
    """

    device: int
    inode: int
    size: int
    changed: int

    @classmethod
    def of(cls, file: BinaryIO) -> Stamp:
        """Look at an open file."""
        found = os.fstat(file.fileno())
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


@dataclasses.dataclass(frozen=True)
class Container:
    """An opened file: what its pickle describes, and where the storages are.

    Args:
        content: The described object; tensors are `TensorRef`, unknown objects are inert.
        storages: The bytes of every storage, by key.
        stamp: Which file that was.
    """

    content: Any
    storages: Mapping[str, Region]
    stamp: Stamp


def open_container(path: Path) -> Container:
    """Read the structure of a `torch.save` file.

    Raises:
        CheckpointError: Not such a file, cut short, compressed, or with sizes that do not add up.
    """
    try:
        if not path.is_file():
            if path.is_dir():
                inside = ", ".join(sorted(found.name for found in path.glob("*.pt"))) or "none"
                raise CheckpointError(f"{path} is a folder, not a file that torch.save wrote. Files in it: {inside}.")
            raise CheckpointError(f"there is no file {path}.")
        with path.open("rb") as file:
            start = file.read(512)
            file.seek(0)
            if start.startswith(_ZIP_START):
                return _open_zip(file, path)
            if start.startswith(_LEGACY_START):
                return _open_legacy(file, path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Is it yours to read, and its disk in order?") from error
    raise CheckpointError(f"{path} is not a file that torch.save wrote: {_what_it_is(start)}.")


def _what_it_is(start: bytes) -> str:
    text = start.lstrip().lower()
    if not start:
        return f"it is empty. {_SEE}"
    if text.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file it points to. Fetch it with `git lfs pull` or `hf download`"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page, perhaps an error or log-in page saved under this name. Download it with `hf download`"
    if start[8:9] == b"{":
        return "it is a safetensors file; a donor's folder is opened with Donor.from_pretrained"
    if start.startswith(b"GGUF"):
        return (
            "it is a GGUF file: a whole model, no donor. Load it as a recipient, with AutoModelWithTransplant."
            "from_pretrained(folder, gguf_file=name, donors=...), or with --gguf-file on the command line"
        )
    if start.startswith(_ZIP_END):
        return "it is an empty zip archive. " + _SEE
    if start[:1] == b"\x80":
        return "it is a pickle of another kind; write it again with torch.save"
    return f"it begins with {start[:16]!r}. {_SEE}"


# -- The zip format ----------------------------------------------------------------------------------------------


def _open_zip(file: BinaryIO, path: Path) -> Container:
    if (listed := _listing_size(file)) > _MOST_LISTED:
        raise CheckpointError(
            f"{path}: its list of members claims {listed} bytes, at most {_MOST_LISTED} are read; torch.save needs far "
            f"less. {_SEE}."
        )
    try:
        archive = zipfile.ZipFile(file)
        members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, OSError, OverflowError, ValueError, struct.error) as error:
        raise CheckpointError(
            f"{path} is cut short or damaged ({error}): its list of members is at the end. {_SEE}."
        ) from error
    regions = _regions(file, members, archive.start_dir, path)
    roots = {name.partition("/")[0] for name in regions}
    if len(roots) != 1:
        raise CheckpointError(
            f"{path} holds {len(roots)} top folders ({', '.join(sorted(roots)[:4])}), torch.save writes one. {_SEE}."
        )
    root = roots.pop()
    pickled = regions.get(f"{root}/data.pkl")
    if pickled is None:
        kind = "a TorchScript archive" if f"{root}/constants.pkl" in regions else "some other zip archive"
        raise CheckpointError(
            f"{path} is {kind}: it has no {root}/data.pkl. Save the layers' state dicts with torch.save."
        )
    _refuse_big_endian(file, regions.get(f"{root}/byteorder"), path)
    if pickled.size > PICKLE_LIMIT:
        raise CheckpointError(
            f"{path}: data.pkl has {pickled.size} bytes, at most {PICKLE_LIMIT} are read; names "
            "and shapes need far less."
        )
    content = inert_load(io.BytesIO(_read(file, pickled, path, "data.pkl")), str(path))
    prefix = f"{root}/data/"
    storages = {name.removeprefix(prefix): region for name, region in regions.items() if name.startswith(prefix)}
    return Container(content, storages, Stamp.of(file))


def _listing_size(file: BinaryIO) -> int:
    """How long the list of members claims to be: zipfile reads it at once, and makes an object of every line."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - _LONGEST_END))
    tail = file.read()
    end = tail.rfind(b"PK\x05\x06")
    if end < 0:
        return 0
    size = int.from_bytes(tail[end + 12 : end + 16], "little")
    start = end - 76  # where zip64 has a record of its own, with larger numbers
    if start >= 0 and tail[start : start + 4] == b"PK\x06\x06":
        return int.from_bytes(tail[start + 40 : start + 48], "little")
    return size


def _regions(file: BinaryIO, members: list[zipfile.ZipInfo], directory: int, path: Path) -> dict[str, Region]:
    """Check every member's place, and return where its bytes are."""
    regions: dict[str, Region] = {}
    for member in members:
        name = member.orig_filename
        _refuse_member(member, name, path)
        if name in regions:
            raise CheckpointError(f"{path} has two members named {name!r}. {_SEE}.")
        regions[name] = Region(_data_start(file, member, path), member.file_size, member.CRC)
    end, before = 0, ""
    for name, region in sorted(regions.items(), key=lambda item: (item[1].start, item[1].end)):
        if region.start < end:
            raise CheckpointError(f"{path}: members {before!r} and {name!r} overlap. {_SEE}.")
        if region.end > directory:
            raise CheckpointError(
                f"{path}: member {name!r} claims bytes {region.start} to {region.end}, but members end at "
                f"{directory}. {_SEE}."
            )
        end, before = region.end, name
    return regions


def _refuse_member(member: zipfile.ZipInfo, name: str, path: Path) -> None:
    parts = name.split("/")
    if name.startswith("/") or "\\" in name or _DRIVE.match(name) or ".." in parts or not name.isprintable():
        raise CheckpointError(
            f"{path}: member name {name[:80]!r} could lead out of a folder; torch.save writes none such. {_SEE}."
        )
    if stat.S_ISLNK(member.external_attr >> 16):
        raise CheckpointError(f"{path}: member {name!r} is a link; torch.save writes none. {_SEE}.")
    if member.flag_bits & _ENCRYPTED:
        raise CheckpointError(f"{path}: member {name!r} is encrypted; torch.save never does that. {_SEE}.")
    if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
        raise CheckpointError(
            f"{path}: member {name!r} is compressed ({member.compress_size} bytes claim to hold {member.file_size}); "
            "torch.save stores members as they are. Unpack and save it again with torch.save."
        )


def _data_start(file: BinaryIO, member: zipfile.ZipInfo, path: Path) -> int:
    file.seek(max(0, member.header_offset))
    header = file.read(_LOCAL_HEADER.size)
    if len(header) < _LOCAL_HEADER.size or not header.startswith(_ZIP_START):
        raise CheckpointError(f"{path}: member {member.orig_filename!r} is not where the list of members says. {_SEE}.")
    name_length, extra_length = _LOCAL_HEADER.unpack(header)[-2:]
    name = file.read(name_length)
    if name != member.orig_filename.encode("utf-8"):
        raise CheckpointError(f"{path}: the member listed as {member.orig_filename!r} calls itself {name[:80]!r}.")
    return member.header_offset + _LOCAL_HEADER.size + name_length + extra_length


def _refuse_big_endian(file: BinaryIO, region: Region | None, path: Path) -> None:
    if region is None:  # as before torch 2.1, which wrote it wherever it ran
        return
    order = _read(file, region, path, "byteorder") if region.size < 16 else b"?"
    if order != b"little":
        raise CheckpointError(
            f"{path} was written in byte order {order!r}; only little-endian files are read. Save it on such a machine."
        )


def _read(file: BinaryIO, region: Region, path: Path, what: str) -> bytes:
    file.seek(region.start)
    found = file.read(region.size)
    if len(found) != region.size or (region.crc is not None and zlib.crc32(found) != region.crc):
        raise CheckpointError(f"{path}: {what} does not have the checksum recorded for it: bytes were changed. {_SEE}.")
    return found


# -- The format from before torch 1.6 ----------------------------------------------------------------------------


def _open_legacy(file: BinaryIO, path: Path) -> Container:
    what = str(path)
    stamp = Stamp.of(file)
    _magic, _protocol, system = (inert_load(file, what) for _ in range(3))
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise CheckpointError(f"{path} does not say that it was written in little-endian byte order; save it again.")
    seen: dict[str, StorageRef] = {}
    content = inert_load(file, what, seen)
    keys = inert_load(file, what)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or not _are_all(keys, seen):
        raise CheckpointError(f"{path} lists other storages than its tensors use. {_SEE}.")
    return Container(content, _legacy_storages(file, [seen[key] for key in keys], stamp.size, path), stamp)


def _are_all(keys: list[str], seen: Mapping[str, StorageRef]) -> bool:
    return len(keys) == len(seen) and set(keys) == seen.keys()


def _legacy_storages(file: BinaryIO, refs: list[StorageRef], size: int, path: Path) -> dict[str, Region]:
    storages = {}
    for ref in refs:
        count = file.read(8)
        nbytes = ref.num_elements * ref.dtype.itemsize
        start = file.tell()
        if len(count) != 8 or int.from_bytes(count, "little") != ref.num_elements or start + nbytes > size:
            raise CheckpointError(
                f"{path}: storage {ref.key!r} should hold {nbytes} bytes from {start}; the file has {size}. {_SEE}."
            )
        storages[ref.key] = Region(start, nbytes)
        file.seek(start + nbytes)
    return storages
