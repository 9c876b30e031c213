"""Bytes of files on the Hub, asked for by range: nothing else is fetched, and nothing enters the cache."""

from __future__ import annotations

import dataclasses

from huggingface_hub import HfApi, constants, get_session, hf_hub_url
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

__all__ = ["Listed", "RemoteFile", "listed_files"]


@dataclasses.dataclass(frozen=True)
class Listed:
    """A file as the Hub lists it.

    Args:
        size: In bytes.
        sha256: Of a large file; small ones have none listed.
    """

    size: int | None
    sha256: str | None


def listed_files(api: HfApi, reference: str, revision: str | None) -> dict[str, Listed]:
    """Ask the Hub for the names, sizes and sha256 of a repository's files."""
    info = api.model_info(reference, revision=revision, files_metadata=True)
    return {
        sibling.rfilename: Listed(sibling.size, sibling.lfs.sha256 if sibling.lfs else None)
        for sibling in info.siblings or ()
    }


@dataclasses.dataclass(frozen=True)
class RemoteFile:
    """A file of a repository at a commit.

    Args:
        repo: The repository.
        path: The file's path in it.
        revision: The commit.
        token: As in huggingface_hub.
    """

    repo: str
    path: str
    revision: str | None
    token: str | bool | None = None

    def read(self, start: int, count: int) -> bytes:
        """Fetch some of its bytes; fewer come back where the file ends."""
        if not count:
            return b""
        headers = {
            **build_hf_headers(token=self.token),
            "Range": f"bytes={start}-{start + count - 1}",
            "Accept-Encoding": "identity",
        }
        url = hf_hub_url(self.repo, self.path, revision=self.revision)
        found = bytearray()
        # A stream, because a server that ignores ranges would send all of a file.
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
