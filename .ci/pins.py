"""Which versions a run of the workflows installs, as a constraints file on standard output.

`floor` are the lowest that pyproject.toml allows, `tested` those of constraints.txt, and `newest` leaves all open.
constraints.txt as it stands is of one Python; of its lines only those that decide what is tested are taken.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The packages whose versions decide whether we work; all others are the newest that go along with these.
DECISIVE = ("accelerate", "huggingface_hub", "safetensors", "torch", "transformers")


def floors(pyproject: str) -> dict[str, str]:
    """Return the lower bounds of the package's own dependencies.

    Args:
        pyproject: The text of pyproject.toml.
    """
    block = re.search(r"^dependencies = \[\n(.*?)^\]", pyproject, re.M | re.S)
    return dict(re.findall(r'"([\w-]+)>=([\d.]+)"', block[1] if block else ""))


def pins(which: str, pyproject: str, constraints: str) -> list[str]:
    """Return the lines of the constraints file.

    Args:
        which: "floor", "tested" or "newest".
        pyproject: The text of pyproject.toml.
        constraints: The text of constraints.txt.
    """
    if which == "newest":
        return []
    if which == "floor":
        return [f"{name}=={version}.*" for name, version in floors(pyproject).items() if name in DECISIVE]
    found = dict(re.findall(r"^([\w-]+)==(\S+)$", constraints, re.M))
    return [f"{name}=={found[name]}" for name in DECISIVE]


def main() -> None:
    """Print what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("which", choices=["floor", "tested", "newest"])
    which = parser.parse_args().which
    texts = ((ROOT / name).read_text(encoding="utf-8") for name in ("pyproject.toml", "constraints.txt"))
    print("\n".join(pins(which, *texts)))


if __name__ == "__main__":
    main()
