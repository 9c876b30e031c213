"""`config.json` of a thin transplant, and code that loads it where transplant_hf was not imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..config import TransplantConfig
from ..heads import HEADS
from ..storage import read_json, write_json

CODE_FILE = "modeling_transplant.py"

# With `trust_remote_code=True` Transformers runs this file if transplant_hf was not imported. For missing imports
# outside a `try` it advises `pip install`, which would fetch whatever has that name on a package index.
_CODE = '''"""Lets `trust_remote_code=True` load this repository, with the Python package transplant_hf."""

try:
    from transplant_hf import TransplantConfig
    from transplant_hf.registration import LOADERS
except ImportError as error:
    raise ImportError(
        "This repository needs the Python package transplant_hf, which is not installed. Install it from its own "
        "sources; a package of that name on an index may be another one."
    ) from error

__all__ = ["TransplantConfig", *LOADERS]

globals().update(LOADERS)  # the classes that `auto_map` names
'''

AUTO_MAP = {
    auto_class: f"{CODE_FILE.removesuffix('.py')}.{name}"
    for auto_class, name in [("AutoConfig", "TransplantConfig"), *((head.auto_class, head.loader) for head in HEADS)]
}


def read_entry(folder: Path) -> dict[str, Any] | None:
    """Read the `config.json` of a donor or another transplant; `None` if it is a model's, or missing."""
    path = folder / "config.json"
    fields = read_json(path, "config.json") if path.is_file() else {}
    return fields if fields.get("model_type") == TransplantConfig.model_type else None


def write_entry(folder: Path, config: TransplantConfig) -> None:
    """Write `config.json` of a donor repo or another transplant that needs transplant_hf, and the code it names."""
    fields = config.to_diff_dict() | {"auto_map": AUTO_MAP}
    # The fields that matter most to a person come first.
    order = ["architectures", "model_type", "format_version", "recipient", "recipient_revision", "donors"]
    full = {**config.to_dict(), **fields}
    ordered = {key: full[key] for key in order} | {key: fields[key] for key in sorted(fields) if key not in order}
    write_json(folder / "config.json", ordered)
    (folder / CODE_FILE).write_text(_CODE, encoding="utf-8")
