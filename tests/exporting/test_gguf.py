"""Transplants as GGUF files: the recipient's bytes as they are, and what Transformers reads out of the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.exporting.gguf_recipients import NAME, tiny_model, write_model
from tests.helpers import logits_of, refused, some_ids
from transplant_hf import (
    AutoModelWithTransplant,
    CompatibilityError,
    ConfigurationError,
    Donor,
    DonorSpec,
    export,
)
from transplant_hf.cli import main
from transplant_hf.exporting import gguf_layers

gguf: Any = pytest.importorskip("gguf")
IDS = some_ids(2, 12)  # more than the sliding windows of 4


@pytest.fixture
def family(tmp_path: Path) -> Path:
    """A Llama of six layers as a GGUF file, and two donors."""
    return make_family(tmp_path, "llama")


def make_family(folder: Path, architecture: str, stored: str = "Q8_0", **fields: Any) -> Path:
    (folder / "recipient").mkdir()
    write_model(tiny_model(architecture, 1, **fields), architecture, folder / "recipient" / NAME, stored)
    for name, seed, layers in (("law", 2, [1, 2]), ("code", 3, [3])):
        donor = Donor.from_model(tiny_model(architecture, seed, **fields), layers, name=name)
        donor.save_pretrained(folder / name, position=1, recipient=str(folder / "recipient"))
    return folder


def written(family: Path, donors: Any, name: str = "out.gguf", **kwargs: Any) -> Any:
    """Export, and return the reader of the file."""
    export(family / "recipient" / NAME, family / name, donors, **kwargs)
    return gguf.GGUFReader(family / name)


def read_back(path: Path) -> torch.Tensor:
    return logits_of(AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name), IDS)


def transplant_of(family: Path, donors: Any) -> Any:
    return AutoModelWithTransplant.from_pretrained(family / "recipient", gguf_file=NAME, donors=donors)


def several(family: Path, architecture: str) -> list[DonorSpec]:
    """Two donors, one spread and one that replaces; kinds of layers stay where Gemma has them by their number."""
    law, code = str(family / "law"), str(family / "code")
    if architecture == "gemma2":
        return [DonorSpec(law, 1, "replace"), DonorSpec(code, 3, "replace")]
    if architecture == "gemma3":
        return [DonorSpec(law, (2, 4), "replace"), DonorSpec(code, 0, "replace")]
    return [DonorSpec(law, (0, 6)), DonorSpec(code, 3, "replace")]


@pytest.mark.parametrize("architecture", sorted(gguf_layers.ARCHITECTURES))
def test_transformers_reads_the_transplant(tmp_path: Path, architecture: str) -> None:
    family = make_family(tmp_path, architecture)
    donors = several(family, architecture)
    expected = transplant_of(family, donors)
    done = export(family / "recipient" / NAME, tmp_path / "out.gguf", donors, dtype="float32")
    assert list(done.layer_map) == list(expected.layer_map)
    assert done.gguf and done.verified and not done.irregular
    assert torch.equal(read_back(tmp_path / "out.gguf"), logits_of(expected, IDS))


@pytest.mark.parametrize("dtype", ["float16", "bf16", "q8_0"])
def test_bytes(family: Path, dtype: str) -> None:
    """Recipient tensors are copied; matrices of donors have the chosen type, and what has one dimension is float32."""
    reader = written(family, {family / "law": 4}, dtype=dtype)
    recipient = {tensor.name: tensor for tensor in gguf.GGUFReader(family / "recipient" / NAME).tensors}
    found = {tensor.name: tensor for tensor in reader.tensors}
    place = [0, 1, 2, 3, None, None, 4, 5]
    assert reader.get_field("llama.block_count").contents() == 8
    assert reader.get_field("transplant_hf.layer_map").contents()[3:6] == ["recipient 3", "law 1", "law 2"]
    kind = {"float16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}[dtype]
    for name, tensor in found.items():
        block = name.split(".")
        if block[0] == "blk" and place[int(block[1])] is None:
            assert tensor.tensor_type.name == (kind if len(tensor.shape) > 1 else "F32")
            continue
        old = recipient[name if block[0] != "blk" else f"blk.{place[int(block[1])]}.{'.'.join(block[2:])}"]
        assert (tensor.tensor_type, tensor.data.tobytes()) == (old.tensor_type, old.data.tobytes())
    value = gguf.quants.dequantize(found["blk.5.ffn_up.weight"].data, found["blk.5.ffn_up.weight"].tensor_type)
    stored = Donor.from_pretrained(family / "law").tensors()["layers.1.mlp.up_proj.weight"]
    torch.testing.assert_close(torch.tensor(value), stored, rtol=0, atol=0.01)
    size = (family / "recipient" / NAME).stat().st_size + sum(
        int(tensor.n_bytes) for tensor in found.values() if tensor.name.startswith(("blk.4.", "blk.5."))
    )
    assert 0 <= (family / "out.gguf").stat().st_size - size < 4096


def test_metadata_is_copied(family: Path) -> None:
    reader, old = written(family, {family / "law": None}), gguf.GGUFReader(family / "recipient" / NAME)
    changed = {"GGUF.kv_count", "GGUF.tensor_count", "llama.block_count", "transplant_hf.layer_map"}
    assert set(reader.fields) ^ set(old.fields) == {"transplant_hf.layer_map"}
    for name in set(old.fields) - changed:
        assert reader.get_field(name).contents() == old.get_field(name).contents()
        assert reader.get_field(name).types == old.get_field(name).types


def test_sources(family: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A donor by its name, and the command line."""
    written(family, {family / "law": 1})
    expected = (family / "out.gguf").read_bytes()
    export(family / "law", family / "donor.gguf", gguf=family / "recipient" / NAME)
    assert (family / "donor.gguf").read_bytes() == expected
    words = ["export", "--gguf", str(family / "recipient" / NAME)]
    assert main([*words, str(family / "law"), str(family / "cli.gguf"), "--json"]) == 0
    assert (family / "cli.gguf").read_bytes() == expected
    assert json.loads(capsys.readouterr().out)["files"]["cli.gguf"]["size"] == len(expected)
    more = ["--donor", f"{family / 'code'}@2", "--mode", "replace", "--dtype", "q8_0"]
    assert main([*words, f"{family / 'law'}@3,5", str(family / "two.gguf"), *more]) == 0
    specs = [DonorSpec(str(family / "law"), (3, 5), "replace"), DonorSpec(str(family / "code"), 2, "replace")]
    written(family, specs, "python.gguf", dtype="q8_0")
    assert (family / "two.gguf").read_bytes() == (family / "python.gguf").read_bytes()


def test_a_thin_transplant(family: Path) -> None:
    """Its recipient is another folder with the same layers; its donors and their places count."""
    tiny_model("llama", 9).save_pretrained(family / "other")
    donors = [DonorSpec(str(family / "law"), 2), DonorSpec(str(family / "code"), 5)]
    AutoModelWithTransplant.from_pretrained(family / "other", donors=donors).save_pretrained(family / "thin", thin=True)
    export(family / "thin", family / "thin.gguf", gguf=family / "recipient" / NAME, dtype="float32")
    assert torch.equal(read_back(family / "thin.gguf"), logits_of(transplant_of(family, donors), IDS))


@pytest.mark.parametrize(
    ("period", "kinds"),
    [(None, "SSSSSSSF"), (2, "SSSFSFSF"), ([True, False, False, False, False, True], "SSSFFFFS")],
)
def test_kinds_of_layers(tmp_path: Path, period: Any, kinds: str) -> None:
    """Sliding layers 1 and 2 of another Gemma, in a file that lists kinds, gives their period, or says nothing."""
    family = make_family(tmp_path, "gemma3")
    metadata = {} if period is None else {"gemma3.attention.sliding_window_pattern": period}
    write_model(tiny_model("gemma3", 1), "gemma3", family / "recipient" / NAME, metadata=metadata)
    done = export(family / "recipient" / NAME, family / "out.gguf", {family / "law": 1})
    assert done.irregular and "llama.cpp reads them" in str(done)
    pattern = gguf.GGUFReader(family / "out.gguf").get_field("gemma3.attention.sliding_window_pattern")
    assert pattern.contents() == [kind == "S" for kind in kinds]


def test_rope_that_the_file_stores_as_factors(tmp_path: Path) -> None:
    """Transformers reads no scaling of Llama 3 from a file: the donor's is used if it gives the file's factors."""
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    family = make_family(tmp_path, "llama", rope_parameters=rope)
    model = tiny_model("llama", 1, rope_parameters=rope)
    plain = tiny_model("llama", 1)
    factors = plain.model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq
    assert factors[0] == 1 and factors[-1] == 8
    path = family / "recipient" / NAME
    write_model(model, "llama", path, tensors={"rope_freqs.weight": factors})
    reader = written(family, {family / "law": 1})
    assert (
        next(tensor for tensor in reader.tensors if tensor.name == "rope_freqs.weight").data.tolist()
        == factors.tolist()
    )
    write_model(model, "llama", path, tensors={"rope_freqs.weight": factors + 1})
    with refused(ConfigurationError, NAME, "rope_freqs.weight", "another model"):
        written(family, {family / "law": 1}, "wrong.gguf")
    write_model(model, "llama", path)
    with refused(CompatibilityError, "rope_parameters", "llama3"):
        written(family, {family / "law": 1}, "none.gguf")
