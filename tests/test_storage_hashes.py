"""A process hashes a file once; a changed file is hashed again."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from transplant_hf import storage
from transplant_hf.storage import verified_sha256

CHANGED = hashlib.sha256(b"changed").hexdigest()


@pytest.fixture
def hashed(tmp_path: Path) -> Path:
    path = tmp_path / "donor.safetensors"
    path.write_bytes(b"weights")
    assert verified_sha256(path) == hashlib.sha256(b"weights").hexdigest()
    return path


def test_a_file_is_hashed_once(hashed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "sha256_of", lambda path: pytest.fail(f"{path} was hashed again"))
    assert verified_sha256(hashed) == hashlib.sha256(b"weights").hexdigest()


def test_a_changed_file_is_hashed_again(hashed: Path) -> None:
    before = hashed.stat()
    hashed.write_bytes(b"changed")
    os.utime(hashed, ns=(before.st_atime_ns, before.st_mtime_ns))  # of the same size and time
    assert verified_sha256(hashed) == CHANGED


def test_a_replaced_file_is_hashed_again(hashed: Path) -> None:
    new = hashed.with_name("new")
    new.write_bytes(b"changed")
    os.replace(new, hashed)
    assert verified_sha256(hashed) == CHANGED
