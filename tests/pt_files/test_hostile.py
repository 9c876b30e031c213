"""Files that would run code, or take much time or memory, do neither; damaged files end in an error that names them."""

from __future__ import annotations

import os
import pickle
import random
import resource
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.helpers import refused
from tests.pt_files.crafted import (
    bits,
    everything,
    legacy_file,
    long_of,
    members_of,
    pickled_file,
    repacked,
    saved,
    tensor_code,
    text,
    zip_of,
)
from transplant_hf import CheckpointError
from transplant_hf.pt_files import PtFile, pt_file

FORMATS = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
CONTENT = {"a": torch.arange(6.0).reshape(2, 3), "b": [torch.ones(2, dtype=torch.bfloat16), {"lr": 0.5}]}
EMPTY = b"\x80\x02}."


def outcome(path: Path) -> Any:
    """What a file holds, or `None` where it is refused by an error that names it."""
    try:
        return {name: bits(tensor) for name, tensor in everything(path).items()}, dict(PtFile(path).values)
    except CheckpointError as error:
        assert str(path) in str(error)
        return None


# -- Code ----------------------------------------------------------------------------------------------------------


class Runs:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call

    def __call__(self) -> None:
        """The pickler wants it; the unpickler calls what this was replaced by."""


# What each would do, given a path: make a file there.
PAYLOADS: dict[str, Callable[[Path], Runs]] = {
    "os.system": lambda path: Runs(os.system, f"touch {path}"),
    "subprocess": lambda path: Runs(subprocess.call, ["touch", str(path)]),
    "eval": lambda path: Runs(eval, f"open({str(path)!r}, 'w')"),
    "exec": lambda path: Runs(exec, f"open({str(path)!r}, 'w').close()"),
    "open": lambda path: Runs(open, str(path), "w"),
    "getattr": lambda path: Runs(getattr, Runs(__import__, "os"), "system"),
    "torch.load": lambda path: Runs(torch.load, str(saved(path.with_suffix(".inner"), Runs(os.mkdir, str(path))))),
    "bytes": lambda path: Runs(torch.storage._load_from_bytes, pickle.dumps(Runs(os.mkdir, str(path)))),
    "pickle.loads": lambda path: Runs(pickle.loads, pickle.dumps(Runs(os.mkdir, str(path)))),
    "torch.save": lambda path: Runs(torch.save, [1], str(path)),
    "chained": lambda path: Runs(Runs(getattr, Runs(__import__, "os"), "mkdir"), str(path)),
}


@FORMATS
@pytest.mark.parametrize("payload", sorted(PAYLOADS))
def test_payloads_do_not_run(payload: str, legacy: bool, tmp_path: Path) -> None:
    made = tmp_path / "made"
    runs = PAYLOADS[payload](made)
    content: dict[str, Any] = {"before": torch.ones(2), "x": runs, "after": torch.arange(3.0)}
    content["deep"] = {"list": [runs, {"deeper": runs}]}
    path = saved(tmp_path / "a.pt", content, legacy)
    assert {name: bits(t) for name, t in everything(path).items()} == {
        "before": bits(torch.ones(2)),
        "after": bits(torch.arange(3.0)),
    }
    assert not made.exists()
    assert PtFile(path).classes


def test_the_payloads_run_under_plain_pickle(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", PAYLOADS["os.system"](tmp_path / "made"))
    torch.load(path, weights_only=False)
    assert (tmp_path / "made").exists()


def test_what_a_file_names_is_listed_and_not_imported(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", {"a": torch.ones(2), "x": Runs(os.system, "true"), "y": Runs(eval, "1")})
    assert PtFile(path).classes == ("__builtin__.eval", "posix.system")
    before = set(sys.modules)
    made = pickled_file(tmp_path / "b.pt", b"\x80\x02](ctorch\n_no_such\ncantigravity\nfly\ne.")
    assert PtFile(made).classes == ("antigravity.fly", "torch._no_such")
    assert set(sys.modules) == before


@pytest.mark.parametrize("code", [b"\x82\x01", b"\x97", b"\x98", b"\xff", b"cos\nsystem\n}" + text("x") + b"Nsb"])
def test_codes_that_reach_out_of_the_file_are_refused(code: bytes, tmp_path: Path) -> None:
    path = pickled_file(tmp_path / "a.pt", b"\x80\x05N" + code + b".")
    with refused(CheckpointError, str(path), "could not be read"):
        PtFile(path)


# -- Time and memory -----------------------------------------------------------------------------------------------


def wide(count: int, item: bytes = b"N") -> bytes:
    """A list of one thing many times, kept as number 0."""
    return b"](" + item * count + b"eq\x00"


def laughing(leaf: bytes, twice: bytes, levels: int = 60) -> bytes:
    """A thing that holds a thing twice, and so on."""
    return leaf + twice * levels


PAIR = b"2\x86"  # what is there, again, both in a tuple
LIST = b"q\x010](h\x01h\x01e"
DICT = b"q\x010}(" + text("a") + b"h\x01" + text("b") + b"h\x01u"
BOMBS = {
    "a giant place in the memo": b"Nr\xff\xff\xff\xff",
    "bytes of a giant length": b"\x8e" + struct.pack("<Q", 1 << 45) + b"x",
    "changeable bytes of a great length": b"\x96" + struct.pack("<Q", 1 << 34) + b"x",
    "a number of a giant length": b"\x8b\xff\xff\xff\x7fx",
    "lists in lists": b"]" * 500_000 + b"a" * 499_999,
    "a key of tuples in tuples": b"})" + b"\x85" * 500_000 + b"Ns",
    "a list that holds itself": b"]q\x00h\x00a",
    "an object that holds itself": b"cx\nY\n)\x81q\x00}" + text("_modules") + b"}" + text("a") + b"h\x00ssb",
    "laughing lists": laughing(b"G" + bytes(8), LIST),
    "laughing dictionaries": laughing(b"}", DICT),
    "laughing tensors": laughing(tensor_code(), LIST, 30),
    "a laughing key": b"}" + laughing(b")", PAIR) + b"Ns",
    "a laughing member": b"\x8f(" + laughing(b")", PAIR) + b"\x90",
    "a laughing reference": laughing(b")", PAIR) + b"Q",
    "a laughing shape": b"ctorch._utils\n_rebuild_tensor_v2\n(N" + laughing(b"}", DICT) + b"NNtR",
    "objects of wide arguments": b"(" + b"N" * 60_000 + b"tq\x000](" + b"cx\nY\nh\x00R" * 20_000 + b"e",
    "copies of a wide list": wide(60_000, b"K\x01") + b"0](" + b"h\x00" * 60_000 + b"N\x85e",
    "a wide key, again and again": b"(" + b"N" * 30_000 + b"tq\x00}(" + b"h\x00N" * 20_000 + b"u",
    "long names": laughing(b"K\x01", b"q\x010}(" + text("a" * 30_000) + b"h\x01" + text("b" * 30_000) + b"h\x01u", 19),
    "many classes": b"](" + b"".join(f"cm{n}\nx\n".encode() for n in range(50_000)) + b"e",
    "huge numbers in a shape": tensor_code(shape=((1 << 4_000_000) + 1, 2)),
    "a huge number in text": b"}I" + b"9" * 5000 + b"\nNs",
}


@pytest.mark.parametrize("name", sorted(BOMBS))
def test_a_small_file_takes_little_time_and_memory(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pt_file, "_SECONDS", 1)
    monkeypatch.setattr(pt_file, "_MEMORY", 1 << 28)
    path = pickled_file(tmp_path / "a.pt", b"\x80\x05" + BOMBS[name] + b".", {"0": bytes(16)})
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with refused(CheckpointError, str(path)) as caught:
        PtFile(path)
    assert len(str(caught.value)) < 1500
    assert time.process_time() - began < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 2 << 20


def test_compressed_members_are_refused(tmp_path: Path) -> None:
    for number, member in enumerate(("a/data/0", "a/data.pkl", "a/byteorder")):
        (tmp_path / str(number)).mkdir()
        path = saved(tmp_path / str(number) / "a.pt", CONTENT)
        members = members_of(path)
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in members.items():
                archive.writestr(name, data * 50, zipfile.ZIP_DEFLATED if name == member else zipfile.ZIP_STORED)
        with refused(CheckpointError, str(path), member, "compressed", "Save it again with torch.save"):
            PtFile(path)


def test_a_huge_pickle_is_refused_unread(tmp_path: Path) -> None:
    path = pickled_file(tmp_path / "a.pt", b"N" * ((1 << 26) + 1))
    with refused(CheckpointError, str(path), "data.pkl of 67108865 bytes"):
        PtFile(path)


# -- Damage ----------------------------------------------------------------------------------------------------------


@FORMATS
def test_a_file_that_is_cut_short_anywhere_is_refused(legacy: bool, tmp_path: Path) -> None:
    path = saved(tmp_path / "whole.pt", CONTENT, legacy)
    whole, part = path.read_bytes(), tmp_path / "part.pt"
    assert outcome(path) is not None
    for length in {*range(0, len(whole), 127), 1, len(whole) - 1, len(whole) - 9}:
        part.write_bytes(whole[:length])
        assert outcome(part) is None, length


def test_a_flipped_bit_is_found_or_does_no_harm(tmp_path: Path) -> None:
    path = saved(tmp_path / "whole.pt", CONTENT)
    whole, expected, changed = path.read_bytes(), outcome(path), tmp_path / "changed.pt"
    found = []
    for place in range(0, len(whole), 83):
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        changed.write_bytes(data)
        found.append(outcome(changed))
        assert found[-1] in (None, expected), place
    assert found.count(None) > len(found) // 4


def test_changed_bytes_of_a_tensor_are_named(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", CONTENT)
    data = bytearray(path.read_bytes())
    data[data.index(CONTENT["a"].numpy().tobytes()) + 5] ^= 4  # type: ignore[attr-defined]
    path.write_bytes(data)
    file = PtFile(path)
    assert file.open_tensors(["b.0"])["b.0"].tolist() == [1, 1]
    with refused(CheckpointError, str(path), "tensor 'a'", "checksum", "Get the file again"):
        file.open_tensors(["a"])


def test_a_pickle_with_another_checksum_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", {"learning_rate": 0.5})
    path.write_bytes(path.read_bytes().replace(b"learning_rate", b"Learning_rate", 1))
    with refused(CheckpointError, str(path), "could not be read", "Bad CRC-32 for file 'a/data.pkl'"):
        PtFile(path)


@FORMATS
def test_noise_in_a_pickle_raises_nothing_else(legacy: bool, tmp_path: Path) -> None:
    content = {"a": torch.arange(6.0), "b": [nn.Linear(2, 2), {"lr": 0.5, "steps": [1, 2]}, torch.ones(2).half()]}
    path = saved(tmp_path / "whole.pt", content)
    members, chance, noisy = members_of(path), random.Random(0), tmp_path / "noisy.pt"
    code, prefix = members["whole/data.pkl"], "whole/data/"
    stored = {name.removeprefix(prefix): data for name, data in members.items() if name.startswith(prefix)}
    for _ in range(15):
        data = bytearray(code)
        for _ in range(chance.randrange(1, 4)):
            at = chance.randrange(len(data))
            if chance.randrange(2):
                data[at] = chance.randrange(256)
            else:
                data[at:at] = bytes([chance.choice(b"()]}0123Rbsuea.tNQ\x81\x85\x86\x87\x8f\x90\x91\x94\x95\x96")])
        if legacy:
            legacy_file(noisy, bytes(data), ("0", "1"), bytes(99))
        else:
            pickled_file(noisy, bytes(data), stored)
        outcome(noisy)


# -- Files of another kind -------------------------------------------------------------------------------------------


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
    "GGUF": (lambda path: path.write_bytes(b"GGUF\3"), ("a whole model", "gguf_file=name")),
    "torchscript": (torchscript, ("TorchScript archive", "Save the state dicts with torch.save")),
    "another zip": (lambda path: zip_of(path, {"a/b.txt": b"x"}), ("zip archive of another kind", "data.pkl")),
    "two folders": (lambda path: zip_of(path, {"a/data.pkl": EMPTY, "b/x": b""}), ("zip archive of another kind",)),
    "an empty zip": (lambda path: zip_of(path, {}), ("empty zip archive",)),
    "a pickle": (lambda path: path.write_bytes(b"\x80\x04]\x94."), ("a pickle of another kind", "torch.save")),
    "text": (lambda path: path.write_text("hello"), ("it begins with b'hello'",)),
    "a folder": (lambda path: path.mkdir(), ("is a folder", "Files in it: none")),
    "a pipe": (os.mkfifo, ("there is no file",)),
    "no file": (lambda path: None, ("there is no file",)),
    "a link to nowhere": (lambda path: path.symlink_to(path.parent / "gone"), ("there is no file",)),
}


@pytest.mark.parametrize("kind", sorted(OTHER_FILES))
def test_files_of_another_kind_are_named(kind: str, tmp_path: Path) -> None:
    make, facts = OTHER_FILES[kind]
    make(tmp_path / "layers.pt")
    with refused(CheckpointError, str(tmp_path / "layers.pt"), *facts):
        PtFile(tmp_path / "layers.pt")


def test_a_name_that_no_file_can_have(tmp_path: Path) -> None:
    for name in ("x" * 5000, "a\0b"):
        with refused(CheckpointError):
            PtFile(tmp_path / name)


@pytest.mark.parametrize("order", [b"big", b"big" + bytes(40)])
def test_another_byte_order_is_refused(order: bytes, tmp_path: Path) -> None:
    path = repacked(saved(tmp_path / "a.pt", CONTENT), lambda members: members.update({"a/byteorder": order}))
    with refused(CheckpointError, str(path), "little-endian"):
        PtFile(path)


def test_two_members_of_one_name_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", CONTENT)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("a/data/0", bytes(24))
    with refused(CheckpointError, str(path), "two members named 'a/data/0'"):
        PtFile(path)


# -- Claims ----------------------------------------------------------------------------------------------------------


def test_an_expanded_tensor_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", {"a": torch.zeros(1).expand(10**11)})
    assert path.stat().st_size < 2000
    with refused(CheckpointError, str(path), "'a'", "claims 400000000000 bytes", "holds 4", ".contiguous()"):
        everything(path)


@pytest.mark.parametrize(
    ("claims", "fact"),
    [
        ({"elements": 5}, "claims 20 bytes, the file holds 16"),
        ({"elements": 3}, "claims 12 bytes, the file holds 16"),
        ({"elements": 1 << 60}, "the file holds 16"),
        ({"offset": 1}, "claims 20 bytes"),
        ({"shape": (3, 2)}, "claims 24 bytes"),
        ({"stride": (3, 1)}, "claims 20 bytes"),
        ({"offset": 1 << 60}, "its storage holds 16"),
        ({"stride": (1 << 61, 1)}, "its storage holds 16"),
        ({"shape": (1 << 30, 1 << 30), "stride": (0, 0)}, "its storage holds 16"),
        ({"shape": (1 << 40, 1 << 40), "stride": (0, 0)}, "its storage holds 16"),
        ({"key": "other"}, "missing (storage 'other')"),
        ({"key": "../0"}, "missing (storage '../0')"),
        ({"offset": -1}, "could not be read"),
        ({"shape": (-2, 2)}, "could not be read"),
        ({"stride": (1,)}, "could not be read"),
        ({"elements": 1 << 70}, "could not be read"),
        ({"shape": (1,) * 100, "stride": (1,) * 100}, "could not be read"),
        ({"kind": "QUInt8Storage"}, "a tensor of type QUInt8Storage"),
    ],
)
def test_a_tensor_that_claims_other_bytes_is_refused(claims: dict[str, Any], fact: str, tmp_path: Path) -> None:
    path = pickled_file(tmp_path / "a.pt", b"\x80\x02" + tensor_code(**claims) + b".", {"0": bytes(16)})
    with refused(CheckpointError, str(path), fact):
        everything(path)


STORED = (4).to_bytes(8, "little") + bytes(16)


@pytest.mark.parametrize(
    ("keys", "tail"), [(("1",), STORED), (("0",), STORED[:-1]), (("0",), STORED[:5]), ((0,), STORED), ((), STORED)]
)
def test_storages_of_the_old_format_that_do_not_fit_are_refused(keys: Any, tail: bytes, tmp_path: Path) -> None:
    path = legacy_file(tmp_path / "a.pt", b"\x80\x02" + tensor_code() + b".", keys, tail)
    assert outcome(path) is None
    assert outcome(legacy_file(tmp_path / "b.pt", b"\x80\x02" + tensor_code() + b".", ("0",), STORED)) is not None


@pytest.mark.parametrize("name", ["a\x1b[31m", "a\nb", "\ud800"])
def test_tensors_whose_names_cannot_be_printed_are_refused(name: str, tmp_path: Path) -> None:
    path = pickled_file(tmp_path / "a.pt", b"\x80\x02}" + text(name) + tensor_code() + b"s.", {"0": bytes(16)})
    with refused(CheckpointError, str(path), "cannot be printed") as caught:
        PtFile(path)
    assert str(caught.value).isprintable()


def test_classes_whose_names_cannot_be_printed_are_refused(tmp_path: Path) -> None:
    path = pickled_file(tmp_path / "a.pt", b"\x80\x02ca\x1b[31m\nb\n.")
    with refused(CheckpointError, str(path), "cannot be shown") as caught:
        PtFile(path)
    assert "\x1b" not in str(caught.value)


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", {"a": {"b": torch.ones(1)}, "a.b": torch.zeros(1)})
    with refused(CheckpointError, str(path), "two tensors named 'a.b'"):
        PtFile(path)


def test_long_numbers_are_not_taken_for_sizes(tmp_path: Path) -> None:
    path = pickled_file(tmp_path / "a.pt", b"\x80\x02}" + text("x") + long_of(1 << 5000) + b"s.")
    with refused(CheckpointError, str(path), "a number of 5001 bits, named 'x'"):
        PtFile(path)
