"""`transplant-hf export`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .command import add_overwrite, command, show
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
        "  transplant-hf export openai-community/gpt2 full --donor user/gpt2-law --position 4",
    )
    export.add_argument(
        "source", metavar="SOURCE", help="Hub id or folder of a transplant or donor; with --donor, of the recipient"
    )
    export.add_argument("output", metavar="OUTPUT", type=Path, help="folder to write")
    add_overwrite(export)
    export.add_argument(
        "--donor", action="append", metavar="DONOR", help="Hub id or folder of a donor; may be given several times"
    )
    export.add_argument(
        "--position",
        type=int,
        action="append",
        metavar="P",
        help="recipient layers that run before it, one for each --donor in order (default: the donors' own)",
    )
    export.add_argument(
        "--mode", choices=["insert", "replace"], help="for donors with --position (default: insert); else their own"
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
    from ..export import export_transplant

    done = export_transplant(
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
    if options.mode and not positions:
        return "--mode goes with --position"
    return None


def _donors(options: argparse.Namespace) -> Any:
    from ..config import DonorSpec

    if options.donor is None:
        return None
    if options.position is None:
        return dict.fromkeys(options.donor)
    pairs = zip(options.donor, options.position, strict=True)
    return [DonorSpec(donor, position, options.mode or "insert") for donor, position in pairs]
