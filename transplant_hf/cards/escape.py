"""Text of others made harmless: a name or a metadata entry may hold Markdown, HTML or line breaks."""

from __future__ import annotations

import json
import re
from typing import Any

_MAX_LENGTH = 200
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#!|<>~&$:])")


def one_line(value: Any, max_length: int = _MAX_LENGTH) -> str:
    """Return a text on one line, without characters that do not print, cut to a length."""
    text = "".join(character if character.isprintable() else " " for character in str(value))
    text = " ".join(text.split())
    return text if len(text) <= max_length else f"{text[: max_length - 3]}..."


def code_span(value: Any) -> str:
    """Return a JSON value as an inline code span, in which Markdown means nothing."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return f"`{one_line(text).replace('`', chr(39)) or ' '}`"


def escape_markdown(value: Any) -> str:
    """Return a text that Markdown shows as it is."""
    return _MARKDOWN.sub(r"\\\1", one_line(value))


def python_literal(value: str) -> str:
    """Return a string as Python writes it, in double quotes and on one line."""
    literal = json.dumps(value, ensure_ascii=False)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in literal)
