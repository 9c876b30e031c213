"""The picture of the stack."""

from __future__ import annotations

import re

from examples.donor_app.picture import draw, refusal
from transplant_hf import LayerMap


def words(drawn: str) -> list[str]:
    return " ".join(re.sub(r"<[^>]+>", " ", drawn).split()).split()


def test_every_layer_with_its_source() -> None:
    drawn = draw(LayerMap([("recipient", 0), ("law", 4), ("recipient", 1)]), 0.5)
    assert " ".join(words(drawn)) == "0 recipient 0 1 law 4 2 recipient 1 3 layers: 2 recipient, 1 law"
    assert drawn.count('class="layer donor"') == 1
    assert "--strength: 0.50" in drawn


def test_a_deep_recipient_is_shortened() -> None:
    slots = [("recipient", n) for n in range(30)] + [("law", 0)] + [("recipient", 30)]
    drawn = draw(LayerMap(slots))
    assert "26 more" in drawn
    assert drawn.count('class="layer') == 2 + 2 + 1 + 1
    assert "32 layers: 31 recipient, 1 law" in drawn


def test_names_are_escaped() -> None:
    assert "<b>" not in draw(LayerMap([("<b>", 0)]))
    assert "<b>" not in refusal("<b>")
