"""`transplant_hf.export` was a sub-package and is a function now: both uses work, in either order."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace

import pytest

import transplant_hf
from transplant_hf import exporting, pushing


@pytest.mark.parametrize("function_first", [True, False])
def test_the_function_and_the_old_path(function_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "transplant_hf.export", raising=False)
    monkeypatch.setattr(transplant_hf, "export", exporting.export if function_first else None, raising=False)
    old = importlib.import_module("transplant_hf.export")
    assert old.export_transplant is exporting.export and old.Export is exporting.Export and old.Push is pushing.Push
    for function in (transplant_hf.export, old):
        with pytest.raises(transplant_hf.ConfigurationError, match="is not empty"):
            function("nowhere", "/")  # type: ignore[operator]


def test_the_old_name_of_push_takes_the_old_name_of_its_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = SimpleNamespace()
    monkeypatch.setattr(pushing, "push", lambda *args, **options: seen.__dict__.update(options))
    pushing.push_artefact("folder", "user/model", revision="next", private=True)
    assert vars(seen) == {"to_revision": "next", "private": True}
