"""Malformed headers and configurations are refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import edit_json, refused
from tests.inspection.helpers import safetensors_bytes
from transplant_hf import CheckpointError, ConfigurationError, HubError
from transplant_hf.errors import TransplantError
from transplant_hf.inspection import inspect

TENSOR: dict[str, Any] = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "short": b"\x01\x02",
    "2^63": safetensors_bytes(b"{}", length=1 << 63),
    "2^64-1": safetensors_bytes(b"{}", length=(1 << 64) - 1),
    "one byte more": safetensors_bytes(b"{}", length=3),
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    "not text": safetensors_bytes(b"\xff\xfe\xfd"),
    "not JSON": safetensors_bytes(b"{'a'}"),
    "a list": safetensors_bytes([1]),
    "too deep": safetensors_bytes(b"[" * 200_000),
    "a long number": safetensors_bytes(b'{"a":' + b"9" * 9_000 + b"}"),
    "no fields": safetensors_bytes({"a": 5}),
    "no offsets": safetensors_bytes({"a": {"dtype": "F32", "shape": [1]}}),
    "offsets of another kind": safetensors_bytes({"a": {**TENSOR, "data_offsets": ["0", None]}}, bytes(24)),
    "offsets backwards": safetensors_bytes({"a": {**TENSOR, "data_offsets": [24, 0]}}, bytes(24)),
    "past the end": safetensors_bytes({"a": TENSOR}, bytes(8)),
    "bytes too many": safetensors_bytes({"a": TENSOR}, bytes(32)),
    "a hole": safetensors_bytes({"a": {**TENSOR, "data_offsets": [8, 32]}}, bytes(32)),
    "an overlap": safetensors_bytes({"a": TENSOR, "b": {**TENSOR, "data_offsets": [8, 32]}}, bytes(32)),
    "a shape too large": safetensors_bytes({"a": {**TENSOR, "shape": [1 << 40, 1 << 40]}}, bytes(24)),
    "a negative shape": safetensors_bytes({"a": {**TENSOR, "shape": [-2, -3]}}, bytes(24)),
    "a shape of texts": safetensors_bytes({"a": {**TENSOR, "shape": ["a", 1 << 40]}}, bytes(24)),
    "a shape that is a number": safetensors_bytes({"a": {**TENSOR, "shape": 6}}, bytes(24)),
    "a type that is a list": safetensors_bytes({"a": {**TENSOR, "dtype": ["F32"]}}, bytes(24)),
    "a type that is a poem": safetensors_bytes({"a": {**TENSOR, "dtype": "F32 " * 9}}, bytes(24)),
    "a type too wide": safetensors_bytes({"a": {**TENSOR, "dtype": "F64"}}, bytes(24)),
    "an unknown type too large": safetensors_bytes({"a": {**TENSOR, "dtype": "X1", "shape": [1000]}}, bytes(24)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header(name: str, family: Path) -> None:
    for path in (family / "donor" / "donor.safetensors", family / "recipient" / "model.safetensors"):
        path.write_bytes(HOSTILE[name])
        with refused(CheckpointError, str(path)):
            inspect(path.parent)


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "x.bin", "..", 5])
@pytest.mark.parametrize("place", ["donor", "recipient"])
def test_an_index_that_leads_out(family: Path, file: Any, place: str) -> None:
    stem = "donor" if place == "donor" else "model"
    (family / place / f"{stem}.safetensors").unlink()
    index = family / place / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"layers.0.x": file}}))
    with refused(CheckpointError, repr(str(file)), "plain .safetensors file name"):
        inspect(family / place)


@pytest.mark.parametrize(
    ("weight_map", "fact"),
    [
        ({}, "no weight_map"),
        ([], "no weight_map"),
        ({"a": "one.safetensors", "b": "gone.safetensors"}, "first 'gone.safetensors'"),
        ({"a": "one.safetensors", "x": "two.safetensors"}, "only in the index or only in a shard, first 'b'"),
        ({"a": "two.safetensors", "b": "one.safetensors"}, "are in another shard, first 'a'"),
        ({"a": "one.safetensors", "b": "two.safetensors", "c": "three.safetensors"}, "are in two shards, first 'a'"),
    ],
)
def test_an_index_that_lies(family: Path, weight_map: Any, fact: str) -> None:
    folder = family / "recipient"
    (folder / "model.safetensors").unlink()
    for name, tensors in (("one", "a"), ("two", "b"), ("three", "a")):
        (folder / f"{name}.safetensors").write_bytes(safetensors_bytes({tensors: TENSOR}, bytes(24)))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with refused(CheckpointError, fact):
        inspect(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"', "\x00", "[" * 200_000, '{"a": ' + "9" * 9_000 + "}"])
@pytest.mark.parametrize("file", ["donor/config.json", "donor/donor_config.json", "recipient/config.json"])
def test_configurations_that_are_not_json(family: Path, text: str, file: str) -> None:
    (family / file).write_text(text)
    with refused(CheckpointError, file.rpartition("/")[2]):
        inspect(family / file.partition("/")[0])


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": ["llama"]},
        {"model_type": 5},
        {"num_hidden_layers": "many"},
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": -1},
        {"hidden_size": {}},
        {"layer_types": 5},
        {"id2label": 5},
        {"auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}, "model_type": "evil"},
        {"architectures": "X"},
        {"rope_parameters": [1]},
        {"dtype": "float99"},
    ],
)
def test_absurd_configurations(family: Path, fields: dict[str, Any]) -> None:
    """Either they are refused, or what is wrong with them is said."""
    edit_json(family / "recipient" / "config.json", **fields)
    try:
        found = inspect(family / "recipient")
    except TransplantError as error:
        assert isinstance(error, ConfigurationError)
    else:
        assert found.to_dict()["movable"] is False or set(fields) & {"architectures", "auto_map", "dtype"}
    found = inspect(family / "donor")
    assert found.notes or set(fields) & {"architectures", "auto_map", "dtype"}


@pytest.mark.parametrize(
    "fields",
    [
        {"donors": "x"},
        {"donors": [{"donor": ".", "position": "1"}]},
        {"donors": [{"donor": ".", "position": 1, "more": 2}]},
        {"donors": 5},
        {"donors": []},
        {"recipient": ""},
        {"format_version": 99},
        {"id2label": 5},
    ],
)
def test_absurd_transplants(family: Path, fields: dict[str, Any]) -> None:
    edit_json(family / "donor" / "config.json", **fields)
    try:
        inspect(family / "donor")
    except TransplantError as error:
        assert isinstance(error, ConfigurationError | HubError)
    else:
        assert set(fields) & {"recipient", "id2label", "donors"}


@pytest.mark.parametrize(
    "fields",
    [
        {"layer_indices": [1, 2, 3]},
        {"layer_indices": ["1"]},
        {"source": "x"},
        {"metadata": [1]},
        {"files": {"../x.safetensors": {"sha256": "0", "size": 1}}},
        {"files": [1]},
        {"source_config": None},
    ],
)
def test_absurd_records(family: Path, fields: dict[str, Any]) -> None:
    edit_json(family / "donor" / "donor_config.json", **fields)
    with refused(CheckpointError):
        inspect(family / "donor")
