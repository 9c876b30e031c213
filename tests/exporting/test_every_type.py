"""Every type of model is exported, or refused with the reason: `pytest -m slow` for all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.architectures.matrix import CHECKED_TYPES, REFUSED, VARIANTS, prepare
from transplant_hf import AutoModelWithTransplant, CompatibilityError, ConfigurationError, DonorSpec
from transplant_hf.exporting import export

CHOSEN = ("qwen3_moe", "gemma2", "gpt_neox", "deepseek_v3", "jamba")
_POSITION = 1


def _check(model_type: str, folder: Path) -> None:
    prepare(model_type, folder)
    spec = DonorSpec(str(folder / "donor"), _POSITION)
    model = AutoModelWithTransplant.from_pretrained(folder / "recipient", donors=[spec], dtype=torch.float32)
    if not model._transplant.blueprint.native:
        with pytest.raises(ConfigurationError, match="describes these layers"):
            export(folder / "recipient", folder / "full", [spec])
        assert not (folder / "full").exists()
        return
    done = export(folder / "recipient", folder / "full", [spec])
    assert done.verified and done.layer_map == model.layer_map


@pytest.mark.parametrize("model_type", CHOSEN)
def test_chosen_types(model_type: str, tmp_path: Path) -> None:
    _check(model_type, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [*CHECKED_TYPES, *VARIANTS])
def test_every_type(model_type: str, tmp_path: Path) -> None:
    if model_type in REFUSED:
        with pytest.raises(CompatibilityError, match=REFUSED[model_type]):
            _check(model_type, tmp_path)
    else:
        _check(model_type, tmp_path)
