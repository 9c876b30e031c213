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
    from .comparison import compare
    from .compatibility import CompatibilityReport
    from .config import DonorSpec, TransplantConfig
    from .conversion import convert
    from .donor import Donor
    from .evaluation import evaluate, sweep
    from .exporting import export
    from .generation import generate
    from .inspection import inspect
    from .layer_map import LayerMap
    from .model.check import check, check_compatibility
    from .model.extracting import extract
    from .model.in_memory import remove_transplants, transplant
    from .model.load import AutoModelWithTransplant
    from .planning import plan
    from .pushing import push
    from .signing import sign
    from .training import DonorTrainer, DonorTrainingArguments, recover, train

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
    "check",
    "check_compatibility",
    "compare",
    "convert",
    "evaluate",
    "export",
    "extract",
    "generate",
    "inspect",
    "plan",
    "push",
    "recover",
    "remove_transplants",
    "sign",
    "sweep",
    "train",
    "transplant",
]

# Imported on first use, because they import torch and model code: module -> public names.
_MODULES = {
    "comparison": ["compare"],
    "compatibility": ["CompatibilityReport"],
    "config": ["DonorSpec", "TransplantConfig"],
    "conversion": ["convert"],
    "donor": ["Donor"],
    "evaluation": ["evaluate", "sweep"],
    "exporting": ["export"],
    "generation": ["generate"],
    "inspection": ["inspect"],
    "layer_map": ["LayerMap"],
    "model.check": ["check", "check_compatibility"],
    "model.extracting": ["extract"],
    "model.in_memory": ["remove_transplants", "transplant"],
    "model.load": ["AutoModelWithTransplant"],
    "planning": ["plan"],
    "pushing": ["push"],
    "signing": ["sign"],
    "training": ["DonorTrainer", "DonorTrainingArguments", "recover", "train"],
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
    module = next((module for module, names in _MODULES.items() if name in names), None)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(f".{module}", __name__), name)
    return value


def __dir__() -> list[str]:
    return __all__
