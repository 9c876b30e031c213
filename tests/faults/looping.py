"""Processes that convert, save or push two artefacts in turn, over and over, to be killed or to run side by side."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from tests.helpers import DONOR_LAYERS, layers_of, loaded, plain
from transplant_hf.conversion import convert
from transplant_hf.donor.saved_files import replaced_among
from transplant_hf.hub import push_folder

__all__ = ["ACTIONS", "POSITIONS", "Loop", "start", "work"]

POSITIONS = (1, 3)
ROOT = Path(__file__).parents[2]


def pt_file(family: Path) -> Path:
    """Two layers of a family's source model as a list of state dicts."""
    path = family / "layers.pt"
    if not path.exists():
        layers = layers_of(plain(family / "source"))
        torch.save([layers[number].state_dict() for number in DONOR_LAYERS], path)
    return path


def converting(family: Path, target: str) -> list[Callable[[], Any]]:
    """Conversions that differ in everything but the tensors' shapes."""
    path = pt_file(family)
    return [
        lambda position=position: convert(  # type: ignore[misc]
            path,
            family / "recipient",
            target,
            overwrite=True,
            layers=list(DONOR_LAYERS),
            position=position,
            name=f"at-{position}",
        )
        for position in POSITIONS
    ]


def saving(family: Path, target: str) -> list[Callable[[], Any]]:
    """A full save and a thin one: no file but the configuration is in both."""
    models = [loaded(family, position) for position in POSITIONS]
    return [
        lambda model=model, thin=thin: model.save_pretrained(target, thin=thin)  # type: ignore[misc]
        for model, thin in zip(models, (True, False), strict=True)
    ]


def pushing(family: Path, target: str) -> list[Callable[[], Any]]:
    """The same two as folders, pushed to the repository of that name."""
    folders = [family / f"pushed-{position}" for position in POSITIONS]
    for folder, save in zip(folders, (saving(family, str(folder)) for folder in folders), strict=True):
        if not folder.exists():
            save[folders.index(folder)]()
    return [
        lambda folder=folder: push_folder(folder, target, commit_message="again", replaced=replaced_among)  # type: ignore[misc]
        for folder in folders
    ]


def writing(family: Path, target: str) -> list[Callable[[], Any]]:
    """Conversions and saves into one folder."""
    return converting(family, target) + saving(family, target)


ACTIONS = {"convert": converting, "save": saving, "write": writing, "push": pushing}


class Loop:
    """A process that starts children on request, each of which repeats an action until it is killed."""

    def __init__(self, action: str, family: Path, target: str, environment: Mapping[str, str] | None = None) -> None:
        self._process = start("serve", action, family, target, environment)
        assert self._said() == "ready"

    def run_and_kill(self, after: float, wait: Callable[[float], None]) -> None:
        """Let a child run for some seconds, then kill it as the system would."""
        child = self._told("next")
        wait(after)
        os.kill(int(child), signal.SIGKILL)
        assert self._said() == f"killed {signal.SIGKILL}"

    def once(self, number: int) -> None:
        """Do one of the two to its end."""
        assert self._told(str(number)) == "done"

    def close(self) -> None:
        """End the process."""
        self._process.communicate()
        assert self._process.returncode == 0

    def _told(self, line: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        return self._said()

    def _said(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def start(
    kind: str, action: str, family: Path, target: str, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start `work` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", "from tests.faults.looping import work; work()", kind, action, str(family), target],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environment or {}), "PYTHONPATH": str(ROOT)},
    )


def work() -> None:
    """What such a process does: `serve` forks children to be killed, `repeat` does both things some times."""
    kind, action, family, target = sys.argv[1:]
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    steps = ACTIONS[action](Path(family), target)
    print("ready", flush=True)
    if kind == "repeat":
        sys.stdin.readline()
        for _ in range(6):
            for step in steps:
                step()
        return
    for line in sys.stdin:
        if line.strip().isdigit():
            steps[int(line)]()
            print("done", flush=True)
            continue
        child = os.fork()
        if child == 0:
            while True:
                for step in steps:
                    step()
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(f"killed {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"ended {status}", flush=True)
