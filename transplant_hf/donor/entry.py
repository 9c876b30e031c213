"""What a thin transplant is entered by: `config.json`, and code for those who did not import transplant_hf."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..config import TransplantConfig
from ..storage import write_json

__all__ = ["AUTO_MAP", "CODE_FILE", "transplant_fields", "write_entry"]

CODE_FILE = "modeling_transplant.py"

# With `trust_remote_code=True` Transformers runs this file where it does not know transplants yet. It looks through
# the imports first, and where the package is missing it says `pip install transplant_hf`: so no `try` here.
_CODE = '''"""Lets `trust_remote_code=True` load this repository: `pip install transplant_hf` is all that it needs."""

from transplant_hf import TransplantConfig
from transplant_hf.registration import (
    TransplantForCausalLM,
    TransplantForSequenceClassification,
    TransplantForTokenClassification,
    TransplantModel,
)

__all__ = [
    "TransplantConfig",
    "TransplantForCausalLM",
    "TransplantForSequenceClassification",
    "TransplantForTokenClassification",
    "TransplantModel",
]
'''

AUTO_MAP = {
    auto_class: f"{CODE_FILE.removesuffix('.py')}.{name}"
    for auto_class, name in {
        "AutoConfig": "TransplantConfig",
        "AutoModel": "TransplantModel",
        "AutoModelForCausalLM": "TransplantForCausalLM",
        "AutoModelForSequenceClassification": "TransplantForSequenceClassification",
        "AutoModelForTokenClassification": "TransplantForTokenClassification",
    }.items()
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
