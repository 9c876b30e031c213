"""Pickles that would run code when they are loaded do nothing here, and nothing that exists is changed."""

from __future__ import annotations

import builtins
import copyreg
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.archive.crafted import (
    bits,
    everything,
    legacy_file,
    long_of,
    members_of,
    pickled_file,
    saved,
    tensor_code,
    text,
)
from tests.helpers import refused
from transplant_hf import CheckpointError
from transplant_hf.archive import PtFile, descriptions
from transplant_hf.archive.descriptions import hashable

FORMATS = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])


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
    "import": lambda path: Runs(__import__, "antigravity"),
    "torch.load": lambda path: Runs(torch.load, str(saved(path.with_suffix(".inner"), Runs(os.mkdir, str(path))))),
    "bytes": lambda path: Runs(torch.storage._load_from_bytes, pickle.dumps(Runs(os.mkdir, str(path)))),
    "pickle.loads": lambda path: Runs(pickle.loads, pickle.dumps(Runs(os.mkdir, str(path)))),
    "torch.save": lambda path: Runs(torch.save, [1], str(path)),
    "hub": lambda path: Runs(torch.hub.download_url_to_file, "http://127.0.0.1:9/x", str(path)),
    "chained": lambda path: Runs(Runs(getattr, Runs(__import__, "os"), "mkdir"), str(path)),
}


@FORMATS
@pytest.mark.parametrize("payload", sorted(PAYLOADS))
def test_what_would_run_does_not(payload: str, legacy: bool, tmp_path: Path) -> None:
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
    assert "antigravity" not in sys.modules
    assert PtFile(path).classes


def test_the_payloads_do_run_elsewhere(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", PAYLOADS["os.system"](tmp_path / "made"))
    torch.load(path, weights_only=False)
    assert (tmp_path / "made").exists()


def test_the_classes_that_were_not_made_are_told(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", {"a": torch.ones(2), "x": Runs(os.system, "true"), "y": Runs(eval, "1")})
    assert PtFile(path).classes == {"posix.system", "__builtin__.eval"}


class Block(nn.Module):
    """A module as users pickle it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.register_buffer("kept", torch.ones(3))
        self.register_buffer("computed", torch.ones(4), persistent=False)
        self.register_buffer("absent", None)
        self.register_parameter("none", None)
        self.hook: Any = None


@FORMATS
def test_a_pickled_module_is_what_its_state_dict_says(legacy: bool, tmp_path: Path) -> None:
    layers = nn.ModuleList([Block(), Block()])
    layers[0].hook = Runs(os.mkdir, str(tmp_path / "made"))
    layers[1].inner.register_forward_hook(print)
    path = saved(tmp_path / "a.pt", layers, legacy)
    assert {n: bits(t) for n, t in everything(path).items()} == {n: bits(t) for n, t in layers.state_dict().items()}
    assert not (tmp_path / "made").exists()
    assert "torch.nn.modules.linear.Linear" in PtFile(path).classes


class ListOfOurs(list):
    """A list of another class."""


class Stateless:
    """An object that pickles without a state."""

    def __reduce__(self) -> Any:
        return copyreg.__newobj__, (Stateless,)  # type: ignore[attr-defined]


@FORMATS
def test_objects_of_any_class_stand_beside_tensors(legacy: bool, tmp_path: Path) -> None:
    odd = [ListOfOurs([1]), Stateless(), {(1, "a"): 2}, torch.device("cpu"), torch.float16, frozenset([1]), range(3)]
    odd += [Path("x"), slice(1), b"bytes", bytearray(b"x"), 1 << 200, nn.functional.silu, [].append, Ellipsis]
    content = {"a": torch.ones(2), "odd": odd}
    for protocol in (2, 4, 5):
        path = saved(tmp_path / "a.pt", content, legacy and protocol == 2, pickle_protocol=protocol)
        assert [*everything(path)] == ["a"]


# -- Nothing that exists is changed ----------------------------------------------------------------------------------

BUILDER = b"ctorch._utils\n_rebuild_tensor_v2\n"
STATES = {
    "a function's defaults": BUILDER + b"N}" + text("__kwdefaults__") + b"}" + text("dtype") + b"Nss\x86b",
    "a function's attribute": BUILDER + b"}" + text("x") + b"Nsb",
    "a class": b"cos\nsystem\n}" + text("made_of") + text("harmless") + b"sb",
    "a type of torch": b"ctorch\nfloat32\n}" + text("x") + b"Nsb",
    "a tensor": tensor_code() + b"}" + text("offset") + long_of(-4) + b"sb",
    "a tensor by fields": tensor_code() + b"](" + b"NNNNNeb",
    "a list": b"]}" + text("x") + b"Nsb",
    "a text": text("x") + b"}b",
    "items of a function": BUILDER + text("x") + b"Ns",
    "items of a list": b"]NaK\x00K\x01s",
    "items of a tensor": tensor_code() + text("x") + b"Ns",
}


@pytest.mark.parametrize("kind", sorted(STATES))
def test_nothing_that_exists_is_given_a_state(kind: str, tmp_path: Path) -> None:
    builders = {name: dict(vars(known)) for name, known in descriptions.KNOWN.items()}
    path = pickled_file(tmp_path / "a.pt", b"\x80\x02" + STATES[kind] + b".", {"0": bytes(16)})
    with refused(CheckpointError, str(path), "could not be read as a pickle"):
        PtFile(path)
    assert {name: dict(vars(known)) for name, known in descriptions.KNOWN.items()} == builders
    assert descriptions.KNOWN["torch._utils._rebuild_tensor_v2"].__kwdefaults__ == {"dtype": None}


@pytest.mark.parametrize("code", [b"\x82\x01", b"\x83\x01\x00", b"\x84\x01\x00\x00\x00", b"\x97", b"\x98", b"\xff"])
def test_codes_that_reach_out_of_the_file_are_refused(code: bytes, tmp_path: Path) -> None:
    copyreg.add_extension("os", "system", 1)
    try:
        path = pickled_file(tmp_path / "a.pt", b"\x80\x05N" + code + b".")
        with refused(CheckpointError, str(path), "could not be read as a pickle"):
            PtFile(path)
        assert 1 not in copyreg._extension_cache  # type: ignore[attr-defined]
    finally:
        copyreg.remove_extension("os", "system", 1)


def test_naming_a_part_of_torch_does_not_import_it(tmp_path: Path) -> None:
    path = pickled_file(tmp_path / "a.pt", b"\x80\x02](ctorch\n_no_such\nctorch\nhub\nctorch.nn\nModule\ne.")
    before = set(sys.modules)

    def refuse(*args: Any, **_: Any) -> Any:
        raise AssertionError(f"imported {args[0]}")

    original, builtins.__import__ = builtins.__import__, refuse
    try:
        PtFile(path)
    finally:
        builtins.__import__ = original
    assert set(sys.modules) == before


@pytest.mark.parametrize(
    "name", ["a\x1b[31m\nb\n", "os\nsys\x07tem\n", "os\n" + "x" * 600 + "\n"], ids=["escape", "bell", "long"]
)
def test_names_that_cannot_be_shown_are_refused(name: str, tmp_path: Path) -> None:
    path = pickled_file(tmp_path / "a.pt", b"\x80\x02c" + name.encode() + b".")
    with refused(CheckpointError, str(path)) as caught:
        PtFile(path)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", ["a\x1b[31m", "a\nb", "\ud800"])
def test_tensors_whose_names_cannot_be_shown_are_refused(name: str, tmp_path: Path) -> None:
    path = pickled_file(tmp_path / "a.pt", b"\x80\x02}" + text(name) + tensor_code() + b"s.", {"0": bytes(16)})
    with refused(CheckpointError, str(path), "cannot be printed") as caught:
        PtFile(path)
    assert str(caught.value).isprintable()


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", {"a": {"b": torch.ones(1)}, "a.b": torch.zeros(1)})
    with refused(CheckpointError, str(path), "two tensors named 'a.b'"):
        PtFile(path)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (tensor_code(), tensor_code(elements=5)),
        (tensor_code(), tensor_code(kind="IntStorage")),
        (tensor_code(), b"(" + text("elsewhere") + b"NtQ"),
        (tensor_code(), text("0") + b"Q"),
        (tensor_code(), b"P0\n"),
    ],
)
def test_references_that_make_no_sense_are_refused(first: bytes, second: bytes, tmp_path: Path) -> None:
    path = pickled_file(tmp_path / "a.pt", b"\x80\x02](" + first + second + b"e.", {"0": bytes(16)})
    with refused(CheckpointError, str(path), "could not be read as a pickle"):
        PtFile(path)


# -- Noise --------------------------------------------------------------------------------------------------------


@FORMATS
def test_noise_in_a_pickle_raises_nothing_else(legacy: bool, tmp_path: Path) -> None:
    content = {"a": torch.arange(6.0), "b": [nn.Linear(2, 2), {"lr": 0.5, "steps": [1, 2]}, torch.ones(2).half()]}
    path = saved(tmp_path / "whole.pt", content)
    members, chance, noisy = members_of(path), random.Random(0), tmp_path / "noisy.pt"
    code, prefix = members["whole/data.pkl"], "whole/data/"
    stored = {name.removeprefix(prefix): data for name, data in members.items() if name.startswith(prefix)}
    read = 0
    for _ in range(700):
        data = bytearray(code)
        for _ in range(chance.randrange(1, 4)):
            at = chance.randrange(len(data))
            change = chance.randrange(4)
            if change == 0:
                data[at] = chance.randrange(256)
            elif change == 1:
                data[at:at] = bytes([chance.choice(b"()]}0123Rbsuea.tNQ\x81\x85\x86\x87\x8f\x90\x91\x94\x95\x96")])
            elif change == 2:
                del data[at : at + chance.randrange(1, 5)]
            else:
                other = chance.randrange(len(data))
                data[at:at] = data[other : other + chance.randrange(1, 40)]
        try:
            if legacy:
                legacy_file(noisy, bytes(data), ("0", "1"), bytes(99))
            else:
                pickled_file(noisy, bytes(data), stored)
            everything(noisy)
            read += 1
        except CheckpointError as error:
            assert str(noisy) in str(error)
    assert legacy or 0 < read < 700


def test_numbers_as_keys_are_not_where_the_file_puts_them() -> None:
    """Python's hash of a number is the number: chosen ones would all be in each other's way."""
    keys = [hashable(number) for number in (0, 1, 5, 1 << 40, -3)]
    assert keys == [0, 1, 5, 1 << 40, -3] and [str(key) for key in keys] == ["0", "1", "5", str(1 << 40), "-3"]
    assert all(hash(key) != int(key) for key in keys if key)
    assert len({hashable(7): "a", hashable(7): "b"}) == 1


def test_other_keys_are_kept_apart_and_never_compared() -> None:
    one, other = hashable((1, "a")), hashable((1, "a"))
    assert one != other and hashable("a") == "a" and hashable(None) is None and hashable(True) is True
    for key in ((1, (2,)), tuple(range(17)), "a" * 5000, 1 << 65):
        with pytest.raises(ValueError, match="a key is"):
            hashable(key)
    with pytest.raises(TypeError, match="a key is a list"):
        hashable([])
