"""`transplant-hf export`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .command import add_overwrite, command, show
from .donors import DONOR, DONOR_HELP, donor_spec
from .values import dtype

__all__ = ["add"]


def add(commands: Any) -> None:
    """Add the command."""
    export = command(
        commands,
        "export",
        _run,
        "write a transplant as a plain checkpoint that loads without transplant_hf",
        "export user/gpt2-law gpt2-law-full --dtype bfloat16\n"
        "  transplant-hf export openai-community/gpt2 full --donor user/gpt2-law@4",
    )
    export.add_argument(
        "source", metavar="SOURCE", help="Hub id or folder of a transplant or donor; with --donor, of the recipient"
    )
    export.add_argument("output", metavar="OUTPUT", type=Path, help="folder to write")
    add_overwrite(export)
    export.add_argument("--donor", action="append", metavar=DONOR, help=f"{DONOR_HELP}; may be given several times")
    export.add_argument(
        "--position",
        type=int,
        action="append",
        metavar="P",
        help="the same as DONOR@P: one for each --donor, in order",
    )
    export.add_argument(
        "--mode",
        choices=["insert", "replace"],
        help="for donors whose position is given (default: insert)",
    )
    export.add_argument(
        "--dtype",
        type=dtype,
        choices=["auto", "bfloat16", "float16", "float32"],
        default="auto",
        help="default: as in the files",
    )
    export.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="largest weight file (default: 5GB)")
    export.add_argument(
        "--no-verify", action="store_true", help="do not load the result and compare logits: for models that do not fit"
    )
    export.add_argument("--composition", choices=["stacked", "side_by_side"], help="default: as the source says")
    export.add_argument("--license", help="licence for the card (default: what recipient and donors agree on)")
    export.add_argument("--revision", help="the source's branch, tag or commit")


def _run(options: argparse.Namespace) -> int:
    wrong = _wrong_usage(options)
    if wrong:
        print(f"transplant-hf export: {wrong}", file=sys.stderr)
        return 2
    from ..exporting import export

    done = export(
        options.source,
        options.output,
        _donors(options),
        overwrite=options.overwrite,
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
        verify=not options.no_verify,
        composition=options.composition,
        license=options.license,
        revision=options.revision,
    )
    show(done, options)
    return 0


def _wrong_usage(options: argparse.Namespace) -> str | None:
    donors, positions = options.donor or [], options.position or []
    if positions and len(positions) != len(donors):
        return f"{len(positions)} --position for {len(donors)} --donor; give one for each, or none"
    if options.mode and not positions and not any("@" in donor for donor in donors):
        return "--mode goes with --position or DONOR@P"
    return None


def _donors(options: argparse.Namespace) -> Any:
    if options.donor is None:
        return None
    positions = options.position or [None] * len(options.donor)
    words = [donor if at is None else f"{donor}@{at}" for donor, at in zip(options.donor, positions, strict=True)]
    return [donor_spec(word, options.mode) for word in words]
