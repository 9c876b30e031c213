"""Folders written whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import refused
from transplant_hf import CheckpointError, ConfigurationError, storage
from transplant_hf.storage import publish, read_json, sha256_of, write_json


def is_old(name: str) -> bool:
    return name.startswith("old")


def content_of(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A folder with two files of an old artefact and some of the user's own."""
    folder = tmp_path / "place" / "model"
    (folder / "mine").mkdir(parents=True)
    for name in ("old1", "old2", "notes.txt", "mine/deep.txt"):
        (folder / name).write_text(name)
    return folder


AFTER = {"mine/deep.txt": "mine/deep.txt", "notes.txt": "notes.txt", "new": "new", "old1": "renewed"}


def renew(target: Path) -> None:
    with publish(target, is_old) as staging:
        (staging / "new").write_text("new")
        (staging / "old1").write_text("renewed")


def test_a_new_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    with publish(target, is_old) as staging:
        (staging / "file").write_text("x")
        assert not target.exists()
    assert content_of(target) == {"file": "x"}
    assert names_in(tmp_path / "a") == ["b"]


def test_an_old_artefact_goes_and_other_files_stay(target: Path) -> None:
    renew(target)
    assert content_of(target) == AFTER
    assert names_in(target.parent) == ["model"]


def test_an_exception_changes_nothing(target: Path) -> None:
    before = content_of(target)

    def fail() -> None:
        with publish(target, is_old) as staging:
            (staging / "new").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert content_of(target) == before
    assert names_in(target.parent) == ["model"]


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EINVAL, errno.EPERM])
def test_where_folders_cannot_be_exchanged(target: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def cannot(*_: Any) -> None:
        raise OSError(code, "not here")

    monkeypatch.setattr(storage, "_exchange", cannot)
    renew(target)
    assert content_of(target) == AFTER
    assert names_in(target.parent) == ["model"]


def test_a_full_disk_is_not_swallowed(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(storage, "_exchange", full)
    before = content_of(target)
    with pytest.raises(OSError, match="no space left"):
        renew(target)
    assert content_of(target) == before
    assert names_in(target.parent) == ["model"]


def test_the_working_directory_is_renewed_in_place(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(target)
    before = target.stat().st_ino
    renew(Path("."))
    assert content_of(target) == AFTER
    assert target.stat().st_ino == before
    assert Path.cwd() == target
    assert names_in(target.parent) == ["model"]


def test_a_link_stays_a_link(target: Path) -> None:
    link = target.parent / "link"
    link.symlink_to(target, target_is_directory=True)
    renew(link)
    assert link.is_symlink()
    assert content_of(target) == AFTER
    assert names_in(target.parent) == ["link", "model"]


def test_links_inside_are_carried_over(target: Path) -> None:
    (target / "shortcut").symlink_to("notes.txt")
    renew(target)
    assert (target / "shortcut").is_symlink()
    assert os.readlink(target / "shortcut") == "notes.txt"


def test_a_file_is_no_target(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("mine")
    with refused(ConfigurationError, str(tmp_path / "model"), "is a file", "folder"):
        renew(tmp_path / "model")
    assert (tmp_path / "model").read_text() == "mine"


def dead_process() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


@pytest.mark.parametrize("name", ["model", "mo[d]el", "model*"])
def test_what_a_killed_process_left_is_swept(tmp_path: Path, name: str) -> None:
    target = tmp_path / name
    stale = tmp_path / f".{name}.{dead_process()}-0011aabb.tmp"
    running = tmp_path / f".{name}.{os.getppid()}-0011aabb.tmp"
    foreign = tmp_path / ".other.123-0011aabb.tmp"
    for folder in (stale, running, foreign):
        folder.mkdir()
        (folder / "half").write_text("")
    renew(target)
    assert names_in(tmp_path) == sorted([foreign.name, running.name, name])


def test_the_only_copy_is_never_swept(tmp_path: Path) -> None:
    """Where folders cannot be exchanged, a process may be killed between the two renames."""
    aside = tmp_path / f".model.{dead_process()}-0011aabb.old.tmp"
    aside.mkdir()
    (aside / "old1").write_text("the only copy")

    def fail() -> None:
        with publish(tmp_path / "model", is_old):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert "the only copy" in [path.read_text() for path in tmp_path.rglob("old1")]


def test_files_get_the_usual_mode(tmp_path: Path) -> None:
    """safetensors writes files for their owner alone."""
    umask = os.umask(0o027)
    try:
        with publish(tmp_path / "model", is_old) as staging:
            (staging / "weights").touch(mode=0o600)
            (staging / "folder").mkdir(mode=0o700)
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "model" / "weights").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "model" / "folder").stat().st_mode) == 0o750


def test_read_json_says_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "it.json"
    with refused(CheckpointError, "the record is missing", str(path)):
        read_json(path, "the record")
    path.write_text('{"a": ')
    with refused(CheckpointError, "the record is not JSON", str(path)):
        read_json(path, "the record")
    path.write_bytes(b"\xff\xfe\x00")
    with refused(CheckpointError, "the record is not JSON", str(path)):
        read_json(path, "the record")
    path.write_text("[1]")
    with refused(CheckpointError, "JSON object", "list", str(path)):
        read_json(path, "the record")
    write_json(path, {"ü": [1]})
    assert read_json(path, "the record") == {"ü": [1]}
    assert "ü" in path.read_text()


def test_sha256_of(tmp_path: Path) -> None:
    data = os.urandom(1 << 20)
    (tmp_path / "file").write_bytes(data)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(data).hexdigest()
