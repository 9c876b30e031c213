"""Exports of quantized recipients: MXFP4 is unpacked, other methods are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers import copied, edit_json, loaded, logits_of, plain, refused
from tests.splice.test_quantized import mxfp4, torchao_family  # noqa: F401 - fixtures
from transplant_hf import DonorSpec
from transplant_hf.errors import ConfigurationError
from transplant_hf.exporting import export

# ruff: noqa: F811 - a test asks for a fixture by its name


@pytest.mark.parametrize("mode", ["insert", "replace"])
def test_mxfp4_is_unpacked(mxfp4: Path, tmp_path: Path, mode: str) -> None:
    """The export is in bfloat16 throughout, and plain Transformers loads it."""
    spec = DonorSpec(str(mxfp4 / "donor"), 1, mode=mode)
    done = export(mxfp4 / "recipient", tmp_path / "full", [spec])
    assert done.verified and done.dtype == "bfloat16"
    found = load_file(tmp_path / "full" / "model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert "quantization_config" not in json.loads((tmp_path / "full" / "config.json").read_text())
    assert torch.equal(logits_of(plain(tmp_path / "full")), logits_of(loaded(mxfp4, 1, mode)))


def test_other_methods_do_not_mix(torchao_family: Path, tmp_path: Path) -> None:
    family = copied(torchao_family, tmp_path / "family")
    edit_json(family / "donor" / "config.json", recipient=str(family / "int8"))
    with refused(ConfigurationError, "is quantized (torchao)", "full precision"):
        export(family / "donor", tmp_path / "full")
    path = family / "recipient" / "model.safetensors"
    weights = {}
    for name, tensor in load_file(path).items():
        weights[name] = tensor.to(torch.float8_e4m3fn) if name.endswith("up_proj.weight") else tensor
        if name.endswith("up_proj.weight"):
            weights[f"{name}_scale_inv"] = torch.ones(1, 1)
    save_file(weights, path, metadata={"format": "pt"})
    edit_json(family / "recipient" / "config.json", quantization_config={"quant_method": "fp8"})
    edit_json(family / "donor" / "config.json", recipient=str(family / "recipient"))
    with refused(ConfigurationError, "is quantized (fp8)", "full precision, and quantize the export"):
        export(family / "donor", tmp_path / "full")
    assert not (tmp_path / "full").exists()
