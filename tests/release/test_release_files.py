"""The checks of what would be released see what they are for; and the tree itself passes those that need no build."""

from __future__ import annotations

import importlib.util
import re
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

import transplant_hf

ROOT = Path(__file__).resolve().parents[2]
DATED = "# Changelog\n\n## [Unreleased]\n\n## [1.2.3] - 2026-01-31\n"


@pytest.fixture(scope="module")
def checks() -> Any:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("release_files", ROOT / ".ci" / "release_files.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def package(tmp_path: Path, checks: Any) -> Path:
    """A package of version 1.2.3 with all that must be in a wheel."""
    folder = tmp_path / "tree" / "transplant_hf"
    for name in (*checks.NEEDED, "room/__init__.py"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (folder / "__init__.py").write_text('__version__ = "1.2.3"\n')
    return folder


def built(package: Path, name: str, without: str = "", **more: str) -> Path:
    """Zip a package as a wheel does."""
    wheel = package.parent.parent / name
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in sorted(package.rglob("*")):
            inside = path.relative_to(package.parent).as_posix()
            if path.is_file() and inside != without:
                archive.write(path, inside)
        archive.writestr("transplant_hf-1.2.3.dist-info/METADATA", "Metadata-Version: 2.4\nVersion: 1.2.3\n")
        for inside, text in more.items():
            archive.writestr(inside, text)
    return wheel


def test_a_whole_wheel(checks: Any, package: Path) -> None:
    wheel = built(package, "a.whl")
    assert checks.wheel_problems(wheel, package) == []
    assert checks.wheel_metadata(wheel)["Version"] == "1.2.3"
    assert checks.difference_problems(wheel, built(package, "b.whl")) == []


@pytest.mark.parametrize("missing", ["py.typed", "cards/templates/donor.md", "room/__init__.py"])
def test_a_file_that_did_not_come_along(checks: Any, package: Path, missing: str) -> None:
    wheel = built(package, "a.whl", without=f"transplant_hf/{missing}")
    assert checks.wheel_problems(wheel, package) == [f"a.whl lacks transplant_hf/{missing}"]


def test_a_file_that_does_not_belong(checks: Any, package: Path) -> None:
    wheel = built(package, "a.whl", **{"tests/helpers.py": ""})
    assert checks.wheel_problems(wheel, package) == ["a.whl has tests/helpers.py, which is not of the package"]


def test_wheels_that_differ(checks: Any, package: Path) -> None:
    one = built(package, "a.whl")
    (package / "room" / "__init__.py").write_text("changed")
    (found,) = checks.difference_problems(one, built(package, "b.whl"))
    assert found.startswith("transplant_hf/room/__init__.py is not the same")


def test_an_sdist_that_lacks_a_file(checks: Any, tmp_path: Path) -> None:
    (tmp_path / "LICENSE").write_text("")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "LICENSE", "transplant_hf-1.2.3/LICENSE")
    found = checks.sdist_problems(tmp_path / "a.tar.gz", ("LICENSE", "README.md"))
    assert found == ["a.tar.gz lacks README.md"]


@pytest.mark.parametrize(
    ("version", "changelog", "tag", "problem"),
    [
        ("1.2.3", DATED, "v1.2.3", None),
        ("1.2.3", DATED, "", None),
        ("1.2.3", "## [Unreleased]\n", "", None),
        ("1.2.4", DATED, "", "__version__ is 1.2.3, the archives say 1.2.4"),
        ("1.2.3", "# Changelog\n", "", "has neither [Unreleased] nor [1.2.3]"),
        ("1.2.3", DATED, "v1.2.4", "the tag must be v1.2.3"),
        ("1.2.3", DATED, "1.2.3", "the tag must be v1.2.3"),
        ("1.2.3", "## [Unreleased]\n", "v1.2.3", "has no section [1.2.3]"),
        ("1.2.3", "## [1.2.3]\n", "v1.2.3", "has no date"),
    ],
)
def test_versions(checks: Any, package: Path, version: str, changelog: str, tag: str, problem: str | None) -> None:
    found = checks.version_problems(version, package, changelog, tag)
    if problem is None:
        assert found == []
    else:
        assert len(found) == 1
        assert problem in found[0]


def test_this_tree_could_be_built(checks: Any) -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert checks.version_problems(transplant_hf.__version__, ROOT / "transplant_hf", changelog, "") == []
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for name in checks.NEEDED:
        forced = re.search(rf'= "transplant_hf/{re.escape(name)}"', pyproject)
        assert forced or (ROOT / "transplant_hf" / name).is_file(), name
