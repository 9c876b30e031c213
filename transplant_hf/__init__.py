"""Whole transformer layers as exchangeable parts: load a recipient, insert donor layers, use it as before.

Importing this package registers transplants with the Auto classes of Transformers.

Example:
    >>> import transplant_hf
    >>> transplant_hf.TransplantConfig(recipient="openai-community/gpt2", donors={"user/law": 1}).model_type
    'transplant'
"""

from __future__ import annotations

import sys
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from .errors import (
    CheckpointError,
    CompatibilityError,
    ConfigurationError,
    DataError,
    HubError,
    IntegrityError,
    TrainingError,
    TransplantError,
)

if TYPE_CHECKING:
    from .compatibility import CompatibilityReport
    from .config import DonorSpec, TransplantConfig
    from .donor import Donor
    from .layer_map import LayerMap
    from .model.auto import AutoModelWithTransplant, check_compatibility
    from .model.memory import remove_transplants, transplant
    from .training import DonorTrainer, DonorTrainingArguments

__version__ = "0.1.0"

__all__ = [
    "AutoModelWithTransplant",
    "CheckpointError",
    "CompatibilityError",
    "CompatibilityReport",
    "ConfigurationError",
    "DataError",
    "Donor",
    "DonorSpec",
    "DonorTrainer",
    "DonorTrainingArguments",
    "HubError",
    "IntegrityError",
    "LayerMap",
    "TrainingError",
    "TransplantConfig",
    "TransplantError",
    "__version__",
    "check_compatibility",
    "remove_transplants",
    "transplant",
]

# Imported when first used: they bring torch and model code with them.
_LAZY = {
    "AutoModelWithTransplant": "model.auto",
    "CompatibilityReport": "compatibility",
    "Donor": "donor",
    "DonorSpec": "config",
    "DonorTrainer": "training",
    "DonorTrainingArguments": "training",
    "LayerMap": "layer_map",
    "TransplantConfig": "config",
    "check_compatibility": "model.auto",
    "remove_transplants": "model.memory",
    "transplant": "model.memory",
}


def _is_the_command() -> bool:
    """Whether this process is `transplant-hf` or `python -m transplant_hf`, which register when they have work to do.

    `--version`, `--help` and wrong usage then need neither Transformers nor torch, which take seconds to import.
    """
    program, *words = getattr(sys, "argv", None) or [""]
    if program == "-m":  # the name of the module stands before the words
        return sys.orig_argv[-len(words) - 1 :][:1] == [__name__]
    return PurePath(program).name in ("transplant-hf", "transplant-hf.exe")


if not _is_the_command():
    from .registration import register

    register()


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
