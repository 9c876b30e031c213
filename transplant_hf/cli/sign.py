"""`transplant-hf sign`."""

from __future__ import annotations

import argparse
from typing import Any

from .command import command, show
from .options import TEXT_HELP, add_loading, add_number, add_text, loading_arguments, text_source
from .values import whole


def add(commands: Any) -> None:
    """Add the command."""
    parser = command(
        commands,
        "sign",
        _run,
        "record what the text of a donor's domain looks like, so that donors can choose themselves",
        "sign gpt2-law --text cases.jsonl --general wikitext.txt",
    )
    parser.add_argument("folder", metavar="DONOR", help="folder of the donor, whose record is changed")
    parser.add_argument("--text", required=True, metavar="TEXT", help=f"text of the donor's domain: {TEXT_HELP}")
    parser.add_argument("--general", required=True, metavar="TEXT", help="general text, in the same forms")
    parser.add_argument("--recipient", help="Hub id or folder (default: the donor's recipient)")
    first = "how many recipient layers run before the first donor (default: the donor's own position)"
    add_number(parser, "--position", first, None, whole(0), "P")
    add_number(parser, "--max-rows", "rows of 32 tokens to use of each text", 512)
    add_number(parser, "--batch-size", "rows in a batch", 16)
    add_text(parser, block_length=False)
    add_loading(parser)


def _run(options: argparse.Namespace) -> int:
    from .. import sign

    report = sign(
        options.folder,
        text_source(options.text, options),
        text_source(options.general, options),
        position=options.position,
        recipient=options.recipient,
        max_rows=options.max_rows,
        batch_size=options.batch_size,
        **loading_arguments(options),
    )
    show(report, options)
    return 0
