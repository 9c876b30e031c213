"""Headers of safetensors files on the Hub, read by range requests and checked.

`HfApi.parse_safetensors_file_metadata` multiplies the entries of a shape before anything is checked, so a header with
the shape `["a", 9999999999]` makes it allocate 10 GB. It also does not compare a header with the size of its file.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub import constants, get_session, hf_hub_url
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

from ..donor.tensors import TensorInfo, loaded_dtype
from ..errors import CheckpointError
from ..numeric import is_whole

__all__ = ["fetch_range", "read_header"]

_FIRST_READ = 1 << 15  # bytes: most headers are shorter
_MAX_LENGTH = 100_000_000  # of a header, by the definition of the format
_MAX_DIMENSIONS = 64
_DTYPE = re.compile(r"[A-Za-z0-9_]{1,16}")


def read_header(
    repo: str, path: str, revision: str | None, size: int, token: str | bool | None
) -> dict[str, TensorInfo]:
    """Read the header of a safetensors file in a repository."""
    where = f"{repo}@{revision}/{path}" if revision else f"{repo}/{path}"
    start = fetch_range(repo, path, revision, 0, min(size, _FIRST_READ), token)
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or length > min(size - 8, _MAX_LENGTH):
        raise CheckpointError(
            f"{where} is not a whole safetensors file: its header should have {length:,} bytes, the file has {size:,}. "
            "Was it cut short, or is it a Git LFS pointer?"
        )
    header = start[8 : 8 + length]
    header += fetch_range(repo, path, revision, len(start), 8 + length - len(start), token)
    try:
        fields = json.loads(header.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not a safetensors file: its header is not JSON ({error}).") from error
    if not isinstance(fields, dict):
        raise CheckpointError(
            f"{where} is not a safetensors file: its header is {type(fields).__name__}, not an object."
        )
    fields.pop("__metadata__", None)
    return _checked(fields, size - 8 - length, where)


def _checked(fields: Mapping[str, Any], data_size: int, where: str) -> dict[str, TensorInfo]:
    """Check that tensors lie side by side, have the size of their shape and dtype, and fill the file."""
    tensors: dict[str, TensorInfo] = {}
    places = []
    for name, tensor in fields.items():
        values: dict[str, Any] = tensor if isinstance(tensor, dict) else {}
        dtype: Any = values.get("dtype")
        shape: Any = values.get("shape")
        offsets: Any = values.get("data_offsets")
        if not (_are_sizes(offsets, 2) and len(offsets) == 2 and _are_sizes(shape) and _is_dtype(dtype)):
            raise CheckpointError(f"{where}: the header gives no dtype, shape and offsets of tensor {name!r}.")
        places.append((*offsets, name))
        tensors[name] = TensorInfo(tuple(shape), dtype)
    end = 0
    for start, stop, name in sorted(places):
        if start != end or stop > data_size or stop - start not in _sizes(tensors[name]):
            raise CheckpointError(
                f"{where}: tensor {name!r} of shape {list(tensors[name].shape)} and dtype {tensors[name].dtype} cannot "
                f"be at bytes {start:,} to {stop:,} of {data_size:,}; it must begin at {end:,}."
            )
        end = stop
    if end != data_size:
        raise CheckpointError(f"{where} has {data_size:,} bytes of tensors, but its header names {end:,}.")
    return tensors


def _are_sizes(values: Any, most: int = _MAX_DIMENSIONS) -> bool:
    return isinstance(values, list) and len(values) <= most and all(is_whole(value) and value >= 0 for value in values)


def _is_dtype(name: Any) -> bool:
    return isinstance(name, str) and _DTYPE.fullmatch(name) is not None


def _sizes(tensor: TensorInfo) -> range:
    """Return the sizes in bytes that a tensor may have: one for a dtype that torch has."""
    numbers = math.prod(tensor.shape)
    try:
        size = numbers * loaded_dtype(tensor.dtype).itemsize
    except CheckpointError:  # safetensors has dtypes of four and six bits
        return range(-(-numbers // 8), numbers + 1)
    return range(size, size + 1)


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
