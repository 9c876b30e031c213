"""A file of the Hub cache is hashed once, by whichever process comes first; a changed file is hashed again."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
from huggingface_hub import constants

from transplant_hf import storage
from transplant_hf.storage import verified_sha256

CONTENT = b"weights"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_hashed", {})


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of a snapshot, as the client lays it out."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return put(tmp_path / "hub" / "models--user--law")


def put(repository: Path) -> Path:
    (repository / "blobs").mkdir(parents=True)
    (repository / "snapshots" / "c0ffee").mkdir(parents=True)
    (repository / "blobs" / "etag").write_bytes(CONTENT)
    link = repository / "snapshots" / "c0ffee" / "donor.safetensors"
    link.symlink_to("../../blobs/etag")
    return link


def forget(monkeypatch: pytest.MonkeyPatch, allow: bool = False) -> None:
    """Be another process; one that must not hash, unless it may."""
    monkeypatch.setattr(storage, "_hashed", {})
    if not allow:
        monkeypatch.setattr(storage, "sha256_of", lambda path: pytest.fail(f"{path} was hashed again"))


def test_another_process_does_not_hash_it_again(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert verified_sha256(cached) == SHA256
    forget(monkeypatch)
    assert verified_sha256(cached) == SHA256
    assert [path.name for path in cached.resolve().parent.iterdir() if path.name != "etag"] == ["etag.verified"]


def test_a_changed_file_is_hashed_again(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = cached.stat()
    verified_sha256(cached)
    cached.resolve().write_bytes(b"changed")
    os.utime(cached, ns=(before.st_atime_ns, before.st_mtime_ns))  # of the same size and time
    changed = hashlib.sha256(b"changed").hexdigest()
    assert verified_sha256(cached) == changed
    forget(monkeypatch)
    assert verified_sha256(cached) == changed


def test_a_replaced_file_is_hashed_again(cached: Path) -> None:
    verified_sha256(cached)
    new = cached.resolve().with_name("new")
    new.write_bytes(b"changed")
    os.replace(new, cached.resolve())
    assert verified_sha256(cached) == hashlib.sha256(b"changed").hexdigest()


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"sha256": "x", "file": {"size": "many"}}'])
def test_a_stamp_that_is_not_whole_does_not_count(cached: Path, text: str) -> None:
    cached.resolve().with_name("etag.verified").write_text(text)
    assert verified_sha256(cached) == SHA256


def test_no_stamp_outside_the_cache(cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign = put(tmp_path / "download" / "models--user--law")
    verified_sha256(foreign)
    assert sorted(path.name for path in foreign.resolve().parent.iterdir()) == ["etag"]
    state = foreign.stat()
    fields = {"size": state.st_size, "mtime_ns": state.st_mtime_ns, "ctime_ns": state.st_ctime_ns}
    stamp = {"sha256": "forged", "file": {"inode": state.st_ino, **fields}}
    foreign.resolve().with_name("etag.verified").write_text(json.dumps(stamp))
    forget(monkeypatch, allow=True)
    assert verified_sha256(foreign) == SHA256


def test_a_file_whose_link_leads_out_of_the_cache(cached: Path, tmp_path: Path) -> None:
    outside = put(tmp_path / "elsewhere" / "models--user--law").resolve()
    cached.unlink()
    cached.symlink_to(outside)
    verified_sha256(cached)
    assert not outside.with_name("etag.verified").exists()


def test_a_cache_that_cannot_be_written(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(storage.tempfile, "mkstemp", refuse)
    assert verified_sha256(cached) == SHA256
    assert not cached.resolve().with_name("etag.verified").exists()
