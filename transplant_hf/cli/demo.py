"""`transplant-hf demo`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .command import add_overwrite, command, printing

__all__ = ["add"]


def add(commands: Any) -> None:
    """Add the command."""
    demo = command(commands, "demo", _run, "train a small recipient and a donor, transplant, compare", "demo")
    demo.add_argument("--folder", type=Path, default=Path("transplant-demo"), help="where to keep everything")
    add_overwrite(demo)
    demo.add_argument("--fresh", action="store_true", help="train again instead of using what is there")


def _run(options: argparse.Namespace) -> int:
    from ..demo import run_demo

    report = run_demo(options.folder, fresh=options.fresh, overwrite=options.overwrite)
    with printing(options):
        print(json.dumps(report.to_dict(), indent=2) if options.json else report)
    return 0
