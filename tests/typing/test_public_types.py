"""The public names as a type checker sees them from outside, in a program that uses the installed package."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import transplant_hf

PROGRAM = Path(__file__).with_name("program.txt")
_NOTE = re.compile(r'program\.py:(\d+): note: Revealed type is "(.*)"$')


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What mypy says of the program, which is no .py file here because it is never imported."""
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed")
    try:
        metadata.version("transplant_hf")
    except metadata.PackageNotFoundError:
        pytest.skip("transplant_hf is not installed, so mypy would not see it as a package of others")
    folder = tmp_path_factory.mktemp("user")
    (folder / "program.py").write_text(PROGRAM.read_text(encoding="utf-8"), encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--cache-dir=cache", "program.py"]
    known = {name: value for name, value in os.environ.items() if name not in ("MYPYPATH", "PYTHONPATH")}
    done = subprocess.run(command, cwd=folder, env=known, capture_output=True, text=True, timeout=550)
    assert not done.stderr, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_strict_program_has_no_errors(output: str) -> None:
    errors = [line for line in output.splitlines() if ": error:" in line]
    assert not errors, "\n".join(errors)


@pytest.mark.slow
def test_types_are_what_a_user_expects(output: str) -> None:
    lines = PROGRAM.read_text(encoding="utf-8").splitlines()
    wanted = {
        n: line.rpartition("  # ")[2] for n, line in enumerate(lines, 1) if "reveal_type(" in line and "#" in line
    }
    found = {int(match[1]): match[2] for match in map(_NOTE.search, output.splitlines()) if match}
    assert len(wanted) > 25
    wrong = {n: (found.get(n), type_) for n, type_ in wanted.items() if found.get(n) != type_}
    assert not wrong, "\n".join(f"line {n}: {lines[n - 1]}: {was}" for n, (was, _) in wrong.items())


def test_the_program_uses_every_public_name() -> None:
    text = PROGRAM.read_text(encoding="utf-8")
    after = text.partition("\n)\n")[2]
    unused = [name for name in transplant_hf.__all__ if not re.search(rf"\b{name}\b", after)]
    assert not unused, f"{unused} are public and not in {PROGRAM.name}: use each as a user would"


def test_the_package_says_that_it_is_typed() -> None:
    assert Path(transplant_hf.__file__).with_name("py.typed").is_file()
