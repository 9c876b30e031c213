"""`transplant-hf sweep`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .command import add_overwrite, command, show
from .reading import (
    add_loading_options,
    add_measuring_options,
    add_text_options,
    loading_arguments,
    measuring_arguments,
    text_source,
)
from .values import number, whole

__all__ = ["add"]


def add(commands: Any) -> None:
    """Add the command."""
    sweep = command(
        commands,
        "sweep",
        _run,
        "measure the perplexity of donors, each by itself, at every position",
        "sweep openai-community/gpt2 user/gpt2-law user/gpt2-code --text cases.jsonl --strengths 1 0.5",
    )
    sweep.add_argument("recipient", help="Hub id or folder of the untouched recipient; or of a transplant or donor")
    sweep.add_argument(
        "donors", nargs="*", metavar="donor", help="Hub ids or folders (default: those of the transplant that is named)"
    )
    sweep.add_argument(
        "--text",
        required=True,
        metavar="[NAME=]DATA[:SPLIT]",
        help="a file, a folder or a dataset on the Hub",
    )
    sweep.add_argument("--positions", type=whole(0), nargs="+", metavar="P", help="default: all")
    sweep.add_argument("--strengths", type=number(), nargs="+", metavar="S", default=[1.0], help="default: 1")
    sweep.add_argument("--mode", choices=["insert", "replace"], default="insert", help="default: insert")
    sweep.add_argument("--plot", type=Path, metavar="FILE", help="draw position against perplexity")
    add_overwrite(sweep)
    add_text_options(sweep)
    add_measuring_options(sweep)
    add_loading_options(sweep)


def _run(options: argparse.Namespace) -> int:
    from ..evaluation import sweep
    from ..plots import check_picture, plot_sweep

    if options.plot is not None:
        check_picture(options.plot, options.overwrite)
    text = text_source(options.text, options)
    report = sweep(
        options.recipient,
        options.donors or None,
        text,
        options.positions,
        options.strengths,
        mode=options.mode,
        **measuring_arguments(options),
        **loading_arguments(options),
    )
    show(report, options)
    if options.plot is not None:
        plot_sweep(report, options.plot, options.overwrite)
    return 0 if report.best else 1
