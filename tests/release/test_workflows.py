"""The workflow files agree with what pyproject.toml promises, and name only what is there."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
CONSTRAINTS = (ROOT / "constraints.txt").read_text(encoding="utf-8")
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def workflow(name: str) -> dict[Any, Any]:
    found = yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    found["on"] = found.pop(True)  # YAML 1.1 reads `on` so
    return found


def jobs(name: str) -> dict[str, Any]:
    return dict(workflow(name)["jobs"])


def commands(name: str) -> list[str]:
    return [step["run"] for job in jobs(name).values() for step in job["steps"] if "run" in step]


def pins() -> Any:
    spec = importlib.util.spec_from_file_location("pins", ROOT / ".ci" / "pins.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def promised_pythons() -> list[str]:
    return re.findall(r"Programming Language :: Python :: (\d\.\d+)", PYPROJECT)


def tested_pairs() -> set[tuple[str, str]]:
    matrix = jobs("ci.yml")["test"]["strategy"]["matrix"]
    pairs = {(python, versions) for python in matrix["python"] for versions in matrix["versions"]}
    pairs -= {(pair["python"], pair["versions"]) for pair in matrix["exclude"]}
    return pairs | {(pair["python"], pair["versions"]) for pair in matrix["include"]}


def test_every_promised_python_is_tested() -> None:
    lowest = re.search(r'requires-python = ">=(\d\.\d+)"', PYPROJECT)
    assert lowest is not None and lowest[1] == promised_pythons()[0]
    matrix = jobs("ci.yml")["test"]["strategy"]["matrix"]
    assert matrix["python"] == promised_pythons()
    assert all(isinstance(python, str) for python in matrix["python"]), "3.10 without quotes is 3.1"


def test_every_python_runs_with_the_floor_and_with_what_is_newest_for_it() -> None:
    pairs = tested_pairs()
    for python in promised_pythons():
        assert (python, "floor") in pairs
        assert {(python, "tested"), (python, "newest")} & pairs, python


def test_the_floor_is_that_of_pyproject() -> None:
    lines = pins().pins("floor", PYPROJECT, CONSTRAINTS)
    for name in ("transformers", "torch", "huggingface_hub", "safetensors", "accelerate"):
        floor = re.search(rf'^  "{name}>=([\d.]+)"', PYPROJECT, re.M)
        assert floor is not None
        assert f"{name}=={floor[1]}.*" in lines
    assert len(lines) == 5


def test_what_is_tested_is_that_of_constraints() -> None:
    lines = pins().pins("tested", PYPROJECT, CONSTRAINTS)
    assert len(lines) == 5
    assert set(lines) <= set(CONSTRAINTS.splitlines())
    assert pins().pins("newest", PYPROJECT, CONSTRAINTS) == []
    version = tuple(int(part) for part in re.findall(r"^transformers==([\d.]+)$", CONSTRAINTS, re.M)[0].split("."))
    assert version >= tuple(int(part) for part in pins().floors(PYPROJECT)["transformers"].split("."))


def test_the_main_of_transformers_is_watched_and_stops_nothing() -> None:
    job = jobs("ci.yml")["main"]
    assert job["continue-on-error"] is True
    for name in ("main", "slow"):
        assert "schedule" in jobs("ci.yml")[name]["if"]
    assert workflow("ci.yml")["on"]["schedule"]
    ran = "\n".join(step.get("run", "") for step in job["steps"])
    assert ran.index("-e '.[dev]'") < ran.index("git+"), "else the install of the package puts a release in its place"
    assert "tests/test_private_names.py" in ran


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_what_the_steps_name_is_there(path: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    for command in commands(path.name):
        for target in re.findall(r"\bmake ([\w-]+)", command):
            assert target in targets, command
        for file in re.findall(r"(?<![\w./])(?:\.ci|tests)/[\w./-]+", command):
            assert (ROOT / file).exists(), command
        for script in re.findall(r"^\.ci/[\w-]+", command):
            assert os.access(ROOT / script, os.X_OK), f"{script} cannot be run"
        for extra in re.findall(r"\.\[(\w+)\]", command):
            assert re.search(rf"^{extra} = \[", PYPROJECT, re.M), f"pyproject.toml has no extra {extra!r}: {command}"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_no_step_has_more_rights_or_time_than_it_needs(path: Path) -> None:
    assert workflow(path.name)["permissions"] == {"contents": "read"}
    for name, job in jobs(path.name).items():
        assert job["timeout-minutes"] <= 360, name
        allowed = {"id-token": "write"} if (path.name, name) == ("release.yml", "publish") else None
        assert job.get("permissions") == allowed, name
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step), name
            assert "@" in step.get("uses", "@"), f"{name}: {step['uses']} names no version"


def test_a_release_is_made_by_a_tag_from_what_was_tested() -> None:
    assert workflow("release.yml")["on"] == {"push": {"tags": ["v*"]}}
    build, publish = jobs("release.yml")["build"], jobs("release.yml")["publish"]
    assert any(step.get("run") == '.ci/release "$GITHUB_REF_NAME"' for step in build["steps"])
    assert publish["needs"] == "build" and publish["environment"] == "pypi"
    assert not any("run" in step for step in publish["steps"]), "what can publish runs nothing of ours"
    handed = [step["with"] for job in (build, publish) for step in job["steps"] if "artifact" in step.get("uses", "")]
    assert [(step["name"], step["path"]) for step in handed] == [("dist", "dist/")] * 2
