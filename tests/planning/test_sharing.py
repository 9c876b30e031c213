"""Where layers fall on devices, against Transformers' own device map of a model that is really loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers.integrations.accelerate import get_balanced_memory, infer_auto_device_map

from tests.architectures.tiny_models import tiny_model
from tests.helpers import DONOR_POSITION, loaded, refused
from transplant_hf import ConfigurationError
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
def test_layers_fall_as_transformers_places_them(tiny: Path, cpu: int | None) -> None:
    model = loaded(tiny)
    memory = model.get_memory_footprint() // 3
    found = planned(tiny, devices=2, memory=memory, cpu_memory=cpu, context=1).after
    limits = {0: memory, 1: memory, **({"cpu": cpu} if cpu else {})}
    split = model._no_split_modules
    balanced = get_balanced_memory(model, max_memory=limits, no_split_module_classes=split)
    expected = on_devices(model, infer_auto_device_map(model, max_memory=balanced, no_split_module_classes=split))
    assert {share.device: share.weights for share in found.shares if share.weights} == expected
    assert sum(share.weights for share in found.shares) == model.get_memory_footprint()
    # What goes to disk is a problem, what goes to main memory is not.
    assert bool(found.problems) == (cpu is None)
    if cpu is None:
        assert "read from disk at every step" in found.problems[0]


def test_devices_that_this_machine_lacks_are_no_warning(tiny_llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert {share.device for share in planned(tiny_llama, devices=2, memory="1MiB", context=1).after.shares} >= {"0"}
    assert caplog.records == []


def test_every_layer_is_somewhere_with_its_cache(tiny_llama: Path) -> None:
    found = planned(tiny_llama, devices=2, memory="1MiB", context=50).after
    assert sorted(number for share in found.shares for number in share.layers) == list(range(6))
    assert sum(share.cache or 0 for share in found.shares) == found.cache_bytes
    assert not found.problems
    each = (found.cache_bytes or 0) // 6
    assert all(share.cache == each * len(share.layers) for share in found.shares)


def test_room_is_left_for_the_cache(tiny_llama: Path) -> None:
    free = planned(tiny_llama, devices=2, memory="1MiB", context=50).after
    most = max(share.needed for share in free.shares)
    tight = planned(tiny_llama, devices=2, memory=most - 1, context=50).after
    assert [share.device for share in tight.shares if not share.fits] == [] or tight.problems
    assert any("max_memory={" in note for note in tight.notes)


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


def test_no_plan_is_refused(tiny_gpt2: Path, tiny_llama: Path) -> None:
    with refused(ConfigurationError, "GPT2LMHeadModel has no tensor-parallel plan"):
        planned(tiny_gpt2, parallel="tensor", devices=2)
    with refused(ConfigurationError, "LlamaForCausalLM has no expert-parallel plan"):
        planned(tiny_llama, parallel="expert", devices=2)


def test_heads_that_ranks_do_not_divide(tiny_llama: Path) -> None:
    found = planned(tiny_llama, parallel="tensor", devices=4).after
    assert found.problems == ("4 ranks do not divide 2 key-value heads, as the plan of LlamaForCausalLM needs",)


def test_a_plan_that_divides_little_is_said(tiny_gpt_oss: Path) -> None:
    found = planned(tiny_gpt_oss, parallel="tensor", devices=2).after
    assert any("divides no tensor of 6 layers" in note for note in found.notes)
    assert found.shares[0].replicated > found.weight_bytes // 2


def test_latents_are_kept_whole_by_every_rank(tmp_path: Path) -> None:
    tiny_model("deepseek_v3").save_pretrained(tmp_path)
    one = plan(tmp_path, layers=1, context=9).after
    two = plan(tmp_path, layers=1, context=9, parallel="tensor", devices=2).after
    assert two.shares[0].cache == one.cache_bytes


def test_every_style_of_transformers_is_known() -> None:
    from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES

    from transplant_hf.planning import sharing

    known = {*sharing._DIVIDED, *sharing._WHOLE, sharing._BY_EXPERT}
    assert set(ALL_PARALLEL_STYLES) <= known
