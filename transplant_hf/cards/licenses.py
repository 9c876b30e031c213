"""Which license a card names: one that somebody named, never a guess."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from yaml import YAMLError

from ..errors import ConfigurationError
from .authorship import CARD_FILE

# The files, by their whole names, that hold the terms of a model: LICENSE.key is not one of them.
TERMS = (
    *(f"{name}{ending}" for name in ("LICENSE", "LICENCE", "NOTICE") for ending in ("", ".md", ".txt", ".pdf")),
    *(f"LICENSE-{part}" for part in ("APACHE", "CODE", "MIT", "MODEL")),
)

# The fields of a card's header, each in the only form that is copied.
_FIELDS = {
    "license": re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}"),
    "license_name": re.compile(r"[\w .+-]{1,64}"),
    "license_link": re.compile(r"https://[\w./~%-]{1,300}"),
}


def check_license(identifier: str) -> dict[str, str]:
    """Return the header fields of a license that the caller named."""
    if not isinstance(identifier, str) or not _FIELDS["license"].fullmatch(identifier):
        raise ConfigurationError(
            f"license must be an identifier of the Hub, such as 'mit' or 'apache-2.0', got {identifier!r}."
        )
    return {"license": identifier}


def license_in(fields: Mapping[str, Any]) -> dict[str, str]:
    """Return the license fields of a card's header or of an author's record; empty if there is no license."""
    values = {name: fields.get(name) for name in _FIELDS}
    if isinstance(values["license"], str):
        values["license"] = values["license"].strip().lower()
    found = {name: value for name, value in values.items() if isinstance(value, str) and _FIELDS[name].fullmatch(value)}
    return found if "license" in found else {}


def choose_license(donors: Iterable[Mapping[str, Any]], recipient_files: Path | None, *, full: bool) -> dict[str, str]:
    """Return the header fields of the license that holds for a repository; empty if none is known."""
    named = [license_in(metadata) for metadata in donors]
    if any(named) and not full:
        return named[0] if all(one == named[0] for one in named) else {}
    recipient = _license_of(recipient_files)
    return recipient if not full or all(one == recipient for one in named) else {}


def _license_of(folder: Path | None) -> dict[str, str]:
    card = folder / CARD_FILE if folder else None
    if card is None or not card.is_file():
        return {}
    try:
        return license_in(ModelCard.load(card, ignore_metadata_errors=True).data.to_dict())
    except (ValueError, TypeError, YAMLError):  # a card that cannot be read names no license
        return {}
