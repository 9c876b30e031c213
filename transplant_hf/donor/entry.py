"""What a thin transplant is entered by: `config.json`, and code for those who did not import transplant_hf."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..config import TransplantConfig
from ..heads import HEADS
from ..storage import write_json

__all__ = ["AUTO_MAP", "CODE_FILE", "transplant_fields", "write_entry"]

CODE_FILE = "modeling_transplant.py"

# With `trust_remote_code=True` Transformers runs this file where it does not know transplants yet. Of imports outside a
# `try` that are missing it says `pip install`, which would ask a package index for a name that may be anybody's there.
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


def write_entry(folder: Path, config: TransplantConfig) -> None:
    """Write `config.json` of a donor repo or another transplant that needs transplant_hf, and the code it names."""
    write_json(folder / "config.json", transplant_fields(config))
    (folder / CODE_FILE).write_text(_CODE, encoding="utf-8")


def transplant_fields(config: TransplantConfig) -> dict[str, Any]:
    """Return what `config.json` of a transplant holds, the fields a person looks for first."""
    fields = config.to_diff_dict() | {"auto_map": AUTO_MAP}
    order = ["architectures", "model_type", "format_version", "recipient", "recipient_revision", "donors"]
    full = {**config.to_dict(), **fields}
    return {key: full[key] for key in order} | {key: fields[key] for key in sorted(fields) if key not in order}
