"""Model cards: what a repository says about itself, rendered from the templates in `model_cards/`."""

from .authorship import CARD_FILE, began_as_ours, name_in_card, write_card, written_by_us
from .licenses import TERMS, check_license
from .render import DONOR_TEMPLATE, FULL_TEMPLATE, TRAINED_HERE, render_card

__all__ = [
    "CARD_FILE",
    "DONOR_TEMPLATE",
    "FULL_TEMPLATE",
    "TERMS",
    "TRAINED_HERE",
    "began_as_ours",
    "check_license",
    "name_in_card",
    "render_card",
    "write_card",
    "written_by_us",
]
