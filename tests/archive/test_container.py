"""Files that are not what `torch.save` writes, cut short, flipped, or made to lie: one kind of error, every time."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.archive.crafted import (
    LISTING,
    Member,
    bits,
    everything,
    legacy_file,
    members_of,
    pickled_file,
    raw_zip,
    repacked,
    saved,
    tensor_code,
    zip_of,
)
from tests.helpers import refused
from transplant_hf import CheckpointError
from transplant_hf.archive import PtFile

CONTENT = {"a": torch.arange(6.0).reshape(2, 3), "b": [torch.ones(2, dtype=torch.bfloat16), {"lr": 0.5}]}
FORMATS = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
EMPTY = b"\x80\x02}."


def outcome(path: Path) -> Any:
    """What a file holds, or `None` where it is refused by an error that names it."""
    try:
        tensors = {name: bits(tensor) for name, tensor in everything(path).items()}
        return tensors, dict(PtFile(path).values)
    except CheckpointError as error:
        assert str(path) in str(error)
        return None


# -- Damage -------------------------------------------------------------------------------------------------------


@FORMATS
def test_every_file_that_is_cut_short_is_refused(legacy: bool, tmp_path: Path) -> None:
    path = saved(tmp_path / "whole.pt", CONTENT, legacy)
    whole, part = path.read_bytes(), tmp_path / "part.pt"
    assert outcome(path) is not None
    for length in range(len(whole)):
        part.write_bytes(whole[:length])
        assert outcome(part) is None, length


def test_a_flipped_bit_is_found_or_does_no_harm(tmp_path: Path) -> None:
    path = saved(tmp_path / "whole.pt", CONTENT)
    whole, wanted, changed = path.read_bytes(), outcome(path), tmp_path / "changed.pt"
    found = 0
    for place in range(len(whole)):
        for mask in (1 << place % 8, 0xFF):
            data = bytearray(whole)
            data[place] ^= mask
            changed.write_bytes(data)
            seen = outcome(changed)
            assert seen in (None, wanted), (place, mask)
            found += seen is None
    assert found > len(whole) // 2


def test_a_flipped_bit_in_the_old_format_raises_nothing_else(tmp_path: Path) -> None:
    path = saved(tmp_path / "whole.pt", CONTENT, legacy=True)
    whole, changed = path.read_bytes(), tmp_path / "changed.pt"
    for place in range(len(whole)):
        for mask in (1 << place % 8, 0xFF):
            data = bytearray(whole)
            data[place] ^= mask
            changed.write_bytes(data)
            outcome(changed)


def test_changed_bytes_of_a_tensor_are_named(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", CONTENT)
    data = bytearray(path.read_bytes())
    data[data.index(CONTENT["a"].numpy().tobytes()) + 5] ^= 4
    path.write_bytes(data)
    file = PtFile(path)
    assert file["b.0"][...].tolist() == [1, 1]
    with refused(CheckpointError, str(path), "tensor 'a'", "checksum", "Get it again"):
        file["a"][0:1]


# -- Other files ----------------------------------------------------------------------------------------------------


def torchscript(path: Path) -> None:
    zip_of(path, {"m/constants.pkl": EMPTY, "m/code/x.py": b"", "m/byteorder": b"little", "m/version": b"3\n"})


OTHER_FILES: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "nothing": (lambda path: path.write_bytes(b""), ("it is empty", "Get the file again")),
    "a pointer": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        ("Git LFS pointer", "git lfs pull"),
    ),
    "a web page": (lambda path: path.write_text("<!DOCTYPE html>\n<html></html>"), ("web page", "hf download")),
    "safetensors": (
        lambda path: save_file({"a": torch.ones(2)}, path),
        ("safetensors file", "Donor.from_pretrained"),
    ),
    "torchscript": (torchscript, ("TorchScript archive", "Save the layers' state dicts with torch.save")),
    "another zip": (lambda path: zip_of(path, {"a/b.txt": b"x"}), ("some other zip archive", "a/data.pkl")),
    "an empty zip": (lambda path: zip_of(path, {}), ("empty zip archive",)),
    "a pickle": (lambda path: path.write_bytes(b"\x80\x04]\x94."), ("a pickle of another kind", "torch.save")),
    "a pickle of its own": (
        lambda path: path.write_bytes(b"\x80\x02c__builtin__\neval\nU\x011\x85R."),
        ("a pickle of another kind",),
    ),
    "text": (lambda path: path.write_text("hello"), ("it begins with b'hello'",)),
    "a folder": (lambda path: path.mkdir(), ("is a folder", "Files in it: none")),
    "a pipe": (os.mkfifo, ("there is no file",)),
    "no file": (lambda path: None, ("there is no file",)),
    "a link to nowhere": (lambda path: path.symlink_to(path.parent / "gone"), ("there is no file",)),
}


@pytest.mark.parametrize("kind", sorted(OTHER_FILES))
def test_other_files_are_told_apart(kind: str, tmp_path: Path) -> None:
    make, facts = OTHER_FILES[kind]
    make(tmp_path / "layers.pt")
    with refused(CheckpointError, str(tmp_path / "layers.pt"), *facts):
        PtFile(tmp_path / "layers.pt")


def test_a_name_that_no_file_can_have(tmp_path: Path) -> None:
    for name in ("x" * 5000, "a\0b"):
        with refused(CheckpointError):
            PtFile(tmp_path / name)


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "a.pt", CONTENT)

    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with refused(CheckpointError, str(path), "Permission denied", "yours to read"):
        PtFile(path)


# -- Archives that torch would not write ------------------------------------------------------------------------------


@pytest.mark.parametrize("member", ["a/data/0", "a/data.pkl", "a/byteorder"])
def test_compressed_members_are_refused(member: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", CONTENT)
    members = members_of(path)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data * 50, zipfile.ZIP_DEFLATED if name == member else zipfile.ZIP_STORED)
    with refused(CheckpointError, str(path), member, "compressed", "save it again with torch.save"):
        PtFile(path)


NAMES = ["made/../x", "../made/x", "..", "/made/x", "made\\x", "C:/x", "made/\x1b[31m", "made/a\nb", "made/\x00x"]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_lead_elsewhere_are_refused(name: str, tmp_path: Path) -> None:
    path = raw_zip(tmp_path / "a.pt", [Member("made/data.pkl", EMPTY), Member(name, b"x")])
    with refused(CheckpointError, str(path), "could lead out of a folder") as caught:
        PtFile(path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("member", "facts"),
    [
        (Member("made/x", b"x", flags=1), ("'made/x'", "encrypted")),
        (Member("made/x", b"x", attributes=0o120777 << 16), ("'made/x'", "a link")),
        (Member("made/x", b"x", size=1 << 31), ("'made/x'", "claims bytes")),
        (Member("made/x", b"x", listed_as="made/y"), ("'made/y'", "calls itself b'made/x'")),
        (Member("made/x", b"x", offset=3), ("'made/x'", "not where the list")),
        (Member("made/x", b"x", offset=1 << 31), ("'made/x'", "not where the list")),
        (Member("made/data.pkl", b"x"), ("two members named 'made/data.pkl'",)),
        (Member("other/x", b"x"), ("2 top folders (made, other)",)),
        (Member("data.pkl", EMPTY), ("2 top folders (data.pkl, made)",)),
        (Member("made/byteorder", b"big"), ("byte order b'big'", "little-endian")),
        (Member("made/byteorder", b"big" + bytes(40)), ("byte order", "little-endian")),
        (Member("made/byteorder", b"little", crc=1), ("byteorder does not have the checksum",)),
    ],
)
def test_members_that_lie_are_refused(member: Member, facts: tuple[str, ...], tmp_path: Path) -> None:
    path = raw_zip(tmp_path / "a.pt", [Member("made/data.pkl", EMPTY), member, Member("made/z", b"z")])
    with refused(CheckpointError, str(path), *facts):
        PtFile(path)


def test_members_that_overlap_are_refused(tmp_path: Path) -> None:
    inner = Member("made/data/1", bytes(16))
    outer = Member("made/data/0", inner.local())
    begin = len(Member("made/data.pkl", EMPTY).local()) + len(outer.local()) - len(outer.data)
    inner.offset = begin
    path = raw_zip(tmp_path / "a.pt", [Member("made/data.pkl", EMPTY), outer, inner])
    with refused(CheckpointError, str(path), "'made/data/0' and 'made/data/1' overlap"):
        PtFile(path)


def test_one_members_bytes_cannot_be_given_twice(tmp_path: Path) -> None:
    first = Member("made/data/0", bytes(16))
    path = raw_zip(tmp_path / "a.pt", [Member("made/data.pkl", EMPTY), first, Member("made/data/0", b"", offset=53)])
    with refused(CheckpointError, str(path), "two members named"):
        PtFile(path)


def test_a_pickle_of_another_checksum_is_refused(tmp_path: Path) -> None:
    path = raw_zip(tmp_path / "a.pt", [Member("made/data.pkl", EMPTY, crc=7)])
    with refused(CheckpointError, str(path), "data.pkl does not have the checksum recorded for it"):
        PtFile(path)


def test_a_huge_pickle_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    body = Member("made/data.pkl", b"").local()
    size = (1 << 26) + 1
    listing = Member("made/data.pkl", b"", size=size, crc=0).listing(0)
    end = b"PK\5\6\0\0\0\0\1\0\1\0" + len(listing).to_bytes(4, "little") + (len(body) + size).to_bytes(4, "little")
    with path.open("wb") as file:
        file.write(body)
        file.seek(len(body) + size)
        file.write(listing + end + b"\0\0")
    assert LISTING.size + len("made/data.pkl") == len(listing)
    with refused(CheckpointError, str(path), f"data.pkl has {size} bytes"):
        PtFile(path)


def test_an_endless_list_of_members_is_refused_unread(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", CONTENT)
    data = bytearray(path.read_bytes())
    if (zip64 := data.rfind(b"PK\6\6")) >= 0:
        data[zip64 + 40 : zip64 + 48] = ((1 << 24) + 1).to_bytes(8, "little")
    else:
        end = data.rfind(b"PK\5\6")
        data[end + 12 : end + 16] = ((1 << 24) + 1).to_bytes(4, "little")
    path.write_bytes(data)
    with refused(CheckpointError, str(path), "list of members claims 16777217 bytes"):
        PtFile(path)


# -- The format from before torch 1.6 ------------------------------------------------------------------------------

TENSOR = b"\x80\x02" + tensor_code() + b"."
STORED = (4).to_bytes(8, "little") + bytes(16)


def test_a_file_of_the_old_format_made_by_hand_is_read(tmp_path: Path) -> None:
    found = everything(legacy_file(tmp_path / "a.pt", TENSOR, ("0",), STORED))
    assert bits(found[""]) == bits(torch.zeros(2, 2))


@pytest.mark.parametrize(
    ("keys", "tail", "fact"),
    [
        ((), STORED, "other storages"),
        (("0", "1"), STORED, "other storages"),
        (("0", "0"), STORED + STORED, "other storages"),
        ((["0"],), STORED, "other storages"),
        ((0,), STORED, "other storages"),
        ({"0": 1}, STORED, "other storages"),
        (("0",), STORED[:-1], "should hold 16 bytes"),
        (("0",), STORED[:5], "should hold 16 bytes"),
        (("0",), (5).to_bytes(8, "little") + bytes(20), "should hold 16 bytes"),
        (("0",), (3).to_bytes(8, "little") + bytes(16), "should hold 16 bytes"),
    ],
)
def test_storages_of_the_old_format_that_lie_are_refused(keys: Any, tail: bytes, fact: str, tmp_path: Path) -> None:
    path = legacy_file(tmp_path / "a.pt", TENSOR, keys, tail)
    with refused(CheckpointError, str(path), fact):
        PtFile(path)


def test_the_old_format_from_a_big_endian_machine_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", CONTENT, legacy=True)
    data = path.read_bytes()
    at = data.index(b"little_endian")
    assert data[at + 13 :].startswith(b"q\x02\x88")
    path.write_bytes(data[: at + 15] + b"\x89" + data[at + 16 :])
    with refused(CheckpointError, str(path), "little-endian byte order", "save it again"):
        PtFile(path)


def test_a_storage_missing_from_the_archive_is_named_when_it_is_read(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", CONTENT)
    repacked(path, lambda members: members.pop("a/data/0"))
    assert PtFile(path)["b.0"][...].tolist() == [1, 1]
    with refused(CheckpointError, str(path), "the bytes of tensor 'a' are missing"):
        PtFile(path)["a"][...]


def test_a_file_of_no_tensors_is_read(tmp_path: Path) -> None:
    assert everything(pickled_file(tmp_path / "a.pt", EMPTY)) == {}
