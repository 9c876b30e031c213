"""A card of ours is renewed; one that a person wrote or edited stays."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from tests.helpers import loaded, tiny_llama_model, two_donors
from transplant_hf import Donor
from transplant_hf.cards import written_by_us

WAYS = ("thin", "full", "transplant format", "donor")


def save(family: Path, way: str, target: Path, position: int) -> None:
    """Save one of the four artefacts that have a card."""
    if way == "donor":
        donor = Donor.from_pretrained(family / "donor")
        donor.save_pretrained(target, position=position, recipient=str(family / "recipient"))
    elif way == "transplant format":
        loaded(family, position, strength=0.5).save_pretrained(target)
    else:
        loaded(family, position).save_pretrained(target, thin=way == "thin")


@pytest.mark.parametrize("way", WAYS)
def test_our_own_card_is_renewed(tiny_gpt2: Path, tmp_path: Path, way: str, warned: list[str]) -> None:
    cards = []
    for position in (1, 3):
        save(tiny_gpt2, way, tmp_path / "out", position)
        cards.append((tmp_path / "out" / "README.md").read_text())
        assert written_by_us(cards[-1])
        assert f"position {position}" in cards[-1]
    assert cards[0] != cards[1]
    assert not [text for text in warned if "README" in text]


@pytest.mark.parametrize("way", WAYS)
def test_a_persons_card_is_kept(tiny_gpt2: Path, tmp_path: Path, way: str, warned: list[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("mine\n")
    save(tiny_gpt2, way, tmp_path / "out", 1)
    assert (tmp_path / "out" / "README.md").read_text() == "mine\n"
    assert (tmp_path / "out" / "config.json").exists()
    assert [text for text in warned if str(tmp_path / "out" / "README.md") in text and "kept" in text]


@pytest.mark.parametrize("way", WAYS)
def test_an_edited_card_is_kept(tiny_gpt2: Path, tmp_path: Path, way: str) -> None:
    save(tiny_gpt2, way, tmp_path / "out", 1)
    path = tmp_path / "out" / "README.md"
    edited = path.read_text().replace("## Limits", "## My own words\n\nHello.\n\n## Limits")
    path.write_text(edited)
    save(tiny_gpt2, way, tmp_path / "out", 3)
    assert path.read_text() == edited


def test_a_header_edited_elsewhere_counts_as_edited(tiny_gpt2: Path, tmp_path: Path) -> None:
    save(tiny_gpt2, "thin", tmp_path / "out", 1)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert written_by_us(str(card))
    card.data.license = "mit"
    assert not written_by_us(str(card))


def test_line_ends_and_notes_below() -> None:
    text = "---\nlicense: mit\n---\n\n# x\n"
    assert not written_by_us(text)
    assert not written_by_us("")
    ours = (Path(__file__).parents[2] / "model_cards" / "not-gpt2.md").read_text(encoding="utf-8")
    assert written_by_us(ours)
    assert written_by_us(ours.replace("\n", "\r\n"))
    assert not written_by_us(f"{ours}\nA note.\n")


def test_nothing_of_an_old_artefact_is_left(tiny_gpt2: Path, tmp_path: Path) -> None:
    """Code and cards that speak of what is gone would mislead."""
    target = tmp_path / "out"
    loaded(tiny_gpt2, 1).save_pretrained(target, thin=True)
    assert (target / "modeling_transplant.py").exists()
    model = loaded(tiny_gpt2, 1)
    model.save_pretrained(target)
    assert not (target / "modeling_transplant.py").exists()
    assert "merge" not in (target / "README.md").read_text()  # folders are no base models
    with model.disable_transplants():
        model.save_pretrained(target)
    assert not (target / "README.md").exists(), "it is the plain recipient now"


def test_a_model_without_a_transplant_gets_no_card(tmp_path: Path) -> None:
    tiny_llama_model(1).save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / "README.md").exists()


def test_a_variant_leaves_the_card_alone(tiny_gpt2: Path, tmp_path: Path) -> None:
    loaded(tiny_gpt2, 1).save_pretrained(tmp_path / "out")
    before = (tmp_path / "out" / "README.md").read_text()
    two_donors(tiny_gpt2).save_pretrained(tmp_path / "out", variant="two")
    assert (tmp_path / "out" / "README.md").read_text() == before
