"""The text of an inspection: the fields of `to_dict` as an indented list, in the same way for every kind."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from ..display import bytes_text, numbers_text
from ..layer_map import LayerMap
from ..sources import at_revision

_MAX_ENTRIES = 12  # of a list or mapping
_MAX_LISTED = 6  # equal numbers of a longer list are counted
_MAX_WIDTH = 100  # of a text in a list or mapping
_SHOWN_APART = {"kind", "what", "revision", "ok", "notes", "problems", "layer_map"}


def inspection_text(fields: Mapping[str, Any]) -> str:
    """Return an inspection as text: a title, its fields, notes and problems, and the layer map."""
    lines = [f"{at_revision(fields['what'], fields['revision'])}: {fields['kind']}"]
    for name, value in fields.items():
        if name not in _SHOWN_APART and not name.endswith("revision") and not _is_empty(value):
            shown = at_revision(value, fields.get("_".join((name, "revision"))))
            lines += [f"  {line}" for line in _field(name, shown)]
    for label, texts in (("note", fields["notes"]), ("problem", fields["problems"])):
        lines += [f"  {line}" for text in texts for line in f"{label}: {text}".splitlines()]
    lines = [_escape_controls(line) for line in lines]
    if fields.get("layer_map"):
        lines += ["", str(LayerMap((_escape_controls(source), index) for source, index in fields["layer_map"]))]
    return "\n".join(lines)


def _field(name: str, value: Any) -> list[str]:
    """Return a field as one line, or as a heading with a line for each thing in it."""
    label = _one_line(name)
    if isinstance(value, list) and all(isinstance(item, Mapping) for item in value):
        value = {str(item.get("name", number)): {**item, "name": None} for number, item in enumerate(value)}
    if not isinstance(value, Mapping):
        return [f"{label}: {_value(name, value)}"]
    entries = [
        _field(str(key), _one_line(item) if isinstance(item, str) else item)
        for key, item in value.items()
        if not _is_empty(item)
    ]
    hidden = len(entries) - _MAX_ENTRIES
    lines = [line for entry in entries[:_MAX_ENTRIES] for line in entry]
    lines += [f"... and {hidden:,} more"] if hidden > 0 else []
    on_one_line = f"{label}: {'; '.join(lines)}"
    return [on_one_line] if len(on_one_line) <= _MAX_WIDTH else [f"{label}:", *(f"  {line}" for line in lines)]


def _value(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return bytes_text(value) if name == "size" else f"{value:,}"
    if not isinstance(value, list):
        return " ".join(str(value).split())
    if all(isinstance(item, int) for item in value):
        if len(value) <= _MAX_LISTED or len(set(value)) == len(value):
            return numbers_text(value)
        value = [f"{len(list(same))} x {number:,}" for number, same in itertools.groupby(value)]
    hidden = len(value) - _MAX_ENTRIES
    more = [f"... and {hidden:,} more"] if hidden > 0 else []
    return ", ".join([*(_one_line(str(item)) for item in value[:_MAX_ENTRIES]), *more])


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | Mapping) and not value)


def _one_line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _MAX_WIDTH else f"{text[: _MAX_WIDTH - 3]}..."


def _escape_controls(line: str) -> str:
    """Escape characters that could control a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in line)
