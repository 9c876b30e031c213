"""`transplant-hf convert`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .command import add_overwrite, command, show

__all__ = ["add"]


def add(commands: Any) -> None:
    """Add the command."""
    convert = command(
        commands,
        "convert",
        _run,
        "turn a .pt file of decoder layers into a donor repo; nothing in the file runs",
        "convert gpt2/donor_layers.pt gpt2-law --recipient openai-community/gpt2 --layers 4 5 6 --position 1",
    )
    convert.add_argument("file", type=Path, help="the .pt file")
    convert.add_argument("output", type=Path, nargs="?", help="folder to write; may be left out with --push-to-hub")
    add_overwrite(convert)
    convert.add_argument(
        "--recipient", required=True, help="the model the layers came from: Hub id, folder or config.json"
    )
    convert.add_argument("--recipient-revision", help="its branch, tag or commit")
    convert.add_argument("--metadata", type=Path, help="default: donor_metadata.json beside the file, if there is one")
    convert.add_argument(
        "--layers", type=int, nargs="+", metavar="N", help="layer indices in the source model (default: as recorded)"
    )
    convert.add_argument(
        "--position", type=int, help="recommended position (default: the best one recorded, else the first quarter)"
    )
    convert.add_argument("--name", help="what to call the donor (default: after the output)")
    convert.add_argument("--max-shard-size", default="5GB", help="largest weight file (default: 5GB)")
    convert.add_argument("--verify", action="store_true", help="also run one layer with the weights of both files")
    convert.add_argument("--push-to-hub", metavar="REPO", help="upload the donor to this repository, as one commit")
    convert.add_argument("--private", action="store_true", help="make that repository private if it is new")
    convert.add_argument("--revision", help="the branch to push to")


def _run(options: argparse.Namespace) -> int:
    from ..conversion import convert

    if options.output is None and options.push_to_hub is None:
        print("transplant-hf convert: name a folder to write, or --push-to-hub REPO", file=sys.stderr)
        return 2
    if options.private and options.push_to_hub is None:
        print("transplant-hf convert: --private goes with --push-to-hub", file=sys.stderr)
        return 2
    done = convert(
        options.file,
        options.recipient,
        options.output,
        overwrite=options.overwrite,
        metadata=options.metadata,
        layers=options.layers,
        position=options.position,
        name=options.name,
        recipient_revision=options.recipient_revision,
        max_shard_size=options.max_shard_size,
        verify=options.verify,
        push_to=options.push_to_hub,
        private=options.private or None,
        revision=options.revision,
    )
    show(done, options)
    return 0
