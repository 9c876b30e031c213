"""Folders written whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from tests.helpers import refused
from transplant_hf import CheckpointError, ConfigurationError, storage
from transplant_hf.storage import files_in, publish, read_json, sha256_of, write_json


def is_old(folder: Path) -> set[str]:
    return {name for name in files_in(folder) if name.rpartition("/")[2].startswith("old")}


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


@pytest.mark.parametrize("in_place", [False, True])
def test_files_in_a_renewed_subfolder_stay(target: Path, in_place: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("part/notes.txt", "part/old1", "part/old2", "part/deep/notes.txt", "gone/old1", "both/notes.txt"):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text(name)
    (target / "empty").mkdir()
    if in_place:
        monkeypatch.chdir(target)
    with publish(target, is_old) as staging:
        (staging / "part").mkdir()
        (staging / "part" / "old1").write_text("renewed")
    kept = ("notes.txt", "mine/deep.txt", "part/notes.txt", "part/deep/notes.txt", "both/notes.txt")
    assert content_of(target) == {"part/old1": "renewed", **{name: name for name in kept}}
    assert (target / "empty").is_dir()


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
    with refused(CheckpointError, str(target), "disk is full", "unchanged", "Free some space") as caught:
        renew(target)
    assert isinstance(caught.value.__cause__, OSError)
    assert content_of(target) == before
    assert names_in(target.parent) == ["model"]


@pytest.mark.parametrize(
    ("code", "facts"),
    [
        (errno.ENOSPC, ("disk is full", "Free some space")),
        (errno.EDQUOT, ("quota", "Free some space")),
        (errno.EFBIG, ("larger than", "max_shard_size=")),
        (errno.EROFS, ("read-only", "another folder")),
        (errno.EACCES, ("permission is denied", "another folder")),
    ],
)
@pytest.mark.parametrize("native", [False, True])
def test_what_a_disk_refuses(tmp_path: Path, code: int, facts: tuple[str, ...], native: bool) -> None:
    """By Python, and by safetensors, which has only the system's number in its text."""
    error: Exception = OSError(code, os.strerror(code))
    if native:
        error = SafetensorError(f"Error while serializing: I/O error: {os.strerror(code)} (os error {code})")

    def fail() -> None:
        with publish(tmp_path / "place" / "model", is_old) as staging:
            (staging / "new").write_text("half")
            raise error

    with refused(CheckpointError, str(tmp_path / "place" / "model"), "Nothing was left behind", *facts) as caught:
        fail()
    assert caught.value.__cause__ is error
    assert names_in(tmp_path / "place") == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "broken"),
        SafetensorError("header too large"),
        PermissionError(errno.EACCES, "no", "/elsewhere/source.pt"),
    ],
)
def test_other_errors_are_not_renamed(tmp_path: Path, error: Exception) -> None:
    """Among them, a file that may not be read."""

    def fail() -> None:
        with publish(tmp_path / "model", is_old):
            raise error

    with pytest.raises(type(error)) as caught:
        fail()
    assert caught.value is error
    assert names_in(tmp_path) == []


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


def test_a_link_to_another_disk(target: Path, small_disk: Path) -> None:
    """Files cannot be renamed from one disk to another."""
    (small_disk / "model").mkdir()
    (small_disk / "model" / "old1").write_text("old1")
    link = target.parent / "link"
    link.symlink_to(small_disk / "model", target_is_directory=True)
    renew(link)
    assert content_of(link) == {"new": "new", "old1": "renewed"}
    assert names_in(small_disk) == ["model"]
    assert names_in(target.parent) == ["link", "model"]


def test_a_mounted_folder_is_renewed_in_place(small_disk: Path) -> None:
    """As in a container whose output folder is a volume: the folder around it may be read-only."""
    (small_disk / "mine").mkdir()
    (small_disk / "part").mkdir()
    for name in ("old1", "old2", "notes.txt", "mine/deep.txt", "part/old"):
        (small_disk / name).write_text(name)
    around = names_in(small_disk.parent)
    with publish(small_disk, is_old) as staging:
        assert staging.parent == small_disk
        (staging / "new").write_text("new")
        (staging / "old1").write_text("renewed")
        (staging / "part").mkdir()
        (staging / "part" / "fresh").write_text("fresh")
    assert content_of(small_disk) == {**AFTER, "part/fresh": "fresh"}
    assert names_in(small_disk) == ["mine", "new", "notes.txt", "old1", "part"]
    assert names_in(small_disk.parent) == around


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


@pytest.mark.parametrize("name", ["model", "mo[d]el", "model*"])
def test_what_a_killed_process_left_is_removed(tmp_path: Path, name: str) -> None:
    abandoned = tmp_path / f".{name}.0011aabb.tmp"
    foreign = [tmp_path / ".other.0011aabb.tmp", tmp_path / f".{name}.backup.tmp"]
    for folder in (abandoned, *foreign):
        folder.mkdir()
        (folder / "half").write_text("")
    renew(tmp_path / name)
    assert names_in(tmp_path) == sorted([*(folder.name for folder in foreign), name])


def test_what_another_process_is_writing_stays(tmp_path: Path) -> None:
    """Its lock shows that it is running, in another container too."""
    foreign = tmp_path / ".model.0011aabb.tmp"
    foreign.mkdir()
    handle = os.open(foreign, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        renew(tmp_path / "model")
        assert names_in(tmp_path) == [foreign.name, "model"]
    finally:
        os.close(handle)
    renew(tmp_path / "model")
    assert names_in(tmp_path) == ["model"]


def test_two_that_appear_at_once(tmp_path: Path) -> None:
    """Both saw that there was nothing; the second one renews what the first one made."""
    target = tmp_path / "model"
    with publish(target, is_old) as outer:
        (outer / "old1").write_text("outer")
        with publish(target, is_old) as inner:
            (inner / "old2").write_text("inner")
    assert content_of(target) == {"old1": "outer"}
    assert names_in(tmp_path) == ["model"]


def test_the_second_waits_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look whether there is something already and the renaming, nothing may appear."""
    target, exists = tmp_path / "model", Path.exists
    other = threading.Thread(target=renew, args=(target,))

    def slow(path: Path) -> bool:
        found = exists(path)
        if path == target and threading.current_thread() is threading.main_thread() and other.ident is None:
            other.start()
            other.join(0.3)
        return found

    with publish(target, is_old) as staging:
        (staging / "old2").write_text("first")
        monkeypatch.setattr(Path, "exists", slow)
    other.join()
    assert content_of(target) == {"new": "new", "old1": "renewed"}
    assert names_in(tmp_path) == ["model"]


def test_many_threads_at_once(tmp_path: Path) -> None:
    """Each writes two files that belong together, over and over."""
    target = tmp_path / "model"

    def write(number: int) -> None:
        for turn in range(40):
            with publish(target, is_old) as staging:
                for name in ("old1", "old2"):
                    (staging / name).write_text(f"{number} {turn}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    found = content_of(target)
    assert set(found) == {"old1", "old2"}
    assert found["old1"] == found["old2"]
    assert names_in(tmp_path) == ["model"]


def test_the_only_copy_is_never_swept(tmp_path: Path) -> None:
    """Where folders cannot be exchanged, a process may be killed between the two renames."""
    aside = tmp_path / ".model.0011aabb.old.tmp"
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
    with refused(CheckpointError, "the record cannot be read as JSON", str(path)):
        read_json(path, "the record")
    path.write_bytes(b"\xff\xfe\x00")
    with refused(CheckpointError, "the record cannot be read as JSON", str(path)):
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
