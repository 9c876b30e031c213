"""The cards of the author's three donors, as they stand in `model_cards/`."""

from __future__ import annotations

import runpy
import shutil
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from transplant_hf.cards import written_by_us

CARDS = Path(__file__).parents[2] / "model_cards"
CLAIMS = {
    "not-gpt2": ("openai-community/gpt2", "gpt2", "4, 5, 6", 1, 15, "81 MB", "17.33"),
    "not-tinyllama": ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "llama", "7, 8, 9", 3, 25, "252 MB", "54.15"),
    "not-gpt-oss-20b": ("openai/gpt-oss-20b", "gpt_oss", "8, 9, 10", 4, 27, "4.6 GB", "34.56"),
}


@pytest.mark.parametrize("name", sorted(CLAIMS))
def test_what_a_seeds_card_says(name: str) -> None:
    recipient, model_type, layers, position, count, size, perplexity = CLAIMS[name]
    card = ModelCard.load(CARDS / f"{name}.md")
    assert card.data.to_dict() == {
        "base_model": recipient,
        "base_model_relation": "adapter",
        "library_name": "transplant-hf",
        "license": "mit",
        "pipeline_tag": "text-generation",
        "tags": ["transplant", "neural-organ-transplantation", model_type],
    }
    facts = [
        f"3 decoder layers of `{recipient}` (`{model_type}`, layers {layers}), to be inserted at position {position}",
        f"{count} layers run: ",
        f"`{size}`",
        f"- `perplexity`: `{perplexity}`",
        "- `dataset`: `WikiText (1,000 samples)`",
        "- `optimizer`: `AdamW (lr=1e-4)`",
        "gated",
        "zuraiqi/neural-organ-transplantation-checkpoints",
        "claims of the donor's author; transplant_hf measured none of them",
        "License: `mit`.",
        "Neural Organ Transplantation (NOT): Checkpoint-Based Modular Adaptation for Transformer Models",
        "author={Al-Zuraiqi, Ahmad}",
    ]
    assert not [fact for fact in facts if fact not in card.text]
    assert written_by_us(str(card))


def test_the_cards_are_up_to_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise: python model_cards/render.py."""
    shutil.copy(CARDS / "render.py", tmp_path)
    main = runpy.run_path(str(tmp_path / "render.py"))["main"]
    for options, status in ((["--check"], 1), ([], 0), (["--check"], 0)):
        monkeypatch.setattr(sys, "argv", ["render.py", *options])
        assert main() == status
    for name in CLAIMS:
        assert (tmp_path / f"{name}.md").read_bytes() == (CARDS / f"{name}.md").read_bytes()
