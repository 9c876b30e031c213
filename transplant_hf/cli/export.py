"""`transplant-hf export`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .command import command, old_spelling, show
from .options import add_donors, add_dtype, add_overwrite, add_shard_size, arguments_for
from .values import donor_spec

if TYPE_CHECKING:
    from ..config import DonorSpec


def add(commands: Any) -> None:
    """Add the command."""
    parser = command(
        commands,
        "export",
        _run,
        "write a transplant as a plain checkpoint that loads without transplant_hf, or as a GGUF file",
        "export user/gpt2-law gpt2-law-full --dtype bfloat16",
        "export openai-community/gpt2 full --donor user/gpt2-law@4",
        "export --gguf gpt2.Q4_K_M.gguf user/gpt2-law@4 gpt2-law.gguf",
    )
    parser.add_argument("source", metavar="MODEL", help="Hub id or folder of a transplant, a donor or a recipient")
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="folder to write; with --gguf, the file")
    parser.add_argument(
        "--gguf",
        metavar="FILE",
        type=Path,
        help="a GGUF file of the recipient: copy its tensors as they are, and write a GGUF file. MODEL is then a "
        "transplant or DONOR[@POSITION]",
    )
    add_overwrite(parser)
    add_donors(parser)
    old_spelling(parser, "--position", "--donor DONOR@POSITION", "position", type=int, append=True)
    parser.add_argument(
        "--mode", choices=("insert", "replace"), help="mode of donors with a given position (default: insert)"
    )
    add_dtype(parser, "q8_0", note="; q8_0 also for the donors in a GGUF file, which are float16 by default")
    add_shard_size(parser)
    parser.add_argument(
        "--no-verify",
        action="store_false",
        dest="verify",
        help="do not load the result to compare logits (needed if it does not fit)",
    )
    parser.add_argument(
        "--composition",
        choices=("stacked", "side_by_side"),
        help="how donors at one position are combined (default: as in the source)",
    )
    parser.add_argument("--license", help="license for the card (default: the one that recipient and donors share)")
    parser.add_argument("--revision", help="branch, tag or commit of the source")
    parser.set_defaults(position=None)


def _run(options: argparse.Namespace) -> int:
    from .. import export

    if options.gguf is not None and (options.donor or options.mode or donor_spec(options.source).position is not None):
        options.donor = [options.source, *(options.donor or ())]
        options.source, options.gguf = options.gguf, None
    show(export(donors=_donors(options), **arguments_for(export, options)), options)
    return 0


def _donors(options: argparse.Namespace) -> list[DonorSpec] | None:
    words, positions = options.donor or [], options.position or []
    if positions and len(positions) != len(words):
        options.usage_error(f"{len(positions)} --position for {len(words)} --donor; use --donor DONOR@POSITION")
    if positions:  # one for each donor, in order
        words = [f"{word}@{position}" for word, position in zip(words, positions, strict=True)]
    donors = [donor_spec(word, options.mode) for word in words]
    if options.mode and not any(donor.position is not None for donor in donors):
        options.usage_error("--mode goes with --donor DONOR@POSITION")
    return donors or None
