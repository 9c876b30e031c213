"""Where layers are placed, compared with the device map that Transformers makes for a loaded model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers.integrations.accelerate import get_balanced_memory, infer_auto_device_map

from tests.helpers import DONOR_POSITION, loaded
from transplant_hf.planning import Plan, plan


def planned(family: Path, **kwargs: Any) -> Plan:
    return plan(family / "recipient", {str(family / "donor"): DONOR_POSITION}, **kwargs)


def on_devices(model: Any, device_map: dict[str, Any]) -> dict[str, int]:
    """Bytes of a loaded model's weights by device; the longest name in the map decides."""
    found: dict[str, int] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        places = [place for place in device_map if not place or f"{name}.".startswith(f"{place}.")]
        device = str(device_map[max(places, key=len)]) if places else "0"
        found[device] = found.get(device, 0) + tensor.numel() * tensor.element_size()
    return found


@pytest.mark.parametrize("cpu", [None, 10**9])
def test_layers_are_placed_as_by_transformers(tiny: Path, cpu: int | None) -> None:
    model = loaded(tiny)
    memory = model.get_memory_footprint() // 3
    found = planned(tiny, devices=2, memory=memory, cpu_memory=cpu, context=1).after
    limits = {0: memory, 1: memory, **({"cpu": cpu} if cpu else {})}
    split = model._no_split_modules
    balanced = get_balanced_memory(model, max_memory=limits, no_split_module_classes=split)
    expected = on_devices(model, infer_auto_device_map(model, max_memory=balanced, no_split_module_classes=split))
    assert {share.device: share.weights for share in found.shares if share.weights} == expected
    assert sum(share.weights for share in found.shares) == model.get_memory_footprint()
    # Weights on disk are a problem, weights in CPU memory are not.
    assert bool(found.problems) == (cpu is None)
    if cpu is None:
        assert "read from disk at every step" in found.problems[0]


def test_no_warning_for_devices_of_another_machine(tiny_llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert {share.device for share in planned(tiny_llama, devices=2, memory="1MiB", context=1).after.shares} >= {"0"}
    assert caplog.records == []


def test_every_layer_is_placed_with_its_cache(tiny_llama: Path) -> None:
    found = planned(tiny_llama, devices=2, memory="1MiB", context=50).after
    assert sorted(number for share in found.shares for number in share.layers) == list(range(6))
    assert sum(share.cache or 0 for share in found.shares) == found.cache_bytes
    assert not found.problems
    each = (found.cache_bytes or 0) // 6
    assert all(share.cache == each * len(share.layers) for share in found.shares)


def test_room_is_left_for_the_cache(tiny_llama: Path) -> None:
    free = planned(tiny_llama, devices=2, memory="1MiB", context=50).after
    most = max(share.needed for share in free.shares)
    tight = planned(tiny_llama, devices=2, memory=most, context=50, cpu_memory="1MiB").after
    assert not tight.problems
    assert all(share.fits for share in tight.shares)


def test_what_does_not_fit_is_a_problem(tiny_llama: Path) -> None:
    found = planned(tiny_llama, memory=4096)
    assert not found
    assert "problem: " in str(found)
    assert found.to_dict()["ok"] is False


def test_one_device_of_any_size(tiny_llama: Path) -> None:
    (share,) = planned(tiny_llama, context=9).after.shares
    model = loaded(tiny_llama)
    assert share.weights == model.get_memory_footprint()
    assert share.memory is None
