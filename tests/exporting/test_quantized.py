"""Exports of quantised recipients: what is packed stays packed, and what no loader reads is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers import copied, edit_json, loaded, logits_of, refused, run_python
from tests.splice.test_quantized import mxfp4, torchao_family  # noqa: F401 - fixtures
from transplant_hf import DonorSpec
from transplant_hf.errors import ConfigurationError
from transplant_hf.exporting import export

# ruff: noqa: F811 - a test asks for a fixture by its name

ALONE = """
import sys, torch
sys.modules["transplant_hf"] = None
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not any(info.values()), info
ids = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(0))
assert torch.equal(model(ids, use_cache=False).logits, torch.load(sys.argv[2]))
print("alone")
"""


@pytest.mark.parametrize("mode", ["insert", "replace"])
def test_mxfp4_with_a_dequantised_donor(mxfp4: Path, tmp_path: Path, mode: str) -> None:
    """Plain Transformers reads packed and plain experts side by side, where the configuration names the plain ones."""
    spec = DonorSpec(str(mxfp4 / "donor"), 1, mode=mode)
    done = export(mxfp4 / "recipient", tmp_path / "full", [spec])
    assert done.mixed == ("donor",) and done.verified and "full precision" in str(done)
    found = load_file(tmp_path / "full" / "model.safetensors")
    own = load_file(mxfp4 / "recipient" / "model.safetensors")
    origin = 1 if mode == "insert" else 3
    for kind in ("blocks", "scales"):
        name = "mlp.experts.gate_up_proj_" + kind
        assert torch.equal(found[f"model.layers.3.{name}"], own[f"model.layers.{origin}.{name}"])
        assert f"model.layers.1.{name}" not in found
    assert found["model.layers.1.mlp.experts.gate_up_proj"].dtype == torch.bfloat16
    fields = json.loads((tmp_path / "full" / "config.json").read_text())["quantization_config"]
    assert {"model.layers.1", "model.layers.2"} <= set(fields["modules_to_not_convert"])
    torch.save(logits_of(loaded(mxfp4, 1, mode)), tmp_path / "logits")
    assert run_python(ALONE, tmp_path / "full", tmp_path / "logits").split() == ["alone"]


def test_a_cast_leaves_packed_weights_alone(mxfp4: Path, tmp_path: Path) -> None:
    export(mxfp4 / "donor", tmp_path / "full", dtype="float32")
    found = load_file(tmp_path / "full" / "model.safetensors")
    own = load_file(mxfp4 / "recipient" / "model.safetensors")
    name = "mlp.experts.gate_up_proj_scales"
    assert torch.equal(found[f"model.layers.5.{name}"], own[f"model.layers.3.{name}"])
    assert found["lm_head.weight"].dtype == found["model.layers.1.mlp.experts.gate_up_proj"].dtype == torch.float32


def test_other_methods_do_not_mix(torchao_family: Path, tmp_path: Path) -> None:
    family = copied(torchao_family, tmp_path / "family")
    edit_json(family / "donor" / "config.json", recipient=str(family / "int8"))
    with refused(ConfigurationError, "is quantised (torchao)", "'donor' is not", "full precision"):
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
    with refused(ConfigurationError, "is quantised (fp8)", "full precision, and quantise the export"):
        export(family / "donor", tmp_path / "full")
    assert not (tmp_path / "full").exists()
