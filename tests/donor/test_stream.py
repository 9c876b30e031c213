"""Safetensors files written a piece at a time are what safetensors itself would write."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tqdm import tqdm

from tests.archive.crafted import bits, saved
from tests.archive.test_ptfile import DTYPES, of_type
from tests.helpers import refused
from transplant_hf import CheckpointError
from transplant_hf.archive import PtFile
from transplant_hf.donor import stream
from transplant_hf.donor.stream import pieces, write_safetensors
from transplant_hf.donor.tensors import MemoryTensors, TensorInfo

STORED = [dtype for dtype in DTYPES if not dtype.is_complex]


def finite(dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    """Random numbers, none of them NaN or infinite."""
    if not dtype.is_floating_point:
        return of_type(dtype, *shape, seed=seed)
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).add(0.5).to(dtype)


def written(path: Path, tensors: dict[str, Any]) -> str:
    store = MemoryTensors(tensors)
    with tqdm(disable=True) as progress:
        return write_safetensors(path, store.infos(), store.slices(), progress)


def assert_holds(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with safe_open(path, framework="pt") as file:
        assert {name: bits(file.get_tensor(name)) for name in file.keys()} == {  # noqa: SIM118
            name: bits(tensor) for name, tensor in tensors.items()
        }
        assert file.metadata() == {"format": "pt"}


def test_every_type_and_shape_is_written_as_it_is(tmp_path: Path) -> None:
    tensors = {f"{dtype}.{n}": finite(dtype, n, 3, seed=n) for dtype in STORED for n in (0, 1, 5)}
    tensors |= {f"{dtype}.number": finite(dtype, 1)[0] for dtype in STORED}
    tensors |= {"turned": torch.rand(4, 6).T, "every second": torch.rand(9)[::2], "one": torch.rand(9)[::2][:1]}
    tensors |= {"empty": torch.empty(0), "parameter": torch.nn.Parameter(torch.rand(3)), "ünïcode \"'": torch.ones(1)}
    digest = written(tmp_path / "a.safetensors", tensors)
    assert_holds(tmp_path / "a.safetensors", tensors)
    assert digest == hashlib.sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest()


def test_no_tensors_make_a_file_too(tmp_path: Path) -> None:
    written(tmp_path / "a.safetensors", {})
    assert_holds(tmp_path / "a.safetensors", {})


def test_every_element_is_aligned(tmp_path: Path) -> None:
    written(
        tmp_path / "a.safetensors", {"a": finite(torch.float8_e5m2, 3), "b": torch.rand(3), "c": torch.ones(1).half()}
    )
    data = (tmp_path / "a.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    assert [name for name in header if name != "__metadata__"] == ["b", "c", "a"]


@pytest.mark.parametrize("size", [8, 16, 24, 1 << 22])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_pieces_of_any_size_make_the_same_file(
    size: int, legacy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "PIECE", size)
    tensors = {
        "long": torch.rand(101),
        "every second": torch.rand(101)[::2],  # its last piece is one element, with a stride
        "flat": torch.rand(1, 50),
        "tall": torch.rand(50, 1),
        "turned": torch.rand(7, 5).T,
        "half": torch.rand(3, 5, 2).half(),
        "turned half": torch.rand(3, 5, 2).half().permute(2, 0, 1),
        "part": torch.rand(9, 9)[2:8, 3:5],
        "empty": torch.empty(0, 4),
        "number": torch.tensor(2.5),
    }
    file = PtFile(saved(tmp_path / "a.pt", tensors, legacy))
    infos = MemoryTensors(tensors).infos()
    with tqdm(total=1, disable=True) as progress:
        write_safetensors(tmp_path / "a.safetensors", infos, {name: file[name] for name in tensors}, progress)
    assert_holds(tmp_path / "a.safetensors", tensors)
    written(tmp_path / "b.safetensors", tensors)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    for name, tensor in tensors.items():
        parts = [part.clone() for part in pieces(infos[name], file[name])]  # their memory is used again
        assert bits(torch.cat([part.reshape(-1) for part in parts])) == bits(tensor.reshape(-1))


BAD = [float("nan"), float("inf"), -float("inf")]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
@pytest.mark.parametrize("bad", BAD, ids=str)
@pytest.mark.parametrize("place", [0, 20, -1])
def test_what_is_not_finite_is_refused(bad: float, dtype: torch.dtype, place: int, tmp_path: Path) -> None:
    values = torch.ones(41)
    values[place] = bad
    with refused(CheckpointError, "'a'", "NaN or infinity"):
        written(tmp_path / "a.safetensors", {"a": values.to(dtype)})


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e8m0fnu])
def test_types_that_have_nan_alone_are_checked_for_it(dtype: torch.dtype, tmp_path: Path) -> None:
    byte = 0x7F if dtype == torch.float8_e4m3fn else 0xFF
    with refused(CheckpointError, "'a'", "NaN or infinity"):
        written(tmp_path / "a.safetensors", {"a": torch.tensor([1, byte], dtype=torch.uint8).view(dtype)})


def test_the_file_with_what_is_not_finite_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", {"a": torch.tensor([1.0, float("nan")])})
    infos, parts = {"layers.0.b": TensorInfo((2,), "F32")}, {"layers.0.b": PtFile(path)["a"]}
    with refused(CheckpointError, "'layers.0.b'", str(path), "NaN or infinity"), tqdm(disable=True) as progress:
        write_safetensors(tmp_path / "b", infos, parts, progress)


class Failing:
    """A tensor whose second half cannot be read."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __getitem__(self, index: Any) -> torch.Tensor:
        if not isinstance(index, slice) or index.start:
            raise self.error
        return torch.ones(index.stop)


@pytest.mark.parametrize("error", [CheckpointError("cut short"), OSError("disk"), MemoryError(), StopIteration()])
def test_what_fails_while_reading_ahead_surfaces(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "PIECE", 16)
    infos = {"a": TensorInfo((8,), "F32")}
    wanted = RuntimeError if isinstance(error, StopIteration) else type(error)
    with pytest.raises(wanted), tqdm(disable=True) as progress:
        write_safetensors(tmp_path / "a", infos, {"a": Failing(error)}, progress)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def test_a_full_disk_surfaces_and_reading_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Iterator[None]:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"), tqdm(disable=True) as progress:
        monkeypatch.setattr(progress, "update", full)
        store = MemoryTensors({"a": torch.ones(99), "b": torch.ones(99)})
        write_safetensors(tmp_path / "a", store.infos(), store.slices(), progress)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]
