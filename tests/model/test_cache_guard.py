"""A cache that was filled on the other side of the switch is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from tests.helpers import (
    CACHE,
    NUM_LAYERS,
    generated,
    loaded,
    plain,
    refused,
    some_ids,
)
from transplant_hf import AutoModelWithTransplant, ConfigurationError, DonorSpec


def prefilled(model: Any, cache: Any = None) -> Any:
    """A cache filled with eight tokens."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    with torch.no_grad():
        model(some_ids(1, 8), past_key_values=cache, use_cache=True)
    return cache


def next_token(model: Any, cache: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(some_ids(1, 1), past_key_values=cache, use_cache=True).logits


@pytest.fixture
def two(tiny_gpt_oss: Path) -> Any:
    """A recipient with two donors, `a` inserted and `b` replacing."""
    donor = str(tiny_gpt_oss / "donor")
    specs = [DonorSpec(donor, 1, name="a"), DonorSpec(donor, 2, "replace", name="b", layers=[1])]
    return AutoModelWithTransplant.from_pretrained(tiny_gpt_oss / "recipient", donors=specs, keep_replaced=True)


def as_it_is(cache: Any) -> Any:
    return cache


@pytest.mark.parametrize("through", [as_it_is, copy.deepcopy, copy.copy])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_of_the_other_side_is_refused(tiny: Path, kind: str, through: Callable[[Any], Any]) -> None:
    model = loaded(tiny, 1)

    def empty() -> Any:
        return (
            StaticCache(config=model.config, max_cache_len=16)
            if kind == "static"
            else DynamicCache(config=model.config)
        )

    outside = through(prefilled(model, empty()))
    with model.disable_transplants():
        inside = through(prefilled(model, empty()))
        with refused(ConfigurationError, "filled with all donors on", "now runs with donors off: donor", "new cache"):
            next_token(model, outside)
        expected = next_token(plain(tiny / "recipient"), prefilled(plain(tiny / "recipient")))
        torch.testing.assert_close(next_token(model, inside), expected)
    with refused(ConfigurationError, "filled with donors off: donor", "now runs with all donors on", "new cache"):
        next_token(model, inside)
    torch.testing.assert_close(next_token(model, outside), next_token(model, prefilled(model)))


def test_generate_refuses_it_too(tiny_llama: Path) -> None:
    model = loaded(tiny_llama, 1)
    cache = prefilled(model)
    with model.disable_transplants(), refused(ConfigurationError, "new cache"):
        generated(model, some_ids(1, 12), **{CACHE: cache})


def test_each_set_of_donors_is_a_side_of_its_own(two: Any) -> None:
    with two.disable_transplants("a"):
        cache = prefilled(two)
        next_token(two, cache)
        with two.disable_transplants("b"), refused(ConfigurationError, "donors off: a,", "donors off: a, b"):
            next_token(two, cache)
        next_token(two, cache)
    with two.disable_transplants("b"), refused(ConfigurationError, "donors off: a,", "donors off: b"):
        next_token(two, cache)
    with two.disable_transplants("a"):
        next_token(two, cache)


def test_an_empty_cache_may_cross(tiny_llama: Path) -> None:
    """Nothing is in it yet that could belong to other layers."""
    model = loaded(tiny_llama, 4)
    cache = DynamicCache()
    with model.disable_transplants():
        prefilled(model, cache)
        assert len(cache.layers) == NUM_LAYERS


def test_a_returned_cache_is_of_its_side(tiny_llama: Path) -> None:
    model = loaded(tiny_llama, 1)
    with model.disable_transplants(), torch.no_grad():
        cache = model(some_ids(1, 8), use_cache=True).past_key_values
        assert isinstance(cache, DynamicCache)
    with refused(ConfigurationError, "donors off: donor"):
        next_token(model, cache)


def test_a_cache_of_the_plain_recipient_inside(tiny_llama: Path) -> None:
    """It was not filled by this model, and cannot be told from one that was; at worst it is refused."""
    model, recipient = loaded(tiny_llama, 1), plain(tiny_llama / "recipient")
    cache = prefilled(recipient)
    expected = next_token(recipient, copy.deepcopy(cache))
    with model.disable_transplants():
        try:
            found = next_token(model, cache)
        except ConfigurationError as error:
            assert "new cache" in str(error)
        else:
            assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", [DynamicCache, lambda config: StaticCache(config=config, max_cache_len=16)])
def test_an_empty_cache_of_the_other_side_is_refused(tiny: Path, kind: Callable[..., Any]) -> None:
    model = loaded(tiny, 1)
    outside = kind(config=model.config)
    with model.disable_transplants(), refused(ConfigurationError, "other layers (6", "donors off"):
        prefilled(model, outside)
    with model.disable_transplants():
        inside = kind(config=model.config)
    with refused(ConfigurationError, "other layers (4", "all donors on (6"):
        prefilled(model, inside)
    prefilled(model, outside)


def test_an_empty_cache_with_windows_elsewhere_is_refused(tiny_gpt_oss: Path) -> None:
    """A donor with full attention replaces a layer with a window: the number of layers is the same."""
    model = loaded(tiny_gpt_oss, 0, "replace", layers=[0], keep_replaced=True, name="law")
    outside = DynamicCache(config=model.config)
    with model.disable_transplants():
        inside = DynamicCache(config=model.config)
        with refused(ConfigurationError, "4 layers, 1 with a window", "donors off: law (4 layers, 2 with a window)"):
            prefilled(model, outside)
    with refused(ConfigurationError, "4 layers, 2 with a window", "all donors on (4 layers, 1 with a window)"):
        prefilled(model, inside)
