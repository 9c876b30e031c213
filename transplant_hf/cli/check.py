"""`transplant-hf check`."""

from __future__ import annotations

import argparse
from typing import Any

from .command import command, show

__all__ = ["add"]


def add(commands: Any) -> None:
    """Add the command."""
    check = command(
        commands,
        "check",
        _run,
        "say whether a donor fits a recipient, without reading weights",
        "check openai-community/gpt2 user/gpt2-law --position 1",
    )
    check.add_argument("recipient", help="Hub id or folder")
    check.add_argument("donor", help="Hub id or folder")
    check.add_argument("--position", type=int, help="recipient layers that run before it; the donor's own by default")
    check.add_argument("--trust-remote-code", action="store_true", help="run the recipient's own modelling code")


def _run(options: argparse.Namespace) -> int:
    from ..model.auto import check_compatibility

    report = check_compatibility(
        options.recipient,
        options.donor,
        options.position,
        trust_remote_code=options.trust_remote_code or None,
    )
    show(report, options)
    return 0 if report else 1
