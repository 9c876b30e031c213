"""The cards of the author's three donors, as they stand in `model_cards/`."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from transplant_hf.cards import written_by_us

CARDS = Path(__file__).parents[2] / "model_cards"
CLAIMS = {
    "not-gpt2": ("openai-community/gpt2", "gpt2", "4, 5, 6", 1, 15, "81 MB"),
    "not-tinyllama": ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "llama", "7, 8, 9", 3, 25, "252 MB"),
    "not-gpt-oss-20b": ("openai/gpt-oss-20b", "gpt_oss", "8, 9, 10", 4, 27, "4.6 GB"),
}


@pytest.mark.parametrize("name", sorted(CLAIMS))
def test_what_a_seeds_card_says(name: str) -> None:
    recipient, model_type, layers, position, count, size = CLAIMS[name]
    card = ModelCard.load(CARDS / f"{name}.md")
    assert card.data.to_dict() == {
        "base_model": recipient,
        "base_model_relation": "adapter",
        "library_name": "transplant-hf",
        "pipeline_tag": "text-generation",
        "tags": ["transplant", "neural-organ-transplantation", model_type],
    }, "no licence, no data set and no perplexity that nobody here knows"
    facts = [
        f"3 decoder layers of `{recipient}` (`{model_type}`, layers {layers}), to be inserted at position {position}",
        f"{count} layers run: ",
        f"`{size}`",
        "gated",
        "zuraiqi/neural-organ-transplantation-checkpoints",
        "No perplexity of this donor was measured",
        "the donor's author's claims",
        "No license is recorded",
    ]
    assert not [fact for fact in facts if fact not in card.text]
    assert written_by_us(str(card))


def test_the_cards_are_up_to_date() -> None:
    """Else: python model_cards/render.py."""
    expected = runpy.run_path(str(CARDS / "render.py"))["rendered"]()
    assert {path.stem for path in expected} == set(CLAIMS)
    assert {path.name: path.read_text(encoding="utf-8") for path in expected} == {
        path.name: text for path, text in expected.items()
    }


def test_the_command(tmp_path: Path) -> None:
    copy = tmp_path / "model_cards"
    copy.mkdir()
    (copy / "render.py").write_bytes((CARDS / "render.py").read_bytes())
    codes = [
        subprocess.run([sys.executable, copy / "render.py", *options], capture_output=True, check=False).returncode
        for options in (["--check"], [], ["--check"])
    ]
    assert codes == [1, 0, 0]
    assert (copy / "not-gpt2.md").read_bytes() == (CARDS / "not-gpt2.md").read_bytes()
