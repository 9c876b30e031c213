"""Every tensor of a plain file is what `torch.load` makes of it, whole and in pieces."""

from __future__ import annotations

import os
import random
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.archive.crafted import bits, everything, pickled_file, repacked, saved, tensor_code, tree_tensors
from tests.helpers import refused, run_python
from transplant_hf import CheckpointError
from transplant_hf.archive import PtFile

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
# torch writes these in the old format too, and then cannot read them.
LATE_TYPES = {dtype for dtype in DTYPES if dtype.itemsize == 1 and dtype.is_floating_point} | {
    torch.uint16,
    torch.uint32,
    torch.uint64,
}
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
    if path.read_bytes().startswith(b"PK") or not any(kind in LATE_TYPES for kind, _, _ in found.values()):
        wanted = torch.load(path, weights_only=True)
        assert found == {name: bits(tensor) for name, tensor in tree_tensors(wanted)}


@FORMATS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_type_is_read_as_torch_reads_it(dtype: torch.dtype, legacy: bool, tmp_path: Path) -> None:
    tensor = of_type(dtype, 5, 3)
    content = {"whole": tensor, "turned": tensor.T, "rows": tensor[1:4], "columns": tensor[:, 1:], "one": tensor[2, 1]}
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
@pytest.mark.parametrize("kind", sorted(SHAPES))
def test_every_view_is_read_as_torch_reads_it(kind: str, legacy: bool, tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", [{"a": SHAPES[kind]}], legacy)
    assert_same(path, [{"a": SHAPES[kind]}])
    tensor, part = SHAPES[kind].detach(), PtFile(path)["0.a"]
    assert part.dtype == tensor.dtype
    assert part.get_shape() == list(tensor.shape)
    if tensor.dim() and tensor.numel():
        for start, stop in [(0, 1), (1, 3), (0, 0), (2, 1), (-2, None), (0, 99)]:
            assert bits(part[start:stop]) == bits(tensor[start:stop])
        assert bits(part[0]) == bits(tensor[0])
        assert bits(part[::2]) == bits(tensor[::2])
    for size in (4, 7, 8, 1 << 20):
        pieces = [piece.reshape(-1).clone() for piece in part.in_order(size)] or [torch.empty(0)]
        assert bits(torch.cat(pieces)) == bits(tensor.reshape(-1))


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
def test_every_protocol_is_read_as_torch_reads_it(protocol: int, tmp_path: Path) -> None:
    content = {"layers": [{"a": torch.arange(6.0)}, {"a": torch.ones(2, 3).T}], "steps": [1, 2]}
    path = saved(tmp_path / "a.pt", content, pickle_protocol=protocol)
    assert {n: bits(t) for n, t in everything(path).items()} == {n: bits(t) for n, t in tree_tensors(content)}


@pytest.mark.parametrize("seed", range(60))
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

    # Complex numbers are left in: what cannot be a donor can still be read.
    content = {"top": tree(0), "more": tensor()}
    assert_same(saved(tmp_path / "a.pt", content, legacy=seed % 2 == 1), content)


@pytest.mark.parametrize("name", ["a b.pt", "2026-01-01T10:00:00.pt", "dönor.pt", "..pt", "layers.tar.gz", "x" * 200])
def test_the_files_own_name_does_not_matter(name: str, tmp_path: Path) -> None:
    assert_same(saved(tmp_path / name, {"a": torch.arange(3.0)}), {"a": torch.arange(3.0)})


def test_a_file_without_byte_order_is_little_endian(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", {"a": torch.arange(3.0)})
    repacked(path, lambda members: members.pop("a/byteorder"))
    assert_same(path, {"a": torch.arange(3.0)})


def test_a_conjugated_tensor_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", {"a": torch.ones(2, dtype=torch.complex64).conj()})
    with refused(CheckpointError, str(path), "resolve_conj"):
        PtFile(path)


# -- Between opening and reading -----------------------------------------------------------------------------------


@FORMATS
def test_a_file_cut_short_after_opening_is_refused(legacy: bool, tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", {"a": torch.arange(99.0), "b": torch.arange(99.0)[::2]}, legacy)
    file = PtFile(path)
    os.truncate(path, 400)
    for name in ("a", "b"):
        with refused(CheckpointError, str(path), "changed or replaced"):
            file[name][...]


@FORMATS
def test_a_file_replaced_after_opening_is_refused(legacy: bool, tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", {"a": torch.arange(99.0), "b": torch.arange(99.0)[::2]}, legacy)
    file = PtFile(path)
    assert file["a"][0] == 0
    saved(tmp_path / "b.pt", {"a": torch.arange(99.0) + 1, "b": torch.arange(99.0)[::2] + 1}, legacy).replace(path)
    for name in ("a", "b"):
        with refused(CheckpointError, str(path), "changed or replaced"):
            file[name][...]


def test_a_file_removed_after_opening_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", {"a": torch.arange(99.0)})
    file = PtFile(path)
    path.unlink()
    with refused(CheckpointError, str(path), "no longer be read"):
        file["a"][...]


CUT = """
import os, sys
from pathlib import Path
from transplant_hf import CheckpointError
from transplant_hf.archive import PtFile

for path in sorted(Path(sys.argv[1]).iterdir()):
    file = PtFile(path)
    pieces = file["a"].in_order(1 << 12)
    next(pieces)
    os.truncate(path, 400)
    try:
        print("read to the end", sum(piece.numel() for piece in pieces))
    except CheckpointError as error:
        print(error)
"""


def test_a_file_cut_short_while_a_tensor_is_streamed_ends_no_process(tmp_path: Path) -> None:
    whole = torch.arange(float(1 << 18))
    views = {
        "plain": whole,
        "columns": whole.reshape(512, 512)[:, :300],
        "transposed": whole.reshape(512, 512).T,
        "turned rows": whole.reshape(64, 64, 64).transpose(1, 2),
    }
    for name, view in views.items():
        saved(tmp_path / f"{name}.pt", {"a": view})
        saved(tmp_path / f"{name}, legacy.pt", {"a": view}, legacy=True)
    lines = run_python(CUT, tmp_path).splitlines()
    assert len(lines) == 2 * len(views)
    for line in lines:
        assert any(said in line for said in ("became shorter", "changed or replaced", "read to the end")), line


@FORMATS
def test_views_are_read_in_any_pieces(legacy: bool, tmp_path: Path) -> None:
    whole = torch.arange(60_000, dtype=torch.int16)
    views = {
        "transposed": whole.reshape(200, 300).T,
        "columns": whole.reshape(200, 300)[:, 40:90],
        "turned rows": whole.reshape(20, 50, 60).transpose(1, 2),
        "outside in": whole.reshape(20, 50, 60).permute(2, 0, 1),
        "every third": whole[5::3],
        "far apart": whole.reshape(10, 6000)[3:9:5, ::700],
    }
    file = PtFile(saved(tmp_path / "a.pt", views, legacy))
    for name, view in views.items():
        for size in (2, 700, 10_000, 1 << 22):
            assert torch.equal(torch.cat([piece.reshape(-1) for piece in file[name].in_order(size)]), view.flatten())
        assert torch.equal(file[name][1:3], view[1:3]) and torch.equal(file[name][-1], view[-1])


def test_a_view_all_over_a_large_storage_is_read_by_rows_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transplant_hf.archive.ptfile._STEP", 512)
    whole = torch.arange(100_000.0)
    path = saved(
        tmp_path / "a.pt", {"rows": whole.reshape(100, 1000)[:, :5], "dots": whole.reshape(2, 50_000)[:, ::999]}
    )
    file = PtFile(path)
    assert torch.equal(file["rows"][...], whole.reshape(100, 1000)[:, :5])
    with refused(CheckpointError, str(path), "'dots'", "spread over", "contiguous()"):
        file["dots"][...]


# -- What a tensor claims ----------------------------------------------------------------------------------------------


def test_an_expanded_tensor_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", {"a": torch.zeros(1).expand(10**11)})
    assert path.stat().st_size < 2000
    with refused(CheckpointError, str(path), "'a'", "claims 400000000000 bytes", "holds 4", ".contiguous()"):
        PtFile(path)["a"][0:1]


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
        ({"key": "other"}, "missing (storage 'other')"),
        ({"key": "../0"}, "missing (storage '../0')"),
    ],
)
def test_a_tensor_that_claims_other_bytes_is_refused(claims: dict[str, Any], fact: str, tmp_path: Path) -> None:
    path = pickled_file(tmp_path / "a.pt", b"\x80\x02" + tensor_code(**claims) + b".", {"0": bytes(16)})
    with refused(CheckpointError, str(path), fact):
        everything(path)


@pytest.mark.parametrize(
    "claims",
    [
        {"offset": -1},
        {"shape": (-2, 2)},
        {"stride": (-2, 1)},
        {"stride": (1,)},
        {"elements": -4},
        {"elements": 1 << 70},
        {"shape": (1 << 40, 1 << 40), "stride": (0, 0)},
        {"shape": (0, 1 << 40, 1 << 40), "stride": (0, 0, 0)},
        {"shape": (1,) * 100, "stride": (1,) * 100},
        {"kind": "QUInt8Storage"},
    ],
)
def test_a_tensor_that_makes_no_sense_is_refused(claims: dict[str, Any], tmp_path: Path) -> None:
    path = pickled_file(tmp_path / "a.pt", b"\x80\x02" + tensor_code(**claims) + b".", {"0": bytes(16)})
    with refused(CheckpointError, str(path), "could not be read as a pickle"):
        PtFile(path)


def test_a_storage_whose_bytes_are_no_multiple_of_the_type(tmp_path: Path) -> None:
    def cut(members: dict[str, bytes]) -> None:
        members["a/data.pkl"] = members["a/data.pkl"].replace(b"K\x0cNtQ", b"K\x0dNtQ").replace(b"K\x0ctq", b"K\x0dtq")
        members["a/data/0"] += b"x"

    path = saved(tmp_path / "a.pt", {"a": torch.arange(6).to(torch.uint16).reshape(2, 3).T})
    repacked(path, cut)
    assert PtFile(path).tensors["a"].storage.num_elements == 13
    assert PtFile(path)["a"][...].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_a_checksum_is_compared_while_pieces_are_read(tmp_path: Path) -> None:
    numbers = torch.arange(100.0)
    path = saved(tmp_path / "a.pt", {"a": numbers, "part": numbers[3:50]})
    data = bytearray(path.read_bytes())
    at = data.index(torch.tensor([97.0, 98.0]).numpy().tobytes())
    data[at] ^= 1
    path.write_bytes(data)
    for name in ("a", "part"):
        with refused(CheckpointError, str(path), name, "checksum"):
            for piece in PtFile(path)[name].in_order(64):
                assert piece.numel()
