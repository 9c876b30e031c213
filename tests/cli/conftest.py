"""How the tests of commands call them, and what they call them on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from transplant_hf.cli import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command; returns its exit status, standard output and standard error."""

    def call(*words: object) -> tuple[int, str, str]:
        try:
            status = main(list(map(str, words)))
        except SystemExit as usage_error:
            status = int(str(usage_error.code))
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text of forty sentences."""
    path = tmp_path / "hamlet.txt"
    path.write_text("To be, or not to be, that is the question. " * 40)
    return path
