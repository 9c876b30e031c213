"""Folders that a stage of the demo makes once: complete and stamped, or made again."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import TransplantError
from ..outputs import some_of
from ..storage import files_in

__all__ = ["STAMP", "Stage", "check_stage", "clear_stage", "is_stage", "run_stage"]

STAMP = "demo_stage.json"
_STAGED = "demo-stage-"


@dataclass(frozen=True)
class Stage:
    """What is known of a finished stage.

    Args:
        name: Name of the stage and of its folder.
        fingerprint: Digest of everything the result depends on.
        seconds: Wall time of making it, in seconds.
        cpu_seconds: Processor time of making it, in seconds, all threads together.
        files: What it wrote, by paths relative to its folder.
        reused: Whether an earlier run made it.
    """

    name: str
    fingerprint: str
    seconds: float
    cpu_seconds: float
    files: tuple[str, ...]
    reused: bool = False


def run_stage(folder: Path, name: str, fingerprint: str, build: Callable[[Path], None], *, in_place: bool) -> Stage:
    """Make a stage's folder, or reuse the one an earlier run finished from the same inputs.

    Args:
        folder: The demo's folder.
        name: Name of the stage and of its folder.
        fingerprint: Digest of everything the result depends on.
        build: Writes the result into the folder it is given.
        in_place: Whether `build` is given the final folder, because it writes that whole or not at all
            itself; else it is given a temporary one, which is renamed when it is done.

    Returns:
        The stage.

    Raises:
        TransplantError: The folder exists, but the demo did not make it.
    """
    target = folder / name
    finished = _read_stamp(target)
    if finished is not None and finished.fingerprint == fingerprint:
        return finished
    clear_stage(folder, name)
    folder.mkdir(parents=True, exist_ok=True)
    wall, cpu = time.perf_counter(), time.process_time()

    def stamp(place: Path) -> Stage:
        files = tuple(sorted(files_in(place)))
        stage = Stage(name, fingerprint, time.perf_counter() - wall, time.process_time() - cpu, files)
        content = {key: value for key, value in asdict(stage).items() if key != "reused"}
        (place / STAMP).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        return stage

    if in_place:
        build(target)
        return stamp(target)
    with tempfile.TemporaryDirectory(prefix=f".{_STAGED}{name}-", dir=folder, ignore_cleanup_errors=True) as temporary:
        place = Path(temporary, name)
        place.mkdir()
        build(place)
        stage = stamp(place)
        os.replace(place, target)
    return stage


def clear_stage(folder: Path, name: str) -> None:
    """Delete a stage's folder, if the demo made it.

    Args:
        folder: The demo's folder.
        name: Name of the stage.

    Raises:
        TransplantError: The folder exists, but the demo did not make it.
    """
    check_stage(folder, name)
    target = folder / name
    others = files_in(target) - set(_written(target))
    if others:
        raise TransplantError(
            f"{target} would be made again, and holds {some_of(others)}, which the demo did not write. Move them "
            "away, or choose another folder for the demo."
        )
    if target.exists():
        shutil.rmtree(target)


def check_stage(folder: Path, name: str) -> None:
    """Refuse a folder that would be in the way of a stage.

    Args:
        folder: The demo's folder.
        name: Name of the stage.

    Raises:
        TransplantError: The folder exists, but the demo did not make it.
    """
    target = folder / name
    if target.exists() and _read_stamp(target) is None:
        raise TransplantError(
            f"{target} exists, but is no finished folder of the demo; it is left alone. "
            "Move it away, or choose another folder for the demo."
        )


def is_stage(path: Path) -> bool:
    """Whether something in the demo's folder is the demo's: a finished stage, or what is left of a killed one."""
    return _read_stamp(path) is not None or path.name.startswith(f".{_STAGED}")


def _written(target: Path) -> tuple[str, ...]:
    stage = _read_stamp(target)
    return (STAMP, *stage.files) if stage is not None else ()


def _read_stamp(target: Path) -> Stage | None:
    """The stamp of a finished stage; None where there is none or it cannot be read."""
    try:
        content = json.loads((target / STAMP).read_text(encoding="utf-8"))
        return Stage(
            name=str(content["name"]),
            fingerprint=str(content["fingerprint"]),
            seconds=float(content["seconds"]),
            cpu_seconds=float(content["cpu_seconds"]),
            files=tuple(map(str, content["files"])),
            reused=True,
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
