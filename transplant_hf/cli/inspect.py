"""`transplant-hf inspect`."""

from __future__ import annotations

import argparse
from typing import Any

from .command import command, show

__all__ = ["add"]


def add(commands: Any) -> None:
    """Add the command."""
    inspect = command(
        commands,
        "inspect",
        _run,
        "say what a donor, transplant, model or .pt file is, from headers alone",
        "inspect user/gpt2-law --recipient openai-community/gpt2",
    )
    inspect.add_argument("what", metavar="WHAT", help="Hub id, folder or .pt file")
    inspect.add_argument("--recipient", help="also say whether it fits this model: Hub id or folder")
    inspect.add_argument("--revision", help="branch, tag or commit of WHAT")
    inspect.add_argument("--position", type=int, help="where it would go (default: where it is recommended or placed)")
    inspect.add_argument("--verify", action="store_true", help="hash the weight files that are on this machine")


def _run(options: argparse.Namespace) -> int:
    from ..inspection import inspect

    found = inspect(
        options.what,
        recipient=options.recipient,
        position=options.position,
        verify=options.verify,
        revision=options.revision,
    )
    show(found, options)
    return 0 if found else 1
