"""Rows of Accelerate: a model spread over memory and disk computes what it computes in one place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.ecosystem.cases import Case
from tests.helpers import generated, layers_of, logits_of

SECTION = "Offload and dispatch (Accelerate)"
pytestmark = pytest.mark.slow


def places(case: Case, **by_layer: str) -> dict[str, str]:
    """A device map by hand: everything on the CPU but the layers that are named `l0`, `l1`, ..."""
    model = case.independent()
    stack = next(name for name, module in model.named_modules() if module is layers_of(model))
    owner = stack.rpartition(".")[0]
    found = {f"{owner}.{name}": "cpu" for name, _ in model.get_submodule(owner).named_children()}
    del found[stack]
    found |= {f"{stack}.{number}": by_layer.get(f"l{number}", "cpu") for number in range(len(layers_of(model)))}
    return {**found, "lm_head": "cpu"}


def on_meta(model: Any) -> list[str]:
    """Names of the weights that are not in memory."""
    return [name for name, parameter in model.named_parameters() if parameter.is_meta]


def assert_as_in_memory(case: Case, model: Any) -> None:
    """Compare logits and cached generation, with the donor and without it, and once more with it."""
    native, untouched = case.independent(), case.recipient_model()
    for _ in range(2):
        assert torch.equal(logits_of(model, case.ids), logits_of(native, case.ids))
        assert torch.equal(generated(model, case.ids), generated(native, case.ids))
        with model.disable_transplants():
            assert torch.equal(logits_of(model, case.ids), logits_of(untouched, case.ids))
            assert torch.equal(generated(model, case.ids), generated(untouched, case.ids))


@pytest.mark.ecosystem(section=SECTION, feature='`device_map="auto"` and `"cpu"`; donor off too')
@pytest.mark.parametrize("device_map", ["auto", "cpu"])
def test_device_map(case: Case, device_map: str) -> None:
    assert_as_in_memory(case, case.load(device_map=device_map))


@pytest.mark.ecosystem(
    section=SECTION, feature="layers on disk by a device map: the recipient's, the donor's, all; donor off too"
)
@pytest.mark.parametrize("layers", ["l0 l5", "l1 l2", "l0 l1 l2 l3 l4 l5"], ids=["recipient", "donor", "all"])
def test_disk(case: Case, layers: str, tmp_path: Path) -> None:
    device_map = places(case, **dict.fromkeys(layers.split(), "disk"))
    model = case.load(device_map=device_map, offload_folder=str(tmp_path / "offload"))
    assert {layer for layer in layers.split() if any(f".{layer[1]}." in name for name in on_meta(model))} == set(
        layers.split()
    )
    assert_as_in_memory(case, model)
    saved = list((tmp_path / "offload").rglob("*.dat")) if (tmp_path / "offload").exists() else []
    assert not saved, "safetensors are read where they lie, not written anew"


@pytest.mark.ecosystem(
    section=SECTION, feature='`device_map="auto"` with too small a `max_memory`, the rest on disk; donor off too'
)
def test_auto_to_disk(case: Case, tmp_path: Path) -> None:
    size = sum(p.numel() * p.element_size() for p in case.independent().parameters())
    model = case.load(device_map="auto", max_memory={"cpu": int(size * 0.7)}, offload_folder=str(tmp_path / "offload"))
    assert on_meta(model)
    assert_as_in_memory(case, model)


@pytest.mark.ecosystem(section=SECTION, feature="disk offload in another dtype (bfloat16)")
def test_disk_in_another_dtype(case: Case, tmp_path: Path) -> None:
    device_map = places(case, l1="disk", l4="disk")
    model = case.load(device_map=device_map, offload_folder=str(tmp_path / "offload"), dtype=torch.bfloat16)
    assert on_meta(model)
    native = case.independent(dtype=torch.bfloat16)
    assert torch.equal(logits_of(model, case.ids), logits_of(native, case.ids))


@pytest.mark.ecosystem(section=SECTION, feature="saved in full from a model that is partly on disk")
def test_saved_from_disk(case: Case, tmp_path: Path) -> None:
    device_map = places(case, l0="disk", l1="disk")
    model = case.load(device_map=device_map, offload_folder=str(tmp_path / "offload"))
    model.save_pretrained(tmp_path / "full")
    again = type(case.recipient_model()).from_pretrained(tmp_path / "full")
    assert torch.equal(logits_of(again, case.ids), logits_of(case.independent(), case.ids))


@pytest.mark.ecosystem(section=SECTION, feature="saved thin from a model that is partly on disk")
def test_saved_thin_from_disk(case: Case, tmp_path: Path) -> None:
    model = case.load(device_map=places(case, l0="disk"), offload_folder=str(tmp_path / "offload"))
    model.save_pretrained(tmp_path / "thin", thin=True)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "thin")
    assert torch.equal(logits_of(again, case.ids), logits_of(model, case.ids))


@pytest.mark.ecosystem(
    section=SECTION, feature="`cpu_offload`, `disk_offload` and `dispatch_model` of a loaded model; donor off too"
)
@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload", "dispatch_model"])
def test_offloaded_afterwards(case: Case, how: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = case.load()
    if how == "cpu_offload":
        model = accelerate.cpu_offload(model, torch.device("cpu"))
    elif how == "disk_offload":
        model = accelerate.disk_offload(model, str(tmp_path / "offload"), torch.device("cpu"))
    else:
        device_map = places(case, l1="disk", l3="disk")
        model = accelerate.dispatch_model(
            model, device_map, main_device="cpu", offload_dir=str(tmp_path / "offload"), force_hooks=True
        )
    assert on_meta(model)
    assert_as_in_memory(case, model)
