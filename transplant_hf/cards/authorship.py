"""Who wrote a README.md: a card that transplant_hf wrote is replaced, one that a person wrote or edited is kept."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from huggingface_hub import ModelCard
from transformers.utils import logging

from ..storage import writing
from .escape import python_literal

logger = logging.get_logger(__name__)

CARD_FILE = "README.md"
_BY_US = "<!-- Written by transplant_hf"
_SIGNATURE = re.compile(_BY_US + r" \(([0-9a-f]{16})\)[^\n]*-->\s*\Z")
# Where a card's examples name what they load; the tokenizer's line may name another repository.
_LOADED = re.compile(r'((?:model=|(?<!AutoTokenizer)\.from_pretrained\())"(?:[^"\\\n]|\\.)*"')


def sign_card(card: ModelCard) -> ModelCard:
    """Add a line to a card by which it is recognized until somebody edits it."""
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


def write_card(card: ModelCard, folder: Path, target: Path) -> None:
    """Write a card, unless the folder that is going to be replaced has one that a person wrote or edited."""
    path = target.expanduser() / CARD_FILE
    if path.is_file() and not written_by_us(_read(path)):
        logger.warning(f"{path} was not written by transplant_hf, or was edited since: it is kept as it is.")
    else:
        card.save(folder / CARD_FILE)


def name_in_card(path: Path, repo_id: str) -> None:
    """Change a card that transplant_hf wrote so that its examples load a repository."""
    text = _read(path) if path.is_file() else ""
    if not written_by_us(text):
        return
    card = ModelCard(text[: text.rindex(_BY_US)])
    before = card.text
    card.text = _LOADED.sub(lambda found: f"{found[1]}{python_literal(repo_id)}", before)
    if card.text != before:
        with writing(path):
            path.write_text(str(sign_card(card)), encoding="utf-8")


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _digest(text: str) -> str:
    # Line ends may change on the way through git, the text does not.
    lines = [line.rstrip() for line in text.splitlines()]
    return hashlib.sha256("\n".join(lines).strip().encode("utf-8", "replace")).hexdigest()[:16]
