"""`transplant-hf demo`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .command import command, show
from .options import add_overwrite


def add(commands: Any) -> None:
    """Add the command."""
    parser = command(
        commands, "demo", _run, "train a small recipient and a donor, and compare text with and without it", "demo"
    )
    folder = Path("transplant-demo")
    parser.add_argument("--folder", type=Path, default=folder, help=f"folder for the models (default: {folder})")
    add_overwrite(parser)
    parser.add_argument("--fresh", action="store_true", help="train again, even if the folder has trained models")


def _run(options: argparse.Namespace) -> int:
    from ..demo import run_demo

    show(run_demo(options.folder, fresh=options.fresh, overwrite=options.overwrite), options)
    return 0
