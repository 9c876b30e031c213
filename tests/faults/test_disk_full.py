"""A disk that fills up, or may not be written to: one sentence, the old artefact whole, nothing left behind."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from tests.faults.looping import pt_file
from tests.helpers import DONOR_LAYERS, Shelf, copied, digest_of, loaded, refused
from transplant_hf import AutoModelWithTransplant, CheckpointError, Donor
from transplant_hf.conversion import convert

FACTS = ("cannot write", "disk is full", "Free some space")


def fill(disk: Path, left: int) -> None:
    """Leave this many bytes."""
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    (disk / "filler").write_bytes(b"x" * (free - left))


Write = Callable[[Path, Path, Path], Any]


def convert_again(family: Path, file: Path, target: Path) -> None:
    convert(file, family / "recipient", target, overwrite=True, layers=list(DONOR_LAYERS), position=2)


def save_donor_again(family: Path, file: Path, target: Path) -> None:
    Donor.from_pretrained(family / "donor").save_pretrained(target, position=2, recipient=str(family / "recipient"))


def save_thin_again(family: Path, file: Path, target: Path) -> None:
    loaded(family, 2).save_pretrained(target, thin=True)


def save_full_again(family: Path, file: Path, target: Path) -> None:
    loaded(family, 2).save_pretrained(target)


WRITERS = [convert_again, save_donor_again, save_thin_again, save_full_again]


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("write", WRITERS)
def test_a_full_disk(tiny_gpt2: Path, tmp_path: Path, small_disk: Path, write: Write, old: bool) -> None:
    target, file = small_disk / "place" / "model", pt_file(copied(tiny_gpt2, tmp_path / "family"))
    target.parent.mkdir()
    if old:
        loaded(tiny_gpt2, 1).save_pretrained(target, thin=True)
    before = digest_of(target.parent)
    fill(small_disk, 24 << 10)
    with refused(CheckpointError, str(target), "unchanged" if old else "Nothing was left", *FACTS) as caught:
        write(tiny_gpt2, file, target)
    assert caught.value.__cause__ is not None
    assert digest_of(target.parent) == before
    assert [path.name for path in target.parent.iterdir()] == (["model"] if old else [])
    if old:
        Donor.from_pretrained(target).verify()
    (small_disk / "filler").unlink()
    write(tiny_gpt2, file, target)
    assert digest_of(target.parent) != before


@pytest.mark.parametrize("write", WRITERS)
def test_a_full_disk_that_is_a_mounted_folder(tiny_gpt2: Path, tmp_path: Path, small_disk: Path, write: Write) -> None:
    loaded(tiny_gpt2, 1).save_pretrained(small_disk, thin=True)
    fill(small_disk, 24 << 10)
    before = digest_of(small_disk)
    with refused(CheckpointError, str(small_disk), *FACTS):
        write(tiny_gpt2, pt_file(copied(tiny_gpt2, tmp_path / "family")), small_disk)
    assert digest_of(small_disk) == before
    assert not list(small_disk.glob(".*"))


@pytest.mark.parametrize("write", WRITERS)
def test_files_that_may_not_grow_so_large(tiny_gpt2: Path, tmp_path: Path, write: Write) -> None:
    """A limit of the process (`ulimit -f`): writing fails half-way through a file."""
    target, file = tmp_path / "place" / "model", pt_file(copied(tiny_gpt2, tmp_path / "family"))
    loaded(tiny_gpt2, 1).save_pretrained(target, thin=True)
    before = digest_of(target.parent)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, hard))
    try:
        with refused(
            CheckpointError, str(target), "larger than this disk or process may write", "unchanged", "max_shard_size="
        ):
            write(tiny_gpt2, file, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert digest_of(target.parent) == before
    assert [path.name for path in target.parent.iterdir()] == ["model"]


@pytest.mark.hub
def test_a_full_disk_while_downloading(both: Shelf, small_disk: Path) -> None:
    """The cache is on it; once there is space, the same call goes on."""
    fill(small_disk, 64 << 10)
    for call in (
        lambda: Donor.from_pretrained(both.law, cache_dir=str(small_disk)),
        lambda: AutoModelWithTransplant.from_pretrained(both.law, cache_dir=str(small_disk)),
    ):
        with refused(CheckpointError, both.law, str(small_disk), "disk is full", "Free some space"):
            call()
        assert not list(small_disk.rglob("*.incomplete"))
        assert not list(small_disk.rglob("donor.safetensors"))
    (small_disk / "filler").unlink()
    Donor.from_pretrained(both.law, cache_dir=str(small_disk)).verify()


@pytest.mark.hub
def test_a_full_disk_while_downloading_the_recipient(both: Shelf, small_disk: Path) -> None:
    cache = str(small_disk)
    AutoModelWithTransplant.from_config(AutoConfig.from_pretrained(both.law, cache_dir=cache), cache_dir=cache)
    fill(small_disk, 48 << 10)
    with refused(CheckpointError, both.base, "disk is full", "Free some space"):
        AutoModelWithTransplant.from_pretrained(both.law, cache_dir=cache)
    assert not list(small_disk.rglob("*.incomplete"))
    (small_disk / "filler").unlink()
    AutoModelWithTransplant.from_pretrained(both.law, cache_dir=cache)
