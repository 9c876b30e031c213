"""`transplant-hf sweep`."""

from __future__ import annotations

import argparse
from typing import Any

from .command import command, show
from .options import DONOR, add_measuring, add_number, measuring_arguments, text_source
from .values import donor_spec, whole


def add(commands: Any) -> None:
    """Add the command."""
    parser = command(
        commands,
        "sweep",
        _run,
        "measure the perplexity of donors, one at a time, at every position",
        "sweep openai-community/gpt2 user/gpt2-law user/gpt2-code@4 --text cases.jsonl --strengths 1 0.5",
    )
    parser.add_argument(
        "recipient", metavar="MODEL", help="Hub id or folder of the recipient, or of a transplant or donor"
    )
    parser.add_argument(
        "donors",
        nargs="*",
        metavar=DONOR,
        help="Hub ids or folders; with @POSITION, measured only there (default: the donors of MODEL)",
    )
    add_number(parser, "--positions", "positions to measure (default: all)", None, whole(0), "P", nargs="+")
    how = "add the donor's layers, or replace as many (default: insert)"
    parser.add_argument("--mode", choices=("insert", "replace"), help=how)
    add_measuring(parser, strengths="strengths to measure (default: 1)", plot="plot perplexity against position")


def _run(options: argparse.Namespace) -> int:
    from .. import sweep
    from ..plots import check_picture, plot_sweep

    if options.plot is not None:
        check_picture(options.plot, options.overwrite)
    donors = {spec.donor: spec.position for spec in map(donor_spec, options.donors)}
    if len(donors) < len(options.donors):
        options.usage_error("a donor is given twice; give it once, with --positions")
    report = sweep(
        options.recipient,
        donors or None,
        text_source(options.text, options),
        options.positions,
        options.strengths,
        mode=options.mode,
        **measuring_arguments(options),
    )
    show(report, options)
    if options.plot is not None:
        plot_sweep(report, options.plot, options.overwrite)
    return 0 if report.best else 1
