"""`transplant-hf extract`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .command import add_overwrite, command, show
from .values import dtype, whole

__all__ = ["add"]


def add(commands: Any) -> None:
    """Add the command."""
    extract = command(
        commands,
        "extract",
        _run,
        "take layers out of a model and write them as a donor repo",
        "extract openai-community/gpt2 gpt2-new --layers 4 5 6 --init identity",
    )
    extract.add_argument("model", metavar="MODEL", help="Hub id or folder of a model, a transplant or a donor")
    extract.add_argument(
        "output", metavar="OUTPUT", type=Path, nargs="?", help="folder to write; may be left out with --push-to-hub"
    )
    add_overwrite(extract)
    chosen = extract.add_mutually_exclusive_group()
    chosen.add_argument(
        "--layers",
        type=int,
        nargs="+",
        metavar="N",
        help="consecutive layers, by their running numbers (default: from a third of the way up)",
    )
    chosen.add_argument("--count", type=whole(), default=3, help="how many layers, where none are named (default: 3)")
    extract.add_argument(
        "--init",
        choices=("copy", "identity"),
        default="copy",
        help="as they are, or with zero output projections, so that they change nothing until trained (default: copy)",
    )
    extract.add_argument(
        "--position", type=int, help="recommended position (default: right after the layers, in their model)"
    )
    extract.add_argument("--name", help="what to call the donor (default: after the output)")
    extract.add_argument("--revision", help="the model's branch, tag or commit")
    extract.add_argument("--dtype", type=dtype, default="auto", help="such as bfloat16 (default: the checkpoint's)")
    extract.add_argument("--push-to-hub", metavar="REPO", help="upload the donor to this repository, as one commit")
    extract.add_argument("--private", action="store_true", help="make that repository private if it is new")
    extract.add_argument("--trust-remote-code", action="store_true", help="run the model's own modelling code")


def _run(options: argparse.Namespace) -> int:
    from ..model.extracting import extract

    if options.output is None and options.push_to_hub is None:
        print("transplant-hf extract: name a folder to write, or --push-to-hub REPO", file=sys.stderr)
        return 2
    if options.private and options.push_to_hub is None:
        print("transplant-hf extract: --private goes with --push-to-hub", file=sys.stderr)
        return 2
    done = extract(
        options.model,
        options.output,
        overwrite=options.overwrite,
        layers=options.layers,
        count=options.count,
        init=options.init,
        position=options.position,
        name=options.name,
        revision=options.revision,
        dtype=options.dtype,
        push_to=options.push_to_hub,
        private=options.private or None,
        trust_remote_code=options.trust_remote_code or None,
    )
    show(done, options)
    return 0
