"""What the built archives must hold, and agree in: files, version, tag and changelog."""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Without these an installed package works, and then it does not: they are read when they are needed.
NEEDED = ("py.typed", "cards/templates/donor.md", "cards/templates/full_export.md", "__main__.py")


def wheel_files(path: Path) -> dict[str, str]:
    """Return sha256 of every file of a wheel."""
    with zipfile.ZipFile(path) as wheel:
        return {name: hashlib.sha256(wheel.read(name)).hexdigest() for name in wheel.namelist()}


def wheel_metadata(path: Path) -> dict[str, str]:
    """Return the fields of a wheel's metadata that occur once."""
    with zipfile.ZipFile(path) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        return dict(message_from_bytes(wheel.read(name)).items())


def wheel_problems(wheel: Path, package: Path) -> list[str]:
    """Say what a wheel lacks of the package, and what it has beside it.

    Args:
        wheel: The wheel.
        package: The package's folder in the tree.
    """
    files = wheel_files(wheel)
    wanted = {path.relative_to(package.parent).as_posix() for path in package.rglob("*.py")}
    wanted |= {f"{package.name}/{name}" for name in NEEDED}
    problems = [f"{wheel.name} lacks {name}" for name in sorted(wanted - set(files))]
    others = [name for name in files if not name.startswith(f"{package.name}/") and ".dist-info/" not in name]
    return problems + [f"{wheel.name} has {name}, which is not of the package" for name in sorted(others)]


def difference_problems(one: Path, other: Path) -> list[str]:
    """Say in which files two wheels differ."""
    a, b = wheel_files(one), wheel_files(other)
    names = sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
    return [f"{name} is not the same in the wheel from the sdist and in that from the tree" for name in names]


def version_problems(version: str, package: Path, changelog: str, tag: str) -> list[str]:
    """Say where versions disagree.

    Args:
        version: The archives' version.
        package: The package's folder.
        changelog: The text of the changelog.
        tag: The tag of the release; empty when none is made.
    """
    problems = []
    written = re.search(r'^__version__ = "(.+)"$', (package / "__init__.py").read_text(encoding="utf-8"), re.M)
    if written is None or written[1] != version:
        problems.append(f"{package.name}.__version__ is {written and written[1]}, the archives say {version}")
    sections = re.findall(r"^## \[(.+?)\]", changelog, re.M)
    if not tag:
        if not {"Unreleased", version} & set(sections):
            problems.append(f"CHANGELOG.md has neither [Unreleased] nor [{version}]")
        return problems
    if tag != f"v{version}":
        problems.append(f"the tag is {tag}, the version is {version}: the tag must be v{version}")
    if version not in sections:
        problems.append(f"CHANGELOG.md has no section [{version}]: rename [Unreleased], with today's date")
    elif not re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", changelog, re.M):
        problems.append(f"CHANGELOG.md's section [{version}] has no date: '## [{version}] - YYYY-MM-DD'")
    return problems


def sdist_problems(sdist: Path, needed: tuple[str, ...]) -> list[str]:
    """Say what an sdist lacks."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    return [f"{sdist.name} lacks {name}" for name in needed if name not in names]


def main() -> int:
    """Check what the command line names; print what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dist", type=Path, required=True, help="folder of the sdist, and of the wheel made from it")
    parser.add_argument("--tree", type=Path, required=True, help="folder of the wheel that was made from the tree")
    parser.add_argument("--tag", default="", help="the release's tag")
    args = parser.parse_args()
    (wheel,), (sdist,), (direct,) = (
        list(folder.glob(kind))
        for folder, kind in ((args.dist, "*.whl"), (args.dist, "*.tar.gz"), (args.tree, "*.whl"))
    )
    version, package = wheel_metadata(wheel)["Version"], ROOT / "transplant_hf"
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    problems = [
        *wheel_problems(wheel, package),
        *difference_problems(wheel, direct),
        *sdist_problems(sdist, ("LICENSE", "README.md", "CHANGELOG.md", "constraints.txt", "tests/helpers.py")),
        *version_problems(version, package, changelog, args.tag),
    ]
    print("\n".join(problems) or f"{wheel.name}: {len(wheel_files(wheel))} files, the same from the sdist and the tree")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
