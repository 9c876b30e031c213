"""Rows of what others do to a loaded model: copies, casts, pickles, state dicts, new vocabularies."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.ecosystem.cases import Case
from tests.ecosystem.steps import aligned
from tests.helpers import generated, layers_of, logits_of, randomised

SECTION = "Copies, casts and state dicts"


def assert_same(case: Case, model: Any, native: Any, untouched: Any | None = None) -> None:
    """Compare logits and cached generation; and with the donor off, where there is something to compare with."""
    assert torch.equal(logits_of(model, case.ids), logits_of(native, case.ids))
    assert torch.equal(generated(model, case.ids), generated(native, case.ids))
    if untouched is not None:
        with model.disable_transplants():
            assert torch.equal(logits_of(model, case.ids), logits_of(untouched, case.ids))
            assert torch.equal(generated(model, case.ids), generated(untouched, case.ids))


@pytest.mark.ecosystem(section=SECTION, feature="`to(dtype)`: float16 and bfloat16; donor off too")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_cast(case: Case, dtype: torch.dtype) -> None:
    models = [case.load().to(dtype), case.independent().to(dtype), case.recipient_model().to(dtype)]
    assert_same(case, *models)


@pytest.mark.ecosystem(section=SECTION, feature="cast with the donor switched off, used with it on")
def test_cast_while_off(case: Case) -> None:
    model = case.load()
    with model.disable_transplants():
        model.bfloat16()
    assert_same(case, model, case.independent().bfloat16(), case.recipient_model().bfloat16())


@pytest.mark.ecosystem(section=SECTION, feature="`copy.deepcopy`: a transplant of its own; donor off too")
def test_deepcopy(case: Case) -> None:
    model = case.load()
    twin = copy.deepcopy(model)
    randomised(model, seed=9)
    assert_same(case, twin, aligned(case.independent()), aligned(case.recipient_model()))
    with twin.disable_transplants():
        assert len(twin.layer_map) == len(model.layer_map) - 2


@pytest.mark.ecosystem(section=SECTION, feature="`pickle`, and `torch.save` of the whole model; donor off too")
@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_pickle(case: Case, how: str) -> None:
    model = case.load()
    if how == "pickle":
        again = pickle.loads(pickle.dumps(model))  # noqa: S301 - our own bytes
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
    assert_same(case, aligned(again), aligned(case.independent()), aligned(case.recipient_model()))


@pytest.mark.ecosystem(
    section=SECTION, feature="`state_dict` to and from the reference, through `torch.save`; donor off too"
)
def test_state_dict(case: Case) -> None:
    model, native = case.load(), randomised(case.independent(), seed=7)
    file = io.BytesIO()
    torch.save(native.state_dict(), file)
    file.seek(0)
    model.load_state_dict(torch.load(file, weights_only=True))
    untouched = case.recipient_model()
    _take(untouched, native, [0, 3, 4, 5])
    assert_same(case, aligned(model), aligned(native), aligned(untouched))
    fresh = case.independent()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits_of(aligned(fresh), case.ids), logits_of(native, case.ids))


def _take(model: Any, whole: Any, layers: list[int]) -> None:
    """Give a model the weights of some layers of a longer one, and all that is outside of its layers."""
    for layer, number in zip(layers_of(model), layers, strict=True):
        layer.load_state_dict(layers_of(whole)[number].state_dict())
    stack = next(name for name, module in whole.named_modules() if module is layers_of(whole))
    rest = {name: tensor for name, tensor in whole.state_dict().items() if not name.startswith(f"{stack}.")}
    model.load_state_dict(rest, strict=False)


@pytest.mark.ecosystem(
    section=SECTION, feature="`resize_token_embeddings`, larger and smaller, saved in full; donor off too"
)
@pytest.mark.parametrize("size", [272, 258])
def test_resized(case: Case, size: int, tmp_path: Path) -> None:
    models = [case.load(), case.independent(), case.recipient_model()]
    for model in models:
        torch.manual_seed(0)
        model.resize_token_embeddings(size, mean_resizing=False)
    model, native, untouched = map(aligned, models)
    assert logits_of(model, case.ids).shape[-1] == model.config.vocab_size == size
    assert_same(case, model, native, untouched)
    model.save_pretrained(tmp_path / "full")
    again = aligned(type(case.recipient_model()).from_pretrained(tmp_path / "full"))
    assert torch.equal(logits_of(again, case.ids), logits_of(native, case.ids))


@pytest.mark.ecosystem(section=SECTION, feature="a layer's module replaced, hooks, parametrizations")
def test_modules_replaced(case: Case) -> None:
    found, seen = [], []
    for model in (aligned(case.load()), aligned(case.independent())):
        for number in (0, case.position, 5):
            layer = layers_of(model)[number]
            layer.mlp.register_forward_hook(lambda module, args, output: _scaled(output))
            layer.mlp.register_forward_pre_hook(lambda *_: seen.append(1))
        layers_of(model)[case.position].mlp = nn.Sequential(layers_of(model)[case.position].mlp)
        found.append(logits_of(model, case.ids))
    assert torch.equal(*found)
    assert len(seen) == 6


def _scaled(output: Any) -> Any:
    return (output[0] * 0.5, *output[1:]) if isinstance(output, tuple) else output * 0.5
