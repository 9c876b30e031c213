"""The names that `transplant_hf` itself offers: verbs named as the commands, loaded on first use."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import pytest

import transplant_hf
from transplant_hf import exporting

VERBS = (
    "check",
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
    "sweep",
    "train",
    "transplant",
)


def test_every_public_name_is_there() -> None:
    assert set(dir(transplant_hf)) == set(transplant_hf.__all__)
    assert all(getattr(transplant_hf, name) is not None for name in transplant_hf.__all__)


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_is_a_function_with_a_docstring(verb: str) -> None:
    assert verb in transplant_hf.__all__
    assert callable(getattr(transplant_hf, verb))
    # The module with the old names of export is called as the function is.
    assert getattr(transplant_hf, verb).__name__.rpartition(".")[2] == verb
    assert inspect.getdoc(getattr(transplant_hf, verb))


def test_no_submodule_hides_a_verb() -> None:
    """Importing a submodule binds its name in the package, whatever was bound to it before."""
    names = {module.name for module in pkgutil.iter_modules(transplant_hf.__path__)} & set(transplant_hf.__all__)
    assert names == {"export"}
    assert all(callable(importlib.import_module(f"transplant_hf.{name}")) for name in names)


def test_the_module_that_has_the_name_of_a_verb_has_its_signature() -> None:
    module = importlib.import_module("transplant_hf.export")
    assert inspect.signature(module) == inspect.signature(exporting.export)


def test_an_old_name_is_the_same_function() -> None:
    assert transplant_hf.check_compatibility is transplant_hf.check


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'transplnt'"):
        transplant_hf.transplnt  # noqa: B018
