"""`transplant-hf convert`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .command import command, old_spelling, show
from .options import add_layers, add_number, add_output, add_shard_size, arguments_for, check_output
from .values import whole


def add(commands: Any) -> None:
    """Add the command."""
    parser = command(
        commands,
        "convert",
        _run,
        "convert a .pt file of decoder layers into a donor, without running code from the file",
        "convert gpt2/donor_layers.pt gpt2-law --recipient openai-community/gpt2 --layers 4-6 --position 1",
        check=check_output,
    )
    parser.add_argument("path", metavar="FILE", type=Path, help="the .pt file")
    add_output(parser)
    parser.add_argument("--to-revision", metavar="BRANCH", help="branch to push to")
    old_spelling(parser, "--revision", "--to-revision", "to_revision")
    parser.add_argument("--recipient", required=True, help="model of the layers: Hub id, folder or config.json")
    parser.add_argument("--recipient-revision", metavar="REVISION", help="branch, tag or commit of the recipient")
    parser.add_argument(
        "--metadata",
        type=Path,
        metavar="FILE",
        help="JSON file of the author (default: donor_metadata.json beside FILE)",
    )
    add_layers(parser, "--layers", "numbers of the layers in their model, such as 4 5 6 or 4-6 (default: as recorded)")
    recommended = "position to recommend (default: the best one that is recorded, or a quarter of the way up)"
    add_number(parser, "--position", recommended, None, whole(0), "P")
    parser.add_argument("--name", help="name of the donor (default: the name of the output)")
    add_shard_size(parser)
    parser.add_argument("--verify", action="store_true", help="also compare the outputs of a layer with both weights")


def _run(options: argparse.Namespace) -> int:
    from .. import convert

    show(convert(**arguments_for(convert, options), revision=options.to_revision), options)
    return 0
