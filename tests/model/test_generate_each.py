"""`generate_each`: one prompt for several choices of donors, in which the layers before the donors run once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from tests.architectures.matrix import prepare
from tests.helpers import refused, some_ids, tiny_llama_model, two_donors
from transplant_hf import AutoModelWithTransplant, ConfigurationError, DonorSpec

NEW = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
CHOICES = ["a", None, ("a", "b"), {"b": 0.5}]


@pytest.fixture
def model(tiny: Path) -> Any:
    """Donors before layers 1 and 3 of the recipient."""
    donor = str(tiny / "donor")
    specs = [DonorSpec(donor, 1, name="a", layers=[1]), DonorSpec(donor, 3, name="b")]
    return AutoModelWithTransplant.from_pretrained(tiny / "recipient", donors=specs)


def counted(model: Any) -> list[list[int]]:
    """Rows and tokens of each pass through layer 0."""
    seen: list[list[int]] = []
    stack = model.model.layers if hasattr(model, "model") else model.transformer.h
    stack[0].mlp.register_forward_hook(lambda _, args, output: seen.append(list(args[0].shape[:2])))
    return seen


def test_as_rows_of_a_batch(model: Any) -> None:
    ids = some_ids(batch=1)
    with model.using(rows=CHOICES):
        wanted = model.generate(ids.repeat(4, 1), **NEW)
    seen = counted(model)
    assert torch.equal(model.generate_each(ids, CHOICES, **NEW), wanted)
    assert seen[:2] == [[1, 11], [4, 1]] and len(seen) == 7
    mask = torch.ones_like(ids)
    assert torch.equal(model.generate_each({"input_ids": ids, "attention_mask": mask}, CHOICES, **NEW), wanted)
    mask[0, :3] = 0
    with model.using(rows=CHOICES):
        wanted = model.generate(ids.repeat(4, 1), attention_mask=mask.repeat(4, 1), **NEW)
    assert torch.equal(model.generate_each({"input_ids": ids, "attention_mask": mask}, CHOICES, **NEW), wanted)
    assert torch.equal(model.generate_each(ids, CHOICES, attention_mask=mask, **NEW), wanted)


@pytest.mark.parametrize("model_type", ["jamba", "mamba", "rwkv"])
def test_recurrent_states_are_not_shared(model_type: str, tmp_path: Path) -> None:
    pair = prepare(model_type, tmp_path)
    specs = [DonorSpec(str(tmp_path / "donor"), 1, name="a")]
    model = AutoModelWithTransplant.from_pretrained(tmp_path / "recipient", donors=specs, dtype=torch.float32)
    ids = pair.ids[:1]
    with model.using(rows=["a", None]):
        wanted = model.generate(ids.repeat(2, 1), **NEW)
    assert torch.equal(model.generate_each(ids, ["a", None], **NEW), wanted)


def test_what_is_recorded_of_the_prompt(model: Any) -> None:
    how = {**NEW, "return_dict_in_generate": True, "output_hidden_states": True}
    ids = some_ids(batch=1)
    with model.using(rows=CHOICES):
        wanted = model.generate(ids.repeat(4, 1), **how)
    found = model.generate_each(ids, CHOICES, **how)
    assert [[one.shape for one in step] for step in found.hidden_states] == [
        [one.shape for one in step] for step in wanted.hidden_states
    ]


def test_a_generation_config_leaves_to_the_models_own_what_it_does_not_set(model: Any) -> None:
    ids, given = some_ids(batch=1), GenerationConfig(**NEW)
    model.generation_config.num_beams = 2
    with model.using(rows=CHOICES):
        wanted = model.generate(ids.repeat(4, 1), generation_config=given)
    assert torch.equal(model.generate_each(ids, CHOICES, generation_config=given), wanted)


def test_a_donor_before_all_layers_and_short_prompts(tiny: Path) -> None:
    model = two_donors(tiny)
    for length in (1, 2, 5):
        ids = some_ids(1, length)
        with model.using(rows=CHOICES):
            wanted = model.generate(ids.repeat(4, 1), **NEW)
        assert torch.equal(model.generate_each(ids, CHOICES, **NEW), wanted)


@pytest.mark.parametrize("how", [{"num_beams": 2}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_what_rows_cannot_share(model: Any, how: dict[str, Any]) -> None:
    ids = some_ids(batch=1)
    with model.using(rows=CHOICES):
        wanted = model.generate(ids.repeat(4, 1), **NEW, **how)
    seen = counted(model)
    assert torch.equal(model.generate_each(ids, CHOICES, **NEW, **how), wanted)
    assert seen[0][0] > 1


def test_arguments_that_rows_may_not_share(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transplant_hf.model.generate_each._SHARED", {})
    seen, ids = counted(model), some_ids(batch=1)
    found = model.generate_each(ids, CHOICES, **NEW)
    assert seen[:2] == [[1, 11], [4, 12]]
    monkeypatch.undo()
    assert torch.equal(found, model.generate_each(ids, CHOICES, **NEW))


def test_refusals(model: Any, tiny_llama: Path) -> None:
    for inputs in (some_ids(), torch.zeros(1, 0, dtype=torch.long), {"attention_mask": torch.ones(1, 3)}):
        with refused(ConfigurationError, "one prompt", "input_ids [1, tokens]"):
            model.generate_each(inputs, ["a"])
    with refused(ConfigurationError, "one prompt", "'attention_mask': 2"):
        model.generate_each(some_ids(batch=1), ["a"], attention_mask=torch.ones(2, 11))
    for name in ("cache", "past_key_values", "cache_params", "inputs_embeds"):
        with refused(ConfigurationError, f"leave out {name}"):
            model.generate_each(some_ids(batch=1), ["a"], **{name: None})
    with refused(ConfigurationError, "no donor is named 'x'"):
        model.generate_each(some_ids(batch=1), ["x"])
    with model.disable_transplants(), refused(ConfigurationError, "not switched off"):
        model.generate_each(some_ids(batch=1), [None])
    plain = type(two_donors(tiny_llama))(tiny_llama_model(0).config)
    with refused(ConfigurationError, "holds no transplant"):
        plain.generate_each(some_ids(batch=1), ["a"])
