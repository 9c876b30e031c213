"""A transplant computes what the recipient computes with the donor's own layers called in between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
)

from tests.helpers import (
    DONOR_LAYERS,
    NUM_LAYERS,
    PADDING,
    Graft,
    generated,
    layers_of,
    loaded,
    logits_of,
    plain,
    reference_logits,
    some_ids,
)
from transplant_hf import AutoModelWithTransplant, DonorSpec

load = AutoModelWithTransplant.from_pretrained
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def models(request: pytest.FixtureRequest) -> Any:
    """The plain recipient and the donor's source model of each family, loaded once."""
    known: dict[Path, tuple[Any, Any]] = {}

    def of(family: Path) -> tuple[Any, Any]:
        if family not in known:
            known[family] = plain(family / "recipient"), plain(family / "source")
        return known[family]

    return of


# -- Against the reference -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", range(NUM_LAYERS + 1))
def test_inserted(tiny: Path, models: Any, position: int) -> None:
    recipient, source = models(tiny)
    model = loaded(tiny, position)
    expected = reference_logits(recipient, [Graft(source, DONOR_LAYERS, position)])
    assert float((expected - logits_of(recipient)).abs().max()) > 0.1
    torch.testing.assert_close(logits_of(model), expected, **TOLERANCE)
    assert len(model.layer_map) == len(layers_of(model)) == model.config.num_hidden_layers == NUM_LAYERS + 2
    assert model.layer_map[position] == ("donor", 1)


@pytest.mark.parametrize("position", range(NUM_LAYERS - 1))
def test_replacing(tiny: Path, models: Any, position: int) -> None:
    recipient, source = models(tiny)
    model = loaded(tiny, position, "replace")
    expected = reference_logits(recipient, [Graft(source, DONOR_LAYERS, position, replace=True)])
    torch.testing.assert_close(logits_of(model), expected, **TOLERANCE)
    assert len(model.layer_map) == len(layers_of(model)) == model.config.num_hidden_layers == NUM_LAYERS
    assert model.layer_map[position : position + 2] == (("donor", 1), ("donor", 2))


@pytest.mark.parametrize("position", [0, 1, 4])
def test_two_donors_at_one_position(tiny: Path, models: Any, position: int) -> None:
    """They run in list order."""
    recipient, source = models(tiny)
    donor = str(tiny / "donor")
    specs = [DonorSpec(donor, position, name="b", layers=[1]), DonorSpec(donor, position, name="a")]
    model = load(tiny / "recipient", donors=specs)
    grafts = [Graft(source, [2], position), Graft(source, [1, 2], position)]
    torch.testing.assert_close(logits_of(model), reference_logits(recipient, grafts), **TOLERANCE)
    swapped = reference_logits(recipient, grafts[::-1])
    assert float((swapped - logits_of(model)).abs().max()) > 1e-3
    assert [slot.source for slot in model.layer_map[position : position + 3]] == ["b", "a", "a"]


def test_many_donors(tiny: Path, models: Any) -> None:
    """Inserted and replacing ones, out of order; every position is the untouched recipient's."""
    recipient, source = models(tiny)
    donor = str(tiny / "donor")
    specs = [
        DonorSpec(donor, 4, name="end"),
        DonorSpec(donor, 1, "replace", name="swap"),
        DonorSpec(donor, 0, name="start", layers=[0], strength=0.5),
        DonorSpec(donor, 3, name="mid", layers=[1]),
    ]
    model = load(tiny / "recipient", donors=specs)
    grafts = [
        Graft(source, [1, 2], 4),
        Graft(source, [1, 2], 1, replace=True),
        Graft(source, [1], 0, strength=0.5),
        Graft(source, [2], 3),
    ]
    torch.testing.assert_close(logits_of(model), reference_logits(recipient, grafts), **TOLERANCE)
    assert torch.equal(generated(model, use_cache=True), generated(model, use_cache=False))


@pytest.mark.parametrize(("layers", "numbers"), [([0], [1]), ([1], [2]), ([0, 1], [1, 2])])
def test_part_of_a_donor(tiny: Path, models: Any, layers: list[int], numbers: list[int]) -> None:
    recipient, source = models(tiny)
    model = loaded(tiny, 1, layers=layers)
    torch.testing.assert_close(logits_of(model), reference_logits(recipient, [Graft(source, numbers, 1)]), **TOLERANCE)
    assert model.layer_map.layers_of("donor") == list(range(1, 1 + len(layers)))


@pytest.mark.parametrize(("position", "strength"), [(2, 0.0), (4, 0.5), (0, -1.5)])
def test_strength(tiny: Path, models: Any, strength: float, position: int) -> None:
    recipient, source = models(tiny)
    model = loaded(tiny, position, strength=strength)
    graft = Graft(source, DONOR_LAYERS, position, strength=strength)
    torch.testing.assert_close(logits_of(model), reference_logits(recipient, [graft]), **TOLERANCE)
    if strength == 0:
        assert torch.equal(logits_of(model), logits_of(recipient))
        assert torch.equal(generated(model), generated(recipient))
    assert torch.equal(generated(model, use_cache=True), generated(model, use_cache=False))


def test_strength_zero_hides_values_that_overflow(family: Path) -> None:
    model = loaded(family, 2, strength=0)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.fill_(3e38)
    assert torch.equal(logits_of(model), logits_of(plain(family / "recipient")))


def test_kinds_stay_with_the_layers(tiny_gpt_oss: Path) -> None:
    """At an odd position the donor's full and sliding layers break the recipient's order."""
    model = loaded(tiny_gpt_oss, 1)
    full, sliding = "full_attention", "sliding_attention"
    assert model.config.layer_types == [sliding, full, sliding, full, sliding, full]
    assert loaded(tiny_gpt_oss, 2).config.layer_types == [sliding, full, full, sliding, sliding, full]
    assert [layer.self_attn.layer_idx for layer in layers_of(model)] == list(range(6))


# -- Generation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("position", "mode"), [(0, "insert"), (4, "insert"), (1, "replace")])
def test_cached_generation_equals_uncached(tiny: Path, position: int, mode: str) -> None:
    model = loaded(tiny, position, mode)
    assert torch.equal(generated(model, use_cache=True), generated(model, use_cache=False))


@pytest.mark.parametrize("position", [0, 1, 4])
def test_a_padded_batch_equals_its_rows(tiny: Path, position: int) -> None:
    model = loaded(tiny, position)
    lengths = [3, 9, 6]
    rows = [some_ids(1, length, seed=length) for length in lengths]
    padded = torch.full((3, 9), PADDING)
    for number, row in enumerate(rows):
        padded[number, 9 - row.shape[1] :] = row
    batch = generated(model, padded, attention_mask=(padded != PADDING).long())
    for number, row in enumerate(rows):
        assert torch.equal(batch[number, 9:], generated(model, row)[0, row.shape[1] :])


def test_left_padding_against_the_reference(tiny: Path, models: Any) -> None:
    recipient, source = models(tiny)
    ids = some_ids()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    inputs = {"attention_mask": mask, "position_ids": positions}
    found = logits_of(loaded(tiny, 0), ids, **inputs)
    expected = reference_logits(recipient, [Graft(source, DONOR_LAYERS, 0)], ids, **inputs)
    real = mask.bool()
    torch.testing.assert_close(found[real], expected[real], **TOLERANCE)


@pytest.mark.parametrize("position", [0, 1, 4])
def test_static_cache(tiny: Path, position: int) -> None:
    model = loaded(tiny, position)
    wanted = generated(model, use_cache=False)
    for _ in range(2):
        found = generated(model, cache_implementation="static", disable_compile=True)
        assert torch.equal(found, wanted)


def test_token_by_token_with_a_cache(tiny: Path) -> None:
    model = loaded(tiny, 1)
    ids = some_ids()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        steps = [model(ids[:, n : n + 1], past_key_values=cache, use_cache=True).logits for n in range(ids.shape[1])]
    torch.testing.assert_close(torch.cat(steps, 1), logits_of(model, ids), **TOLERANCE)
    assert cache.get_seq_length() == ids.shape[1]
