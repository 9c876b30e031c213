"""Strings of strangers made harmless: a name or a metadata entry may hold Markdown, HTML or line breaks."""

from __future__ import annotations

import json
import re
from typing import Any

__all__ = ["code", "escaped", "one_line", "python_literal", "quoted"]

_LONGEST = 200
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#!|<>~&$:])")


def one_line(value: Any, longest: int = _LONGEST) -> str:
    r"""Return a text on one line, without what does not print, and not longer than asked for.

    Example:
        >>> one_line("a\n---\n b")
        'a --- b'
    """
    text = "".join(character if character.isprintable() else " " for character in str(value))
    text = " ".join(text.split())
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def code(value: Any) -> str:
    """Return a text as an inline code span, in which Markdown means nothing.

    Example:
        >>> code("[x](javascript:y)`")
        "`[x](javascript:y)'`"
    """
    return f"`{one_line(value).replace('`', chr(39)) or ' '}`"


def quoted(value: Any) -> str:
    """Return a JSON value as an inline code span."""
    return code(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))


def escaped(value: Any) -> str:
    r"""Return a text that Markdown shows as it is.

    Example:
        >>> escaped("my_law <b>")
        'my\\_law \\<b\\>'
    """
    return _MARKDOWN.sub(r"\\\1", one_line(value))


def python_literal(value: str) -> str:
    r"""Return a string as Python writes it, on one line.

    Example:
        >>> python_literal('user/"law"')
        '"user/\\"law\\""'
    """
    literal = json.dumps(value, ensure_ascii=False)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in literal)
