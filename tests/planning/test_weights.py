"""Bytes of weights, against models that are really loaded."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers import DONOR_POSITION, edit_json, loaded, plain, refused, tiny_gpt_oss_model
from transplant_hf import CheckpointError, CompatibilityError, ConfigurationError, DonorSpec
from transplant_hf.planning import Plan, plan


def weights_of(model: Any) -> dict[str, int]:
    found: collections.Counter[str] = collections.Counter()
    for parameter in model.parameters():
        found[str(parameter.dtype).removeprefix("torch.")] += parameter.numel() * parameter.element_size()
    return dict(found)


def planned(family: Path, **kwargs: Any) -> Plan:
    return plan(family / "recipient", {str(family / "donor"): DONOR_POSITION}, **kwargs)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16"])
def test_weights_are_those_of_the_loaded_model(tiny: Path, dtype: str) -> None:
    found = planned(tiny, dtype=dtype)
    for cost, model in (
        (found.before, plain(tiny / "recipient", dtype=dtype)),
        (found.after, loaded(tiny, dtype=dtype)),
    ):
        assert cost.parameters == sum(parameter.numel() for parameter in model.parameters())
        assert cost.buffers == sum(buffer.nbytes for buffer in model.buffers())
        if dtype == "float16" and "float32" in weights_of(model):
            continue  # Transformers keeps a few small parameters of this model in float32, the plan counts them in half
        assert cost.weights == weights_of(model)
        assert cost.weight_bytes + cost.buffers == model.get_memory_footprint()


def test_layer_map_and_donors(tiny_llama: Path) -> None:
    found = planned(tiny_llama)
    model = loaded(tiny_llama)
    assert found.layer_map == model.layer_map
    (donor,) = found.donors
    layers = [model.model.layers[number] for number in model.layer_map.layers_of("donor")]
    assert donor.weights == sum(p.numel() * p.element_size() for layer in layers for p in layer.parameters())
    assert (donor.position, donor.mode, donor.layer_indices) == (1, "insert", (1, 2))


def test_a_donor_that_replaces_layers_needs_no_more_memory(tiny_llama: Path) -> None:
    found = plan(tiny_llama / "recipient", [DonorSpec(str(tiny_llama / "donor"), 1, "replace")])
    assert found.after.layers == found.before.layers
    assert found.after.weights == found.before.weights


def test_a_donor_or_transplant_is_planned_by_its_name(tiny_llama: Path, tmp_path: Path) -> None:
    loaded(tiny_llama, position=3).save_pretrained(tmp_path / "thin", thin=True)
    for what, position in ((tiny_llama / "donor", 1), (tmp_path / "thin", 3)):
        found = plan(what)
        assert found.after.weights == planned(tiny_llama).after.weights
        assert found.donors[0].position == position


def test_a_recipient_alone(tiny_llama: Path) -> None:
    found = plan(tiny_llama / "recipient")
    assert found.after is found.before
    assert "transplant" not in str(found)


def test_layers_that_do_not_exist_yet(tiny_gpt_oss: Path) -> None:
    found = plan(tiny_gpt_oss / "recipient", count=2, position=1)
    same = planned(tiny_gpt_oss)  # other layers of the same shape
    assert found.layer_map[:3] == (("recipient", 0), ("donor", 0), ("donor", 1))  # the layers that `train` starts from
    assert found.after.weights == same.after.weights
    sizes = [{kind.kind: kind.total for kind in one.after.cache} for one in (found, same)]
    assert sizes[0] == sizes[1]


def test_native_layers_and_inserted_ones_alike(inverse_gpt2: Path) -> None:
    assert planned(inverse_gpt2).after.weights == weights_of(loaded(inverse_gpt2))


def test_as_json(tiny_llama: Path) -> None:
    found = planned(tiny_llama, memory="1GiB").to_dict()
    assert found["ok"] is True
    assert found["after"]["weight_bytes"] == sum(found["after"]["weights"].values())
    assert found["layer_map"][1] == ["donor", 1]
    assert found["hardware"] == {"devices": 1, "memory": 2**30, "cpu_memory": None}


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        ({"dtype": "int8"}, "dtype must be"),
        ({"dtype": "many"}, "'many'"),
        ({"memory": "a lot"}, "'a lot'"),
        ({"memory": 0}, "memory must be at least 1, got 0"),
        ({"devices": 0}, "at least 1, got 0"),
        ({"context": 0}, "context must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"count": 2}, "either donors"),
        ({"position": 2}, "DONOR@P"),
    ],
)
def test_arguments_are_checked(tiny_llama: Path, arguments: dict[str, Any], fact: str) -> None:
    with refused(ConfigurationError, fact):
        planned(tiny_llama, **arguments)


def test_what_does_not_fit_is_refused_before(tiny_llama: Path, tiny_gpt2: Path) -> None:
    with refused(CompatibilityError, "model_type", "gpt2", "llama"):
        plan(tiny_llama / "recipient", {str(tiny_gpt2 / "donor"): 1})
    with refused(ConfigurationError, "outside 0..4"):
        plan(tiny_llama / "recipient", count=1, position=9)
    with refused(ConfigurationError, "is a transplant already"):
        plan(tiny_llama / "donor", count=1)
    with refused(CheckpointError, "not a donor"):
        plan(tiny_llama / "recipient", {str(tiny_llama / "source"): 1})


def test_nothing_is_built_outside_the_meta_device(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    real = torch.nn.Parameter.__new__

    def watched(cls: Any, data: Any = None, requires_grad: bool = True) -> Any:
        made.append(data.device.type)
        return real(cls, data, requires_grad)

    monkeypatch.setattr(torch.nn.Parameter, "__new__", staticmethod(watched))
    planned(tiny_llama)
    assert set(made) == {"meta"}


def test_experts_in_mxfp4_are_as_large_as_in_their_file(tmp_path: Path) -> None:
    model = tiny_gpt_oss_model(1, intermediate_size=32).bfloat16()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inner, outer = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.zeros(experts, outer, inner // 32, 16, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.zeros(experts, outer, inner // 32, dtype=torch.uint8)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    edit_json(tmp_path / "config.json", quantization_config={"quant_method": "mxfp4"})
    found = plan(tmp_path, count=2)
    packed = sum(tensor.nbytes for tensor in tensors.values() if tensor.dtype == torch.uint8)
    whole = sum(tensor.nbytes for tensor in tensors.values())
    assert found.before.weights == {"uint8": packed, "bfloat16": whole - packed}
    assert found.before.parameters == model.num_parameters()
    assert found.after.weights["uint8"] == packed
    assert plan(tmp_path, count=2, dequantize=True).before.weights == {"bfloat16": 2 * model.num_parameters()}
