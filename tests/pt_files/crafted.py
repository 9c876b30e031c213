"""Files of `torch.save`, made by hand where torch would not make them."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from transplant_hf.pt_files import PtFile

__all__ = [
    "MAGIC",
    "bits",
    "everything",
    "legacy_file",
    "long_of",
    "members_of",
    "pickled_file",
    "repacked",
    "saved",
    "tensor_code",
    "text",
    "tree_tensors",
    "zip_of",
]

MAGIC = 0x1950A86A20F9469CFC6C


# -- Reading -----------------------------------------------------------------------------------------------------


def everything(path: Path) -> dict[str, torch.Tensor]:
    """Read every tensor of a file."""
    file = PtFile(path)
    return file.open_tensors(file.tensors)


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    """What must be equal in equal tensors."""
    flat = tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
    data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return tensor.dtype, tuple(tensor.shape), data


def tree_tensors(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in dictionaries and lists, under its dotted name."""
    if isinstance(tree, torch.Tensor):
        yield ".".join(path), tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from tree_tensors(value, (*path, str(key)))
    elif isinstance(tree, list | tuple):
        for number, value in enumerate(tree):
            yield from tree_tensors(value, (*path, str(number)))


# -- Writing -----------------------------------------------------------------------------------------------------


def saved(path: Path, content: Any, legacy: bool = False, **options: Any) -> Path:
    """Write a file as torch does."""
    torch.save(content, path, _use_new_zipfile_serialization=not legacy, **options)
    return path


def zip_of(path: Path, members: Mapping[str, bytes]) -> Path:
    """Write members into a zip archive."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def members_of(path: Path) -> dict[str, bytes]:
    """The members of a zip archive."""
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def repacked(path: Path, change: Callable[[dict[str, bytes]], Any]) -> Path:
    """Change members of a zip archive; checksums are right again."""
    members = members_of(path)
    change(members)
    return zip_of(path, members)


def pickled_file(path: Path, code: bytes, storages: Mapping[str, bytes] | None = None) -> Path:
    """Write a file around a pickle."""
    data = {f"made/data/{key}": value for key, value in (storages or {}).items()}
    return zip_of(path, {"made/data.pkl": code, "made/byteorder": b"little", **data, "made/version": b"3\n"})


def legacy_file(path: Path, code: bytes, keys: tuple[Any, ...] = (), tail: bytes = b"") -> Path:
    """Write a file of the format from before torch 1.6 around a pickle."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    out = io.BytesIO()
    for content in (MAGIC, 1001, system):
        pickle.dump(content, out, protocol=2)
    out.write(code)
    pickle.dump(list(keys), out, protocol=2)
    out.write(tail)
    path.write_bytes(out.getvalue())
    return path


# -- Codes of the pickle machine -------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    """A text."""
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def long_of(value: int) -> bytes:
    """A whole number of any size."""
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8b" + struct.pack("<i", len(data)) + data


def _counts(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(long_of, values)) + b"t"


def tensor_code(
    shape: tuple[int, ...] = (2, 2),
    stride: tuple[int, ...] = (2, 1),
    offset: int = 0,
    elements: int = 4,
    key: str = "0",
    kind: str = "FloatStorage",
) -> bytes:
    """What torch writes for a tensor, without the code's begin and end."""
    where = f"ctorch\n{kind}\n".encode() + text(key) + text("cpu")
    arguments = (
        b"("
        + text("storage")
        + where
        + long_of(elements)
        + b"tQ"
        + long_of(offset)
        + _counts(shape)
        + _counts(stride)
        + b"\x89"
        + b"}"
    )
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"
