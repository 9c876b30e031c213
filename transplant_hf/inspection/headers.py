"""Headers of safetensors files on the Hub, read by range requests and checked by safetensors.

`HfApi.parse_safetensors_file_metadata` multiplies the entries of a shape before anything is checked, so a header with
the shape `["a", 9999999999]` makes it allocate 10 GB. It also does not compare a header with the size of its file.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from huggingface_hub import constants, get_session, hf_hub_url
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

from ..donor.tensors import FileTensors, TensorInfo
from ..errors import CheckpointError
from ..sources import at_revision

__all__ = ["fetch_range", "read_header"]

_FIRST_READ = 1 << 15  # bytes: most headers are shorter
_MAX_LENGTH = 100_000_000  # of a header, by the definition of the format


def read_header(
    repo: str, path: str, revision: str | None, size: int, token: str | bool | None
) -> dict[str, TensorInfo]:
    """Read the header of a safetensors file in a repository."""
    where = f"{at_revision(repo, revision)}/{path}"
    start = fetch_range(repo, path, revision, 0, min(size, _FIRST_READ), token)
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or length > min(size - 8, _MAX_LENGTH):
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
