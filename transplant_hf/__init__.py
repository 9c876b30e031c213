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

# Imported on first use, because they import torch and model code: public name -> module:name.
_LAZY = {
    "AutoModelWithTransplant": "model.load:AutoModelWithTransplant",
    "CompatibilityReport": "compatibility:CompatibilityReport",
    "Donor": "donor:Donor",
    "DonorSpec": "config:DonorSpec",
    "DonorTrainer": "training:DonorTrainer",
    "DonorTrainingArguments": "training:DonorTrainingArguments",
    "LayerMap": "layer_map:LayerMap",
    "TransplantConfig": "config:TransplantConfig",
    "remove_transplants": "model.in_memory:remove_transplants",
    # The verbs: each does what the command of the same name does.
    "check": "model.check:check",
    "compare": "comparison:compare",
    "convert": "conversion:convert",
    "evaluate": "evaluation:evaluate",
    "export": "exporting:export",
    "extract": "model.extracting:extract",
    "generate": "generation:generate",
    "inspect": "inspection:inspect",
    "plan": "planning:plan",
    "push": "pushing:push",
    "recover": "training:recover",
    "sign": "signing:sign",
    "sweep": "evaluation:sweep",
    "train": "training:train",
    "transplant": "model.in_memory:transplant",
    # Old names, for one release.
    "check_compatibility": "model.check:check_compatibility",
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

    module, _, attribute = _LAZY[name].partition(":")
    value = getattr(import_module(f".{module}", __name__), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
