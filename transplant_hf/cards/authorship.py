"""Whose a README.md is: a card that transplant_hf wrote is renewed, one that a person wrote or edited is kept."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from huggingface_hub import ModelCard
from transformers.utils import logging

__all__ = ["CARD_FILE", "began_as_ours", "keeps_its_card", "signed", "written_by_us"]

logger = logging.get_logger(__name__)

CARD_FILE = "README.md"
_BY_US = "<!-- Written by transplant_hf"
_SIGNATURE = re.compile(_BY_US + r" \(([0-9a-f]{16})\)[^\n]*-->\s*\Z")


def signed(card: ModelCard) -> ModelCard:
    """Put a line under a card by which it is known again for as long as nobody edits it."""
    digest = _digest(str(card))
    card.text = f"{card.text.rstrip()}\n\n{_BY_US} ({digest}); once edited, it is not overwritten. -->\n"
    return card


def written_by_us(text: str) -> bool:
    """Whether a card is as transplant_hf wrote it."""
    found = _SIGNATURE.search(text)
    return found is not None and _digest(text[: found.start()]) == found.group(1)


def began_as_ours(text: str) -> bool:
    """Whether transplant_hf wrote a card, edited since or not."""
    return _BY_US in text


def keeps_its_card(folder: Path) -> bool:
    """Whether a folder has a README.md that a person wrote or edited, and that must stay."""
    path = folder.expanduser() / CARD_FILE
    if not path.is_file() or written_by_us(path.read_text(encoding="utf-8", errors="replace")):
        return False
    logger.warning(f"{path} was not written by transplant_hf, or was edited since: it is kept as it is.")
    return True


def _digest(text: str) -> str:
    # Line ends may change on the way through git, the text does not.
    lines = [line.rstrip() for line in text.splitlines()]
    return hashlib.sha256("\n".join(lines).strip().encode("utf-8", "replace")).hexdigest()[:16]
