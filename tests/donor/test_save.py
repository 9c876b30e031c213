"""A donor's weight files hold the tensors as they are, and no numbers that are not finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import refused
from tests.pt_files.crafted import bits
from tests.pt_files.test_pt_file import DTYPES, of_type
from transplant_hf import CheckpointError
from transplant_hf.donor.record import DonorRecord
from transplant_hf.donor.save import write_donor
from transplant_hf.donor.tensors import MemoryTensors, open_donor_files
from transplant_hf.storage import sha256_of

STORED = [dtype for dtype in DTYPES if not dtype.is_complex]


def finite(dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    """Random numbers, none of them NaN or infinite."""
    if not dtype.is_floating_point:
        return of_type(dtype, *shape, seed=seed)
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).add(0.5).to(dtype)


def written(folder: Path, tensors: dict[str, Any], max_shard_size: str = "5GB") -> DonorRecord:
    named = {f"layers.0.{name}": tensor for name, tensor in tensors.items()}
    record = DonorRecord(model_type="llama", source_config={}, layer_indices=(4,))
    return write_donor(folder, record, MemoryTensors(named), max_shard_size)


@pytest.mark.parametrize("max_shard_size", ["5GB", "200B"])
def test_every_type_and_view_is_written_as_it_is(max_shard_size: str, tmp_path: Path) -> None:
    whole = torch.rand(6, 6)
    tensors = {f"{dtype}.{n}": finite(dtype, n, 3, seed=n) for dtype in STORED for n in (0, 1, 5)}
    tensors |= {f"{dtype}.number": finite(dtype, 1)[0] for dtype in STORED}
    tensors |= {"turned": torch.rand(4, 6).T, "every second": torch.rand(9)[::2], "one": torch.rand(9)[::2][:1]}
    tensors |= {"empty": torch.empty(0), "parameter": torch.nn.Parameter(torch.rand(3)), "ünïcode \"'": torch.ones(1)}
    tensors |= {"whole": whole, "tied": whole, "upper": whole[:4], "lower": whole[3:], "flat": whole.view(-1)}
    record = written(tmp_path, tensors, max_shard_size)
    found = open_donor_files(tmp_path).slices()
    assert {name.removeprefix("layers.0."): bits(part[...]) for name, part in found.items()} == {
        name: bits(tensor) for name, tensor in tensors.items()
    }
    assert len(record.files) == 1 if max_shard_size == "5GB" else len(record.files) > 3
    for name, stamp in record.files.items():
        assert stamp.sha256 == sha256_of(tmp_path / name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_what_is_not_finite_is_refused(bad: float, dtype: torch.dtype, tmp_path: Path) -> None:
    for place in (0, 20, -1):
        values = torch.ones(41)
        values[place] = bad
        with refused(CheckpointError, "'layers.0.a'", "NaN or infinity"):
            written(tmp_path, {"a": values.to(dtype)})


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e8m0fnu])
def test_types_without_infinity_are_checked_for_nan(dtype: torch.dtype, tmp_path: Path) -> None:
    byte = 0x7F if dtype == torch.float8_e4m3fn else 0xFF
    with refused(CheckpointError, "'layers.0.a'", "NaN or infinity"):
        written(tmp_path, {"a": torch.tensor([1, byte], dtype=torch.uint8).view(dtype)})
