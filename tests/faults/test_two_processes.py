"""Two processes that write into one folder at the same time."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.looping import ACTIONS, start
from tests.helpers import copied, digest_of
from transplant_hf import AutoModelWithTransplant, Donor


def run_both(action: str, family: Path, target: str, environment: dict[str, str] | None = None) -> list[int]:
    """Start two processes, let go of them at once, and return how they ended."""
    processes = [start("repeat", action, family, target, environment) for _ in range(2)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        process.communicate(timeout=300)
    return [process.returncode for process in processes]


@pytest.mark.slow
@pytest.mark.parametrize("action", ["convert", "save"])
def test_into_one_folder(tiny_gpt2: Path, tmp_path: Path, action: str) -> None:
    """Each writes the same two artefacts six times; what stays is the one that both wrote last, whole."""
    family, target = copied(tiny_gpt2, tmp_path / "family"), tmp_path / "place" / "model"
    alone = tmp_path / "alone" / "model"
    for step in ACTIONS[action](family, str(alone)):
        step()
    assert run_both(action, family, str(target)) == [0, 0]
    assert digest_of(target) == digest_of(alone)
    assert [path.name for path in target.parent.iterdir()] == ["model"]
    if action == "convert":
        Donor.from_pretrained(target).verify()
        assert len(AutoModelWithTransplant.from_pretrained(target).layer_map) == 6
