"""Donors put into a loaded model, moved, and chosen by call and by row, for every type: `pytest -m slow` for all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.architectures.matrix import CHECKED_TYPES, NOT_AT, REFUSED, VARIANTS, Pair, prepare
from tests.architectures.tiny_overrides import CACHE_DIFFERS
from transplant_hf import AutoModelWithTransplant, ConfigurationError, DonorSpec, transplant

# Beside GPT-2, Llama and GPT-OSS, which `tests/model` has.
CHOSEN = ["gemma3_text", "mamba", "gpt2:inverse"]
NO_ROWS = {"xlnet": r"\[seq, batch, hidden\]"}
NO_CHOICE = {
    "reformer": "two hidden states",
    "zaya": "returns a second hidden state",  # the residual, beside what is added to it
    "mllama": "without its first layer",  # cross-attention, which a text alone does not run
}
NO_GENERATION = {"xlnet": "returns a second hidden state"}
# Halves the hidden state after some layers, in evaluation only: their number decides where, and rounding follows.
TOLERANCE = {"rwkv": 1e-4}


@torch.no_grad()
def _check_type(model_type: str, folder: Path) -> None:
    pair = prepare(model_type, folder)
    ids, own = pair.ids, pair.recipient
    near = {"rtol": 0, "atol": TOLERANCE.get(model_type, 1e-5)}
    start, end = 2, (1 if 0 in NOT_AT.get(model_type, {}) else 0)
    cached = own.can_generate() and own.config.model_type not in CACHE_DIFFERS
    untouched, continued = own(ids, use_cache=False).logits.clone(), _generate(own, ids) if cached else None
    live = transplant(own, str(folder / "donor"), start, in_place=True)
    for position in (start, end):
        live.move_donor("donor", position)
        loaded = _loaded(pair, position)
        assert torch.equal(live(ids, use_cache=False).logits, loaded(ids, use_cache=False).logits), position
        if cached:
            assert torch.equal(_generate(live, ids), _generate(loaded, ids)), position
    wanted = live(ids, use_cache=False).logits
    if model_type in NO_CHOICE:
        with pytest.raises(ConfigurationError, match=NO_CHOICE[model_type]), live.using(()):
            live(ids, use_cache=False)
        return
    with live.using("donor"):
        assert torch.equal(live(ids, use_cache=False).logits, wanted)
    with live.using(()):
        torch.testing.assert_close(live(ids, use_cache=False).logits, untouched, **near)
        if model_type in NO_GENERATION:
            with pytest.raises(ConfigurationError, match=NO_GENERATION[model_type]):
                _generate(live, ids)
        elif cached:
            assert torch.equal(_generate(live, ids), continued)
    if model_type in NO_ROWS:
        with pytest.raises(ConfigurationError, match=NO_ROWS[model_type]), live.using(rows=[None, "donor"]):
            pass
    else:
        with live.using(rows=[None, "donor"]):
            found = live(ids, use_cache=False).logits
            tokens = _generate(live, ids) if cached else None
        if cached:
            assert torch.equal(tokens, torch.stack([continued[0], _generate(live, ids)[1]]))
        torch.testing.assert_close(found[0], untouched[0], **near)
        torch.testing.assert_close(found[1], wanted[1], **near)
    live.remove_donor("donor")
    assert torch.equal(live(ids, use_cache=False).logits, untouched)


def _loaded(pair: Pair, position: int) -> torch.nn.Module:
    spec = DonorSpec(str(pair.folder / "donor"), position)
    return AutoModelWithTransplant.from_pretrained(pair.folder / "recipient", donors=[spec], dtype=torch.float32)


def _generate(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, num_beams=1)  # type: ignore[operator]


@pytest.mark.parametrize("model_type", CHOSEN)
def test_one_of_each_kind(model_type: str, tmp_path: Path) -> None:
    _check_type(model_type, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [n for n in [*CHECKED_TYPES, *VARIANTS] if n not in CHOSEN and n not in REFUSED])
def test_every_type(model_type: str, tmp_path: Path) -> None:
    _check_type(model_type, tmp_path)
