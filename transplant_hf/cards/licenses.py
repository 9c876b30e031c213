"""Which licence a card names: one that was said, never one that was guessed."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigurationError

__all__ = ["TERMS", "License", "license_in", "license_named"]

# The files, by their whole names, that hold the terms of a model: LICENSE.key is not one of them.
TERMS = (
    *(f"{name}{ending}" for name in ("LICENSE", "LICENCE", "NOTICE") for ending in ("", ".md", ".txt", ".pdf")),
    *(f"LICENSE-{part}" for part in ("APACHE", "CODE", "MIT", "MODEL")),
)

# As the Hub writes them: "mit", "apache-2.0", "cc-by-nc-4.0", "other".
_IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")
_NAME = re.compile(r"[\w .+-]{1,64}")
_LINK = re.compile(r"https://[\w./~%-]{1,300}")


@dataclasses.dataclass(frozen=True)
class License:
    """A licence.

    Args:
        identifier: As the Hub writes it, such as "apache-2.0".
        name: What it is called, where the identifier is "other".
        link: Where it stands, likewise.
    """

    identifier: str
    name: str | None = None
    link: str | None = None


def license_named(identifier: str) -> License:
    """Read a licence that the caller passed.

    Raises:
        ConfigurationError: Not an identifier as the Hub writes them.
    """
    if not isinstance(identifier, str) or not _IDENTIFIER.fullmatch(identifier):
        raise ConfigurationError(
            f"license must be an identifier as the Hub writes them, such as 'mit' or 'apache-2.0', got {identifier!r}."
        )
    return License(identifier)


def license_in(fields: Mapping[str, Any]) -> License | None:
    """Return the licence that a card's metadata or an author's record names, or `None`.

    Example:
        >>> license_in({"license": "Apache-2.0"}).identifier
        'apache-2.0'
    """
    found = fields.get("license")
    identifier = found.strip().lower() if isinstance(found, str) else ""
    if not _IDENTIFIER.fullmatch(identifier):
        return None
    return License(
        identifier, _matching(_NAME, fields.get("license_name")), _matching(_LINK, fields.get("license_link"))
    )


def _matching(pattern: re.Pattern[str], value: Any) -> str | None:
    return value if isinstance(value, str) and pattern.fullmatch(value) else None
