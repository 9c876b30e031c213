"""Killed at any moment: what was there, or all of what was to be there, and no litter after the next time."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.looping import POSITIONS, Loop
from tests.helpers import NUM_LAYERS, copied, digest_of, plain
from tests.hub_server import ALICE, HubServer
from transplant_hf import AutoModelWithTransplant, Donor

# A few in a usual run, fifty in all in a long one.
TIMES = [
    pytest.param({"write": 4, "push": 2}, id="6"),
    pytest.param({"write": 34, "push": 16}, id="50", marks=pytest.mark.slow),
]
# How long one turn of all artefacts takes at most, so that the moments fall anywhere in it.
LONGEST = {"write": 0.8, "push": 0.5}


@pytest.fixture
def family(tiny_gpt2: Path, tmp_path: Path) -> Path:
    """A copy, to put files beside it."""
    return copied(tiny_gpt2, tmp_path / "family")


def loads(folder: Path) -> None:
    """Load what is there, with its checks."""
    if (folder / "donor_config.json").exists():
        Donor.from_pretrained(folder).verify()
        assert len(AutoModelWithTransplant.from_pretrained(folder).layer_map) == NUM_LAYERS + 2
    else:
        assert plain(folder, output_loading_info=True)[1]["missing_keys"] == set()


def killed_again_and_again(
    loop: Loop, action: str, times: int, look: Callable[[], Any], whole: list[Any], check: Callable[[], None]
) -> None:
    """Kill, look, and count which of the two was found."""
    chance = random.Random(f"{action} {times}")
    for _ in range(times):
        loop.run_and_kill(LONGEST[action] * (0.02 + chance.random()), time.sleep)
        assert look() in whole
        check()


@pytest.mark.parametrize("times", TIMES)
def test_a_folder(family: Path, tmp_path: Path, times: dict[str, int]) -> None:
    """Two conversions, a thin save and a full one, in turn."""
    action, target, whole = "write", tmp_path / "place" / "model", []
    loop = Loop(action, family, str(target))
    for number in range(2 * len(POSITIONS)):
        loop.once(number)
        whole.append(digest_of(target))
    assert all(one != other for one, other in itertools.combinations(whole, 2))
    caught = []

    def check() -> None:
        loads(target)
        caught.append(len(list(target.parent.iterdir())) > 1)

    killed_again_and_again(loop, action, times[action], lambda: digest_of(target), whole, check)
    # Else the moments fell between the writes, and nothing was tried.
    assert sum(caught) > times[action] // 4 or times[action] < 10
    loop.once(0)
    assert digest_of(target) == whole[0]
    assert [path.name for path in target.parent.iterdir()] == ["model"]
    loop.close()


@pytest.mark.slow
@pytest.mark.hub
@pytest.mark.parametrize("times", TIMES)
def test_a_push(hub: HubServer, family: Path, times: dict[str, int]) -> None:
    """The branch is never between the two, and holds a commit for each push that ended, no more."""
    repo, whole = f"alice/killed-{times['push']}", []
    loop = Loop("push", family, repo, {"HF_TOKEN": ALICE})

    def on_main() -> dict[str, bytes]:
        return {path: hub.read(repo, path) for path in hub.paths(repo)}

    for number in range(len(POSITIONS)):
        loop.once(number)
        whole.append(on_main())
    assert "donor.safetensors" in whole[0]
    assert "donor.safetensors" not in whole[1]
    # Each answer a little late, so that a kill falls between any two requests.
    hub.fail("*", "*", delay=0.02, times=None)
    killed_again_and_again(loop, "push", times["push"], on_main, whole, lambda: None)
    hub.clear_faults()
    loop.once(0)
    assert on_main() == whole[0]
    Donor.from_pretrained(repo).verify()
    commits = hub.requests.commits()
    hub.requests.clear()
    loop.once(0)
    assert hub.requests.commits() == hub.requests.uploads() == []
    assert len(commits) >= 2
    loop.close()
