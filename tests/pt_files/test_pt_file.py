"""Every tensor of a file is what `torch.load` makes of it."""

from __future__ import annotations

import copyreg
import os
import random
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers import refused
from tests.pt_files.crafted import bits, everything, repacked, saved, tree_tensors
from transplant_hf import CheckpointError
from transplant_hf.pt_files import PtFile

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e8m0fnu,
    torch.complex64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.bool,
]
FORMATS = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])


def of_type(dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    """A tensor of random bits."""
    generator = torch.Generator().manual_seed(seed)
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (nbytes,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


def assert_same(path: Path, content: Any) -> None:
    """A file holds what was saved, and what torch reads."""
    found = {name: bits(tensor) for name, tensor in everything(path).items()}
    assert found == {name: bits(tensor) for name, tensor in tree_tensors(content)}
    if path.read_bytes().startswith(b"PK"):  # torch writes some types in the old format that it cannot read
        wanted = torch.load(path, weights_only=True)
        assert found == {name: bits(tensor) for name, tensor in tree_tensors(wanted)}


@FORMATS
def test_every_type_is_read_as_torch_reads_it(legacy: bool, tmp_path: Path) -> None:
    content = {}
    for dtype in DTYPES:
        tensor = of_type(dtype, 5, 3)
        views = {
            "whole": tensor,
            "turned": tensor.T,
            "rows": tensor[1:4],
            "columns": tensor[:, 1:],
            "one": tensor[2, 1],
        }
        content[str(dtype).removeprefix("torch.")] = views
    assert_same(saved(tmp_path / "a.pt", content, legacy), content)


SHAPES = {
    "a number": torch.tensor(3.5),
    "nothing": torch.empty(0),
    "no rows": torch.empty(0, 3),
    "no columns": torch.empty(3, 0),
    "a slice of nothing": torch.arange(6.0)[6:],
    "length one": torch.arange(3.0).reshape(1, 3, 1),
    "a part": torch.arange(12.0)[3:9].reshape(2, 3),
    "every second": torch.arange(12.0)[::2],
    "turned": torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1),
    "a diagonal": torch.arange(9.0).reshape(3, 3).diagonal(),
    "overlapping windows": torch.arange(9.0).unfold(0, 3, 1)[:3],
    "one row over and over": torch.arange(16.0).as_strided((4, 4), (0, 1)),
    "a parameter": nn.Parameter(torch.arange(4.0)),
}


@FORMATS
def test_every_view_is_read_as_torch_reads_it(legacy: bool, tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", [SHAPES], legacy)
    assert_same(path, [SHAPES])
    assert all(tensor.is_contiguous() for tensor in everything(path).values())


@FORMATS
def test_every_container_is_read_as_torch_reads_it(legacy: bool, tmp_path: Path) -> None:
    one = torch.arange(6.0)
    many: defaultdict[str, Any] = defaultdict(list, {"x": [one]})
    content = {
        "list": [one, {"deep": (one * 2,)}],
        4: {"by": one.half()},
        "ordered": OrderedDict([("b", one[1:]), ("a.b.c", one[::2])]),
        "default": many,
        "tied": one,
        "values": {"lr": 0.1, "steps": [1, 2], "name": "x", "flag": True, "none": None, "pair": (1, "a")},
        "set": {1, 2},
    }
    path = saved(tmp_path / "a.pt", content, legacy)
    assert {n: bits(t) for n, t in everything(path).items()} == {n: bits(t) for n, t in tree_tensors(content)}
    values = PtFile(path).values
    assert values["values.lr"] == 0.1
    assert values["values.steps"] == [1, 2]
    assert values["values.pair"] == [1, "a"]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol_is_read(protocol: int, tmp_path: Path) -> None:
    content = {"layers": [{"a": torch.arange(6.0)}, {"a": torch.ones(2, 3).T}], "steps": [1, 2]}
    path = saved(tmp_path / "a.pt", content, pickle_protocol=protocol)
    assert {n: bits(t) for n, t in everything(path).items()} == {n: bits(t) for n, t in tree_tensors(content)}


@pytest.mark.parametrize("seed", range(20))
def test_random_files_are_read_as_torch_reads_them(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)

    def tensor() -> torch.Tensor:
        shape = [chance.randrange(0, 5) for _ in range(chance.randrange(0, 4))]
        made = of_type(chance.choice(DTYPES), *shape, seed=chance.randrange(1 << 30))
        for _ in range(chance.randrange(3)):
            if made.dim() and made.shape[0]:
                change = chance.randrange(3)
                made = made[chance.randrange(made.shape[0]) :] if change == 0 else made
                made = made.transpose(0, -1) if change == 1 else made
                made = made[:: chance.randrange(1, 3)] if change == 2 else made
        return made

    def tree(depth: int) -> Any:
        kind = chance.randrange(4) if depth < 3 else 0
        if kind == 0:
            return tensor()
        if kind == 1:
            return [tree(depth + 1) for _ in range(chance.randrange(4))]
        if kind == 2:
            return {chance.randrange(40): tree(depth + 1) for _ in range(chance.randrange(4))}
        return OrderedDict((f"k{n}", tree(depth + 1)) for n in range(chance.randrange(4)))

    content = {"top": tree(0), "more": tensor()}
    assert_same(saved(tmp_path / "a.pt", content, legacy=seed % 2 == 1), content)


@pytest.mark.parametrize("name", ["a b.pt", "2026-01-01T10:00:00.pt", "dönor.pt", "..pt", "-c.pt", "x" * 200])
def test_the_files_own_name_does_not_matter(name: str, tmp_path: Path) -> None:
    assert_same(saved(tmp_path / name, {"a": torch.arange(3.0)}), {"a": torch.arange(3.0)})


def test_bytes_that_are_not_aligned_and_no_byte_order(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", {"a": torch.arange(3.0)})
    repacked(path, lambda members: members.pop("a/byteorder"))
    assert_same(path, {"a": torch.arange(3.0)})


def test_a_conjugated_tensor_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", {"a": torch.ones(2, dtype=torch.complex64).conj()})
    with refused(CheckpointError, str(path), "resolve_conj"):
        PtFile(path)


def test_a_missing_storage_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", {"a": torch.arange(3.0), "b": torch.ones(2)})
    repacked(path, lambda members: members.pop("a/data/0"))
    assert PtFile(path).open_tensors(["b"])["b"].tolist() == [1, 1]
    with refused(CheckpointError, str(path), "the bytes of tensor 'a' are missing"):
        everything(path)


# -- Pickled modules -----------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A module as users pickle it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.register_buffer("kept", torch.ones(3))
        self.register_buffer("computed", torch.ones(4), persistent=False)
        self.register_buffer("absent", None)
        self.register_parameter("none", None)


@FORMATS
def test_a_pickled_module_is_what_its_state_dict_says(legacy: bool, tmp_path: Path) -> None:
    layers = nn.ModuleList([Block(), Block()])
    layers[1].inner.register_forward_hook(print)  # type: ignore[union-attr,operator]
    path = saved(tmp_path / "a.pt", layers, legacy)
    assert {n: bits(t) for n, t in everything(path).items()} == {n: bits(t) for n, t in layers.state_dict().items()}
    assert "torch.nn.modules.linear.Linear" in PtFile(path).classes


class ListOfOurs(list[Any]):
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


# -- Between opening and reading -----------------------------------------------------------------------------------


def test_a_file_changed_after_opening_is_refused(tmp_path: Path) -> None:
    content = {"a": torch.arange(99.0), "b": torch.arange(99.0)[::2]}
    path = saved(tmp_path / "a.pt", content)
    file = PtFile(path)
    os.truncate(path, 400)
    with refused(CheckpointError, str(path), "changed or replaced"):
        file.open_tensors(["a"])
    file = PtFile(saved(path, content))
    saved(tmp_path / "b.pt", {"a": torch.arange(99.0) + 1}).replace(path)
    with refused(CheckpointError, str(path), "changed or replaced"):
        file.open_tensors(["b"])
    path.unlink()
    with refused(CheckpointError, str(path), "no longer be read"):
        file.open_tensors(["a"])


def test_tensors_do_not_share_memory_and_do_not_write_to_the_file(tmp_path: Path) -> None:
    one = torch.arange(4.0)
    path = saved(tmp_path / "a.pt", {"a": one, "tied": one})
    before, file = path.read_bytes(), PtFile(path)
    first, second = file.open_tensors(file.tensors), file.open_tensors(file.tensors)
    first["a"].fill_(7)
    assert torch.equal(first["tied"], one) and torch.equal(second["a"], one)
    assert path.read_bytes() == before
