"""Model cards: what a repository says of itself, rendered from the templates in `model_cards/`."""

from .authorship import CARD_FILE, keeps_its_card, written_by_us
from .facts import CardFacts, DonorFacts, FileFacts
from .licenses import TERMS, License, license_in, license_named
from .render import donor_card, full_card

__all__ = [
    "CARD_FILE",
    "TERMS",
    "CardFacts",
    "DonorFacts",
    "FileFacts",
    "License",
    "donor_card",
    "full_card",
    "keeps_its_card",
    "license_in",
    "license_named",
    "written_by_us",
]
