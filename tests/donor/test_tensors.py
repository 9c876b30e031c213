"""A donor's weight files, by their headers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests.helpers import refused
from transplant_hf import CheckpointError
from transplant_hf.donor.tensors import DONOR_FILE, DONOR_INDEX, layer_of, open_donor_files, unpack_mxfp4

ONE, TWO = "donor-00001-of-00002.safetensors", "donor-00002-of-00002.safetensors"
TENSORS = {"layers.0.a": torch.arange(6.0).reshape(2, 3), "layers.1.a": torch.ones(2, dtype=torch.bfloat16)}


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Two shards and their index."""
    save_file({"layers.0.a": TENSORS["layers.0.a"]}, tmp_path / ONE)
    save_file({"layers.1.a": TENSORS["layers.1.a"]}, tmp_path / TWO)
    write_index(tmp_path, {"layers.0.a": ONE, "layers.1.a": TWO})
    return tmp_path


def write_index(folder: Path, weight_map: object) -> None:
    (folder / DONOR_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize(
    ("name", "found"),
    [("layers.0.a", (0, "a")), ("layers.12.mlp.experts.3.w1.weight", (12, "mlp.experts.3.w1.weight"))],
)
def test_layer_of(name: str, found: tuple[int, str]) -> None:
    assert layer_of(name) == found


@pytest.mark.parametrize(
    "name", ["a", "layers.x.a", "layers.1", "layers.-1.a", "layers.01.a", "model.layers.1.a", "layers..a"]
)
def test_other_names_are_refused(name: str) -> None:
    with refused(CheckpointError, repr(name), "layers.<number>.<name inside the layer>"):
        layer_of(name)


def test_one_file(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / DONOR_FILE)
    store = open_donor_files(tmp_path)
    infos = store.infos()
    assert {name: (info.shape, info.dtype) for name, info in infos.items()} == {
        "layers.0.a": ((2, 3), "F32"),
        "layers.1.a": ((2,), "BF16"),
    }
    assert infos["layers.0.a"].num_elements == 6
    assert infos["layers.0.a"].file == tmp_path / DONOR_FILE
    for name, part in store.slices().items():
        assert torch.equal(part[...], TENSORS[name])
        assert part[...].dtype == TENSORS[name].dtype


def test_shards(sharded: Path) -> None:
    store = open_donor_files(sharded)
    assert {name: info.file for name, info in store.infos().items()} == {
        "layers.0.a": sharded / ONE,
        "layers.1.a": sharded / TWO,
    }
    assert {name: part[...].tolist() for name, part in store.slices().items()} == {
        name: tensor.tolist() for name, tensor in TENSORS.items()
    }


def test_no_weights(tmp_path: Path) -> None:
    with refused(CheckpointError, str(tmp_path), DONOR_FILE, DONOR_INDEX):
        open_donor_files(tmp_path)


def test_a_missing_shard(sharded: Path) -> None:
    (sharded / TWO).unlink()
    with refused(CheckpointError, "missing", str(sharded / TWO)):
        open_donor_files(sharded)


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/tmp/x.safetensors", "inner/x.safetensors", "..\\x.safetensors", "x.bin", "", ".safetensors"],
)
def test_shards_have_plain_names(sharded: Path, name: str) -> None:
    save_file({"layers.1.a": TENSORS["layers.1.a"]}, sharded.parent / "x.safetensors")
    write_index(sharded, {"layers.0.a": ONE, "layers.1.a": name})
    with refused(CheckpointError, repr(name), "plain .safetensors file name"):
        open_donor_files(sharded)


@pytest.mark.parametrize("weight_map", [None, {}, [ONE], "x"])
def test_an_index_without_a_map(sharded: Path, weight_map: object) -> None:
    write_index(sharded, weight_map)
    with refused(CheckpointError, str(sharded / DONOR_INDEX), "weight_map"):
        open_donor_files(sharded)


@pytest.mark.parametrize("value", [3, None, ["x"], {"a": 1}])
def test_an_index_with_odd_values(sharded: Path, value: object) -> None:
    write_index(sharded, {"layers.0.a": ONE, "layers.1.a": value})
    with refused(CheckpointError, "plain .safetensors file name"):
        open_donor_files(sharded)


def test_an_index_that_is_not_json(sharded: Path) -> None:
    (sharded / DONOR_INDEX).write_text("<html>")
    with refused(CheckpointError, "cannot be read as JSON", str(sharded / DONOR_INDEX)):
        open_donor_files(sharded)


def test_an_index_that_disagrees(sharded: Path) -> None:
    write_index(sharded, {"layers.0.a": ONE, "layers.1.b": TWO})
    with refused(
        CheckpointError,
        str(sharded / DONOR_INDEX),
        "2 tensors are only in the index or only in a shard",
        "'layers.1.a'",
    ):
        open_donor_files(sharded)


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    save_file(TENSORS, sharded / TWO)
    with refused(CheckpointError, "'layers.0.a'", str(sharded / ONE), str(sharded / TWO)):
        open_donor_files(sharded)


@pytest.mark.parametrize("keep", [0, 4, 40, -1])
def test_a_truncated_file(tmp_path: Path, keep: int) -> None:
    save_file(TENSORS, tmp_path / DONOR_FILE)
    data = (tmp_path / DONOR_FILE).read_bytes()
    (tmp_path / DONOR_FILE).write_bytes(data[:keep])
    with refused(CheckpointError, str(tmp_path / DONOR_FILE), "not a whole safetensors file", "truncated"):
        open_donor_files(tmp_path)


def test_a_git_lfs_pointer(tmp_path: Path) -> None:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 123\n"
    (tmp_path / DONOR_FILE).write_text(pointer)
    with refused(CheckpointError, str(tmp_path / DONOR_FILE), "Git LFS pointer"):
        open_donor_files(tmp_path)


def test_a_tensor_in_another_shard_than_the_index_says(sharded: Path) -> None:
    index = json.loads((sharded / DONOR_INDEX).read_text())["weight_map"]
    swapped = {name: TWO if file == ONE else ONE for name, file in index.items()}
    write_index(sharded, swapped)
    with refused(CheckpointError, str(sharded / DONOR_INDEX), "are in another shard"):
        open_donor_files(sharded)


def test_mxfp4_is_unpacked_as_transformers_does() -> None:
    """Every pair of numbers, with the smallest and the largest exponents."""
    blocks = torch.arange(256, dtype=torch.uint8).reshape(2, 4, 2, 16)
    scales = torch.tensor([0, 1, 100, 127, 128, 200, 253, 254] * 2, dtype=torch.uint8).reshape(2, 4, 2)
    found = unpack_mxfp4(blocks, scales)
    assert found.shape == (2, 64, 4) and found.dtype is torch.bfloat16
    assert torch.equal(found, convert_moe_packed_tensors(blocks, scales))
