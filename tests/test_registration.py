"""Importing the package: registered, quiet, light."""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import transplant_hf
from transplant_hf.registration import register


def test_registering_again_changes_nothing() -> None:
    for _ in range(2):
        register()
    assert AutoConfig.for_model("transplant", recipient="user/base", donors={"user/law": 1}).donors[0].position == 1
    for class_ in (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    ):
        assert transplant_hf.TransplantConfig in class_._model_mapping
