"""`transplant-hf compare`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .command import command, old_spelling, show
from .options import (
    TEXT_HELP,
    add_donors,
    add_loading,
    add_number,
    add_overwrite,
    add_seed,
    add_text,
    arguments_for,
    loading_arguments,
    text_source,
)
from .values import number, share, whole

# Those of `comparison.METHODS`, which imports torch.
_METHODS = {
    "donor": "before the last layer",
    "donor-end": "after the last layer",
    "donor-spread": "at equal distances",
    "replace-spread": "in place of layers at equal distances",
    "standalone": "the paper's",
    "lora": "all linear layers",
    "lora-matched": "as many parameters as the donor",
    "lora-last": "the last K layers",
    "last": "the last K layers, whole",
    "full": "fine-tuning",
}


def add(commands: Any) -> None:
    """Add the command."""
    parser = command(
        commands,
        "compare",
        _run,
        "train donors, LoRA and whole models on one text, and compare quality, forgetting and cost",
        "compare openai-community/gpt2 law.txt --general wikitext.txt --steps 200 --output comparison",
    )
    parser.add_argument("recipient", metavar="RECIPIENT", help="Hub id or folder")
    parser.add_argument("text", metavar="TEXT", help=f"text to train on: {TEXT_HELP}; the last fifth is held out")
    parser.add_argument("--general", metavar="TEXT", required=True, help="general text; the last fifth is held out")
    other = "text that is not trained on, to measure forgetting on. May be repeated"
    parser.add_argument("--other", metavar="TEXT", action="append", default=[], help=other)
    add_text(parser)
    add_donors(parser)
    only = f"only these methods (default: all): {', '.join(f'{name} ({what})' for name, what in _METHODS.items())}"
    parser.add_argument("--methods", nargs="+", choices=_METHODS, metavar="NAME", help=only)
    rates = "learning rates to try (default: those of each method)"
    add_number(parser, "--learning-rates", rates, None, number(above=0), "LR", nargs="+")
    add_number(parser, "--steps", "optimizer steps", 200)
    add_number(parser, "--batch-size", "blocks per step", 8)
    add_number(parser, "--blocks", "blocks to train on, evenly spaced (default: all)")
    add_number(parser, "--held-out-blocks", "maximum number of blocks of each test text", 192)
    shares = "shares of general text in each batch (default: 0 0.25)"
    add_number(parser, "--replay-shares", shares, None, share, "S", nargs="+")
    parser.add_argument("--no-equal-time", action="store_false", dest="equal_time", help="compare at equal steps only")
    add_number(parser, "--count", "layers of a donor", 3, metavar="K", dest="layers")
    old_spelling(parser, "--layers", "--count", "layers", type=whole())
    add_number(parser, "--rank", "rank of LoRA", 16)
    add_seed(parser)
    parser.add_argument("--bf16", action="store_true", help="train with bfloat16 autocast")
    parser.add_argument(
        "--output",
        type=Path,
        help="folder for comparison.json, comparison.txt, comparison.png, and runs/, with a file for each run",
    )
    parser.add_argument("--resume", action="store_true", help="reuse the runs of the same setup in --output")
    add_overwrite(parser)
    add_loading(parser)


def _run(options: argparse.Namespace) -> int:
    from .. import compare
    from ..comparison.report import PICTURE, check_comparison_folder
    from ..plots import check_picture, plot_comparison

    folder: Path | None = options.output
    if folder is not None:
        check_comparison_folder(folder, options.overwrite or options.resume)
        check_picture(folder / PICTURE, options.overwrite or options.resume)
    arguments = {**arguments_for(compare, options), **loading_arguments(options), "quiet": options.json}
    arguments |= {name: text_source(arguments[name], options) for name in ("text", "general")}
    arguments["others"] = [text_source(text, options) for text in options.other]
    report = compare(**arguments)
    show(report, options)
    if folder is not None:
        plot_comparison(report, folder / PICTURE, overwrite=True)
    return 0
