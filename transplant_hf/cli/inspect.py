"""`transplant-hf inspect`."""

from __future__ import annotations

import argparse
from typing import Any

from .command import command, old_spelling, show
from .values import donor_spec


def add(commands: Any) -> None:
    """Add the command."""
    parser = command(
        commands,
        "inspect",
        _run,
        "describe a donor, a transplant, a model or a .pt file, from headers only",
        "inspect user/gpt2-law@4 --recipient openai-community/gpt2",
    )
    parser.add_argument(
        "what",
        metavar="WHAT[@POSITION]",
        help="Hub id, folder or .pt file; the position is for --recipient (default: the recommended one)",
    )
    parser.add_argument("--recipient", help="also say whether it fits this model: Hub id or folder")
    parser.add_argument("--revision", help="branch, tag or commit of the repository")
    old_spelling(parser, "--position", "WHAT@POSITION", "position", type=int)
    parser.add_argument(
        "--verify", action="store_true", help="compare the sha256 of local weight files with the record"
    )
    parser.set_defaults(position=None)


def _run(options: argparse.Namespace) -> int:
    from .. import inspect

    spec = donor_spec(options.what)
    found = inspect(
        spec.donor,
        recipient=options.recipient,
        position=spec.position if options.position is None else options.position,
        verify=options.verify,
        revision=options.revision,
    )
    show(found, options)
    return 0 if found else 1
