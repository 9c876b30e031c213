"""`donor_config.json`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers import edit_json, refused
from transplant_hf import CheckpointError, ConfigurationError, IntegrityError
from transplant_hf.donor import DONOR_CONFIG, DonorRecord
from transplant_hf.donor.record import FileStamp

RECORD = DonorRecord(
    model_type="gpt2",
    source_config={"model_type": "gpt2", "n_layer": 12},
    layer_indices=(4, 5, 6),
    source_id="user/source",
    source_revision="b" * 40,
    name="law",
    metadata={"perplexity": 52.5, "train_time": 3, "method": {"name": "nöt", "steps": [1, 2]}, "none": None},
    files={"donor.safetensors": FileStamp("c" * 64, 10)},
)


def test_round_trip(tmp_path: Path) -> None:
    RECORD.write(tmp_path)
    assert DonorRecord.read(tmp_path) == RECORD
    content = json.loads((tmp_path / DONOR_CONFIG).read_text())
    assert content["format_version"] == 1
    assert content["source"] == {"id": "user/source", "revision": "b" * 40}
    assert content["layer_indices"] == [4, 5, 6]
    assert content["metadata"] == RECORD.metadata
    assert content["files"] == {"donor.safetensors": {"sha256": "c" * 64, "size": 10}}


def test_missing_or_malformed(tmp_path: Path) -> None:
    with refused(CheckpointError, "missing", DONOR_CONFIG, str(tmp_path)):
        DonorRecord.read(tmp_path)
    (tmp_path / DONOR_CONFIG).write_text("{}")
    with refused(CheckpointError, DONOR_CONFIG, "model_type"):
        DonorRecord.read(tmp_path)


def test_newer_format(tmp_path: Path) -> None:
    RECORD.write(tmp_path)
    edit_json(tmp_path / DONOR_CONFIG, format_version=2, model_type=["of another kind"])
    with refused(
        ConfigurationError, str(tmp_path / DONOR_CONFIG), "format_version 2", "up to 1", "a newer transplant_hf"
    ):
        DonorRecord.read(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", 3),
        ("source_config", ["x"]),
        ("layer_indices", "4, 5"),
        ("layer_indices", []),
        ("layer_indices", [6, 4]),
        ("layer_indices", [-1, 0]),
        ("layer_indices", [1.0]),
        ("layer_indices", [True]),
        ("files", {"donor.safetensors": {"sha256": "c", "size": "10"}}),
        ("files", {"donor.safetensors": {"size": 10}}),
        ("files", ["donor.safetensors"]),
        ("source", "user/source"),
        ("metadata", ["x"]),
        ("name", ["x"]),
    ],
)
def test_fields_of_the_wrong_kind(tmp_path: Path, field: str, value: Any) -> None:
    RECORD.write(tmp_path)
    edit_json(tmp_path / DONOR_CONFIG, **{field: value})
    with refused(CheckpointError, str(tmp_path / DONOR_CONFIG)):
        DonorRecord.read(tmp_path)


@pytest.mark.parametrize(
    "name", ["../donor.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".safetensors", "x.bin"]
)
def test_files_have_plain_names(tmp_path: Path, name: str) -> None:
    RECORD.write(tmp_path)
    edit_json(tmp_path / DONOR_CONFIG, files={name: {"sha256": "c" * 64, "size": 10}})
    with refused(CheckpointError, repr(name), "plain .safetensors file name"):
        DonorRecord.read(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), [1.0, float("inf")], {"deep": {"er": float("-inf")}}])
def test_metadata_json_cannot_say(tmp_path: Path, value: Any) -> None:
    record = DonorRecord("gpt2", {}, (0,), metadata={"perplexity": value})
    with refused(CheckpointError, "metadata", "JSON cannot hold"):
        record.write(tmp_path)


def test_metadata_of_numpy_torch_and_paths_is_written_as_json(tmp_path: Path) -> None:
    metadata = {
        "perplexity": np.float32(2.5),
        "steps": np.int64(7),
        "curve": torch.tensor([1.0, 0.5]),
        3: Path("a.txt"),
    }
    DonorRecord("gpt2", {}, (0,), metadata=metadata | {"ok": (True, None)}).write(tmp_path)
    expected = {"perplexity": 2.5, "steps": 7, "curve": [1.0, 0.5], "3": "a.txt", "ok": [True, None]}
    assert DonorRecord.read(tmp_path).metadata == expected


@pytest.mark.parametrize("value", [object(), {("a",): 1}, {1, 2}, b"bytes"])
def test_metadata_that_is_no_json(tmp_path: Path, value: Any) -> None:
    with refused(CheckpointError, "metadata", "'entry'", "JSON cannot hold"):
        DonorRecord("gpt2", {}, (0,), metadata={"entry": value}).write(tmp_path)


def test_size_and_sha256_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "donor.safetensors"
    data = b"0123456789"
    stamp = FileStamp(hashlib.sha256(data).hexdigest(), len(data))
    with refused(IntegrityError, str(path), "is missing", "10", "force_download=True"):
        stamp.check_size(path)
    path.write_bytes(data[:-1])
    with refused(IntegrityError, str(path), "has 9 bytes", "records 10", "force_download=True"):
        stamp.check_size(path)
    path.write_bytes(b"0123456780")
    stamp.check_size(path)
    with refused(
        IntegrityError, str(path), stamp.sha256, hashlib.sha256(b"0123456780").hexdigest(), "force_download=True"
    ):
        stamp.check_bytes(path)
    path.write_bytes(data)
    stamp.check_bytes(path)
    path.write_bytes(b"9876543210")
    with refused(IntegrityError, "bytes were changed"):
        stamp.check_bytes(path)
