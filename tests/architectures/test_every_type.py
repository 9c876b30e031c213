"""Every decoder-only type, at positions 0, 1, middle and L, and replaced: `pytest -m slow tests/architectures`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.architectures.matrix import CHECKED_TYPES, NOT_AT, REFUSED, VARIANTS, check, places, prepare
from transplant_hf import CompatibilityError

# One of each kind beside GPT-2, Llama and GPT-OSS, which `tests/model` has: fused experts, mixed attention, a recurrent
# state, and layers that no configuration can describe.
CHOSEN = ["mixtral", "gemma3_text", "mamba", "gpt2:inverse"]


def _check_all_places(model_type: str, folder: Path) -> None:
    if model_type in REFUSED:
        with pytest.raises(CompatibilityError, match=REFUSED[model_type]):
            pair = prepare(model_type, folder)
            check(pair, 1)
        return
    pair = prepare(model_type, folder)
    failures = []
    for position, replace in places(pair):
        if not replace and position in NOT_AT.get(model_type, {}):
            with pytest.raises(CompatibilityError, match=NOT_AT[model_type][position]):
                check(pair, position)
            continue
        seen = check(pair, position, replace)
        failures += [f"{'replacing at' if replace else 'inserted at'} {position}: {line}" for line in seen.failures]
    assert not failures


@pytest.mark.parametrize("model_type", CHOSEN)
def test_one_of_each_kind(model_type: str, tmp_path: Path) -> None:
    _check_all_places(model_type, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [name for name in [*CHECKED_TYPES, *VARIANTS] if name not in CHOSEN])
def test_every_type(model_type: str, tmp_path: Path) -> None:
    _check_all_places(model_type, tmp_path)
