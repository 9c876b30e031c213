"""Registers transplants with the Auto classes. Idempotent, quiet, and touches no model code."""

from __future__ import annotations

from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .config import TransplantConfig

__all__ = [
    "TransplantForCausalLM",
    "TransplantForSequenceClassification",
    "TransplantForTokenClassification",
    "TransplantModel",
    "register",
]


class _Loader:
    """What an Auto class finds for a `TransplantConfig`: it loads the recipient's own class with donors in place."""

    config_class = TransplantConfig
    auto_class: Any = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """Load a transplant; see `AutoModelWithTransplant.from_pretrained`."""
        from .model.auto import load_transplant

        return load_transplant(cls.auto_class, pretrained_model_name_or_path, *model_args, **kwargs)

    @classmethod
    def _from_config(cls, config: TransplantConfig, **kwargs: Any) -> Any:
        from .model.auto import config_to_model

        return config_to_model(cls.auto_class, config, **kwargs)


class TransplantModel(_Loader):
    """A transplant without a head."""

    auto_class = AutoModel


class TransplantForCausalLM(_Loader):
    """A transplant for causal language modelling."""

    auto_class = AutoModelForCausalLM


class TransplantForSequenceClassification(_Loader):
    """A transplant for sequence classification."""

    auto_class = AutoModelForSequenceClassification


class TransplantForTokenClassification(_Loader):
    """A transplant for token classification."""

    auto_class = AutoModelForTokenClassification


def register() -> None:
    """Make the Auto classes and `pipeline` know transplants."""
    AutoConfig.register(TransplantConfig.model_type, TransplantConfig, exist_ok=True)
    for loader in (
        TransplantModel,
        TransplantForCausalLM,
        TransplantForSequenceClassification,
        TransplantForTokenClassification,
    ):
        loader.auto_class.register(TransplantConfig, loader, exist_ok=True)
