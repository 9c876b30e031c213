"""`transplant-hf extract`."""

from __future__ import annotations

import argparse
from typing import Any

from .command import command, show
from .options import add_choice, add_dtype, add_layers, add_number, add_output, add_trust, arguments_for, check_output
from .values import whole


def add(commands: Any) -> None:
    """Add the command."""
    parser = command(
        commands,
        "extract",
        _run,
        "copy layers out of a model and write them as a donor",
        "extract openai-community/gpt2 gpt2-new --layers 4-6 --init identity",
        check=check_output,
    )
    parser.add_argument("model", metavar="MODEL", help="Hub id or folder of a model, a transplant or a donor")
    add_output(parser)
    which = parser.add_mutually_exclusive_group()
    add_layers(which, "--layers", "consecutive layers, such as 4 5 6 or 4-6 (default: from a third of the way up)")
    add_number(which, "--count", "number of layers", 3, metavar="K")
    add_choice(
        parser,
        "--init",
        ("copy", "identity"),
        "copy the weights, or set the output projections to zero, so that the layers change nothing until they are "
        "trained",
    )
    recommended = "position to recommend (default: right after the layers in their model)"
    add_number(parser, "--position", recommended, None, whole(0), "P")
    parser.add_argument("--name", help="name of the donor (default: the name of the output)")
    parser.add_argument("--revision", help="branch, tag or commit of the model")
    add_dtype(parser)
    add_trust(parser)


def _run(options: argparse.Namespace) -> int:
    from .. import extract

    show(extract(**arguments_for(extract, options)), options)
    return 0
