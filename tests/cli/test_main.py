"""The command itself: what it answers without a command to run, and what that costs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from transplant_hf.cli import main

_COMMANDS = ("convert", "inspect", "check", "plan", "extract", "train", "recover", "sweep", "evaluate", "push")
_SCRIPT = """
import sys
from transplant_hf.cli import main

try:
    status = main()
except SystemExit as exit:
    status = exit.code
print("status", status, "imported", *sorted({"torch", "transformers"} & set(sys.modules)), file=sys.stderr)
if "transformers" in sys.modules:
    from transformers import AutoConfig

    print(AutoConfig.for_model("transplant", recipient="a/b").recipient, file=sys.stderr)
sys.exit(status)
"""


def run(*words: str | Path) -> tuple[str, str]:
    return run_process(*words)[1:]


def run_process(*words: str | Path, stdout: Any = subprocess.PIPE) -> tuple[int, str, str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(
        command, env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=300, check=False
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["--version"], 0),
        (["--help"], 0),
        (["check", "--help"], 0),
        ([], 2),
        (["check", "a"], 2),
        (["chekc"], 2),
        (["train", "a", "b"], 2),
        (["extract", "a"], 2),
        (["evaluate", "a", "--text", "b", "--plot", "c.png"], 2),
    ],
)
def test_what_needs_no_model_imports_neither_transformers_nor_torch(
    words: list[str], status: int, tmp_path: Path
) -> None:
    script = tmp_path / "transplant-hf"
    script.write_text(_SCRIPT)
    _, err = run(script, *words)
    assert err.splitlines()[-1] == f"status {status} imported"
    _, err = run("-X", "importtime", "-m", "transplant_hf", *words)
    imported = set(re.findall(r"\| +([\w.]+)$", err, re.MULTILINE))
    assert "transplant_hf.cli" in imported
    assert not imported & {"torch", "transformers"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_command_registers_transplants_and_says_when_its_output_cannot_be_written(
    tiny_gpt2: Path, tmp_path: Path
) -> None:
    script = tmp_path / "transplant-hf"
    script.write_text(_SCRIPT)
    with Path("/dev/full").open("w") as full:
        status, _, err = run_process(script, "check", tiny_gpt2 / "recipient", tiny_gpt2 / "donor", stdout=full)
    assert status == 1
    *_, sentence, imported, recipient = err.splitlines()
    assert sentence.startswith("transplant-hf: cannot write the result on standard output")
    assert (imported, recipient) == ("status 1 imported torch transformers", "a/b")
    assert "Traceback" not in err and "Exception ignored" not in err


def test_alone_it_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    listed = capsys.readouterr().out.splitlines()
    assert all(any(re.match(rf"    {name} +\w", line) for line in listed) for name in _COMMANDS)
