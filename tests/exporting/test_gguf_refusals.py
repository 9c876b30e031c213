"""What cannot become a GGUF file, and files that are never lost or left half-written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.exporting.gguf_recipients import NAME, tiny_model, write_model
from tests.exporting.test_gguf import make_family
from tests.helpers import edit_json, refused, tiny_llama_model
from transplant_hf import (
    AutoModelWithTransplant,
    CheckpointError,
    CompatibilityError,
    ConfigurationError,
    Donor,
    DonorSpec,
    IntegrityError,
    export,
)
from transplant_hf.architecture import quantized as reader
from transplant_hf.exporting import gguf as gguf_export

gguf: Any = pytest.importorskip("gguf")


@pytest.fixture
def family(tmp_path: Path) -> Path:
    return make_family(tmp_path, "llama")


def to_gguf(family: Path, donors: Any = None, **kwargs: Any) -> None:
    export(family / "recipient" / NAME, family / "out.gguf", donors or {family / "law": 1}, **kwargs)


def nothing_left(family: Path) -> bool:
    return sorted(os.listdir(family)) == ["code", "law", "recipient"]


@pytest.mark.parametrize(
    ("metadata", "facts"),
    [
        ({"split.count": 2}, ("2 parts", "llama-gguf-split")),
        ({"llama.expert_count": 8}, ("8 experts", "convert_hf_to_gguf.py")),
        ({"llama.rope.scaling.factor": 2}, ("rope.scaling.factor", "Transformers does not read")),
        ({"llama.attention.head_count_kv": [2, 2, 2, 2, 2, 1]}, ("llama.attention.head_count_kv", "each layer")),
        ({"llama.block_count": 5}, ("6 blocks", "declares 5")),
    ],
    ids=["split", "experts", "unknown", "per layer", "count"],
)
def test_recipients(family: Path, metadata: dict[str, Any], facts: tuple[str, ...]) -> None:
    write_model(tiny_model("llama", 1), "llama", family / "recipient" / NAME, metadata=metadata)
    with refused(CheckpointError if "declares 5" in facts else ConfigurationError, *facts):
        to_gguf(family)
    assert nothing_left(family)


def test_an_unknown_architecture(family: Path) -> None:
    writer = gguf.GGUFWriter(family / "recipient" / NAME, "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with refused(ConfigurationError, "'mamba'", "llama", "convert_hf_to_gguf.py"):
        to_gguf(family)


def test_files_that_are_no_gguf_files(family: Path) -> None:
    path = family / "recipient" / NAME
    whole = path.read_bytes()
    for content in (b"", b"GGUF", b"PK\x03\x04" + bytes(64), whole[:400], whole[: len(whole) // 2]):
        path.write_bytes(content)
        with refused(CheckpointError, NAME, "not a whole GGUF file"):
            to_gguf(family)
    with refused(ConfigurationError, "there is no GGUF file", "other.gguf"):
        export(family / "law", family / "out.gguf", gguf=family / "other.gguf")


def test_strength(family: Path) -> None:
    with refused(ConfigurationError, "'law'", "strength 0.5", "strength 1"):
        to_gguf(family, [DonorSpec(str(family / "law"), 1, strength=0.5)])
    with refused(ConfigurationError, "'law'", "strength 0", "leave it out"):
        to_gguf(family, [DonorSpec(str(family / "law"), 1, strength=0.0)])


def test_side_by_side(family: Path) -> None:
    with refused(ConfigurationError, "law, code", "side by side", "stacked"):
        to_gguf(family, {family / "law": 1, family / "code": 1}, composition="side_by_side")


def test_a_donor_of_another_shape(family: Path) -> None:
    donor = Donor.from_model(tiny_llama_model(2), [1], name="small")
    with refused(CompatibilityError, "intermediate_size: donor 48, recipient 64"):
        to_gguf(family, {donor: 1})


def test_weights_that_the_file_does_not_have(tmp_path: Path) -> None:
    family = make_family(tmp_path, "qwen2")
    gone = tiny_model("qwen2", 1)
    for layer in gone.model.layers:
        layer.self_attn.q_proj.bias = None
    write_model(gone, "qwen2", family / "recipient" / NAME)
    with refused(CompatibilityError, "layer 0 of donor 'law'", "attn_q.bias: donor [32], recipient has none"):
        to_gguf(family)


@pytest.mark.parametrize(("architecture", "count"), [("gemma2", 46), ("gemma3", 62)])
def test_models_that_llama_cpp_recognizes_by_their_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, count: int
) -> None:
    assert gguf_export.RECOGNIZED_COUNTS[architecture] == count
    monkeypatch.setitem(gguf_export.RECOGNIZED_COUNTS, architecture, 7)
    family = make_family(tmp_path, architecture)
    with refused(ConfigurationError, architecture, "6 layers", "the transplant 7"):
        to_gguf(family, {family / "code": 1})
    to_gguf(family, [DonorSpec(str(family / "code"), 1, "replace")])


def test_kinds_of_layers_without_a_window(tmp_path: Path) -> None:
    family = make_family(tmp_path, "gemma3", sliding_window=4096)
    with refused(ConfigurationError, NAME, "full_attention, sliding_attention"):
        to_gguf(family)


def test_qwen_with_a_window(tmp_path: Path) -> None:
    family = make_family(tmp_path, "qwen2")
    window = {"layer_types": ["full_attention"] * 3 + ["sliding_attention"] * 3, "use_sliding_window": False}
    donor = Donor.from_model(tiny_model("qwen2", 2, **window), [4], name="window")
    with refused(ConfigurationError, NAME, "full_attention, sliding_attention"):
        to_gguf(family, {donor: 1})


@pytest.mark.parametrize(("value", "facts"), [(float("nan"), ("NaN",)), (1e6, ("too large for float16", "bfloat16"))])
def test_numbers_that_no_file_should_hold(family: Path, value: float, facts: tuple[str, ...]) -> None:
    model = tiny_model("llama", 2)
    model.model.layers[2].mlp.up_proj.weight.data[0, 0] = value
    donor = Donor.from_model(model, [1, 2], name="law")
    with refused(CheckpointError, "layers.1.mlp.up_proj.weight", "'law'", *facts):
        to_gguf(family, {donor: 1})
    assert nothing_left(family)
    if value == 1e6:
        to_gguf(family, {donor: 1}, dtype="bfloat16")


def test_a_changed_donor(family: Path) -> None:
    path = family / "law" / "donor.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with refused(IntegrityError, "donor.safetensors", "sha256"):
        to_gguf(family)
    assert nothing_left(family)


def test_rows_that_cannot_be_quantized(tmp_path: Path) -> None:
    fields = {"intermediate_size": 48}
    family = make_family(tmp_path, "llama", "F32", **fields)
    with refused(ConfigurationError, "ffn_down.weight", "rows of 48", "Q8_0", "groups of 32"):
        to_gguf(family, dtype="q8_0")


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        ({"dtype": "int8"}, ("float16", "q8_0", "'int8'")),
        ({"license": "mit"}, ("license",)),
        ({"max_shard_size": "1GB"}, ("max_shard_size",)),
        ({"revision": "main"}, ("revision",)),
        ({"gguf": "other.gguf"}, ("gguf=", "donors=")),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments(family: Path, arguments: dict[str, Any], facts: tuple[str, ...]) -> None:
    with refused(ConfigurationError, *facts):
        to_gguf(family, **arguments)
    assert nothing_left(family)


def test_a_file_without_donors(family: Path) -> None:
    with refused(ConfigurationError, "gguf=", "donors="):
        export(family / "recipient" / NAME, family / "out.gguf")


def test_q8_0_is_for_gguf_files(family: Path) -> None:
    tiny_model("llama", 1).save_pretrained(family / "plain")
    with refused(ConfigurationError, "'q8_0'", "bfloat16"):
        export(family / "plain", family / "full", {family / "law": 1}, dtype="q8_0")


def test_overwriting(family: Path) -> None:
    to_gguf(family)
    first = (family / "out.gguf").read_bytes()
    with refused(ConfigurationError, "out.gguf exists", "overwrite=True"):
        to_gguf(family)
    to_gguf(family, {family / "code": 1}, overwrite=True)
    assert (family / "out.gguf").read_bytes() != first
    with refused(ConfigurationError, "itself a transplant", "name all donors together"):
        export(family / "out.gguf", family / "again.gguf", {family / "law": 1})
    recipient = family / "recipient" / NAME
    whole = recipient.read_bytes()
    for target, facts in ((recipient, ("the recipient", "lost")), (family / "link.gguf", ("the recipient", "lost"))):
        if not target.exists():
            target.symlink_to(recipient)
        with refused(ConfigurationError, *facts):
            export(recipient, target, {family / "law": 1}, overwrite=True)
    for content in (whole, b"notes"):
        (family / "foreign.gguf").write_bytes(content)
        with refused(ConfigurationError, "foreign.gguf", "no record of writing"):
            export(recipient, family / "foreign.gguf", {family / "law": 1}, overwrite=True)
    assert recipient.read_bytes() == whole


@pytest.mark.parametrize("stage", ["write_gguf", "check_written", "sha256_of"])
def test_nothing_half_written(family: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    """An error in the middle leaves nothing, and what was there before."""
    real: Callable[..., Any] = getattr(gguf_export, stage)

    def stop(*args: Any) -> None:
        real(*args)
        if stage != "write_gguf" or args[3]:  # not the copy without tensors, for Transformers
            raise KeyboardInterrupt

    monkeypatch.setattr(gguf_export, stage, stop)
    with pytest.raises(KeyboardInterrupt):
        to_gguf(family)
    assert nothing_left(family)
    monkeypatch.undo()
    to_gguf(family)
    before = (family / "out.gguf").read_bytes()
    monkeypatch.setattr(gguf_export, stage, stop)
    with pytest.raises(KeyboardInterrupt):
        to_gguf(family, {family / "code": 1}, overwrite=True)
    assert (family / "out.gguf").read_bytes() == before
    assert sorted(os.listdir(family)) == ["code", "law", "out.gguf", "recipient"]


def test_a_byte_that_changes_while_it_is_written(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = gguf_export.write_gguf

    def flip(path: Path, *args: Any) -> None:
        real(path, *args)
        if not args[2]:
            return
        with path.open("r+b") as file:
            file.seek(-40, os.SEEK_END)
            byte = file.read(1)
            file.seek(-40, os.SEEK_END)
            file.write(bytes([byte[0] ^ 1]))

    monkeypatch.setattr(gguf_export, "write_gguf", flip)
    with refused(CheckpointError, "differs", "Nothing was kept"):
        to_gguf(family)
    assert nothing_left(family)


def test_a_transplant_that_changes_its_recipient(family: Path) -> None:
    tiny_model("llama", 9).save_pretrained(family / "other")
    model = AutoModelWithTransplant.from_pretrained(family / "other", donors={str(family / "law"): 1})
    model.save_pretrained(family / "thin", thin=True)
    edit_json(family / "thin" / "config.json", recipient_overrides={"rms_norm_eps": 0.5})
    with refused(ConfigurationError, "rms_norm_eps", NAME):
        export(family / "thin", family / "out.gguf", gguf=family / "recipient" / NAME)


def test_without_the_package(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader.importlib.util, "find_spec", lambda name: None)
    with refused(ConfigurationError, NAME, "pip install gguf"):
        to_gguf(family)
