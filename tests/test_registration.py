"""Importing the package: registered, quiet, light."""

from __future__ import annotations

import pytest
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import transplant_hf
from tests.helpers import run_python
from transplant_hf.registration import register


def test_every_public_name_is_there() -> None:
    assert set(dir(transplant_hf)) == set(transplant_hf.__all__)
    for name in transplant_hf.__all__:
        assert getattr(transplant_hf, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = transplant_hf.no_such_name


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


def test_importing_is_quiet_and_touches_no_model_code() -> None:
    code = """
import sys, transformers
before, verbosity = set(sys.modules), transformers.logging.get_verbosity()
import transplant_hf
models = sorted(n for n in set(sys.modules) - before if n.startswith("transformers.models.") and ".modeling_" in n)
assert not [n for n in models if not n.endswith("modeling_auto")], models
assert "transformers.modeling_utils" not in sys.modules or "transformers.modeling_utils" in before
assert transformers.logging.get_verbosity() == verbosity
"""
    assert run_python(code) == ""
