"""`transplant-hf check`."""

from __future__ import annotations

import argparse
from typing import Any

from .command import command, old_spelling, show
from .options import DONOR, add_trust
from .values import donor_spec


def add(commands: Any) -> None:
    """Add the command."""
    parser = command(
        commands,
        "check",
        _run,
        "say whether a donor fits a recipient, without reading weights",
        "check openai-community/gpt2 user/gpt2-law@1",
    )
    parser.add_argument("recipient", metavar="RECIPIENT", help="Hub id or folder")
    parser.add_argument(
        "donor",
        metavar=DONOR,
        help="Hub id or folder of a donor, and how many recipient layers run before it (default: its recommendation)",
    )
    old_spelling(parser, "--position", "DONOR@POSITION", "position", type=int)
    add_trust(parser)
    parser.set_defaults(position=None)


def _run(options: argparse.Namespace) -> int:
    from .. import check

    spec = donor_spec(options.donor)
    if options.position is not None and spec.position is not None:
        options.usage_error("the position is given twice, by DONOR@POSITION and by --position")
    report = check(
        options.recipient,
        spec.donor,
        spec.position if options.position is None else options.position,
        trust_remote_code=options.trust_remote_code,
    )
    show(report, options)
    return 0 if report else 1
