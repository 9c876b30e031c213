"""`transplant-hf check`."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from .command import command, show
from .donors import DONOR, DONOR_HELP, donor_spec

__all__ = ["add"]


def add(commands: Any) -> None:
    """Add the command."""
    check = command(
        commands,
        "check",
        _run,
        "say whether a donor fits a recipient, without reading weights",
        "check openai-community/gpt2 user/gpt2-law@1",
    )
    check.add_argument("recipient", help="Hub id or folder")
    check.add_argument("donor", metavar=DONOR, help=DONOR_HELP)
    check.add_argument("--position", type=int, metavar="P", help="the same as DONOR@P")
    check.add_argument("--trust-remote-code", action="store_true", help="run the recipient's own modelling code")


def _run(options: argparse.Namespace) -> int:
    from ..model.auto import check_compatibility

    spec = donor_spec(options.donor)
    if options.position is not None and spec.position is not None:
        print("transplant-hf check: give the position once, as DONOR@P or as --position P", file=sys.stderr)
        return 2
    report = check_compatibility(
        options.recipient,
        spec.donor,
        spec.position if options.position is None else options.position,
        trust_remote_code=options.trust_remote_code or None,
    )
    show(report, options)
    return 0 if report else 1
