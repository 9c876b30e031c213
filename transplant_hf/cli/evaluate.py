"""`transplant-hf evaluate`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .command import command, show
from .reading import (
    add_loading_options,
    add_measuring_options,
    add_text_options,
    loading_arguments,
    measuring_arguments,
    text_sources,
)

__all__ = ["add"]


def add(commands: Any) -> None:
    """Add the command."""
    evaluate = command(
        commands,
        "evaluate",
        _run,
        "measure a model's perplexity on texts, and of a transplant the untouched recipient's beside it",
        "evaluate user/gpt2-law --text law=cases.jsonl --text general=wikitext.txt --stride 512",
    )
    evaluate.add_argument("model", help="Hub id or folder of a donor, a transplant or a model")
    evaluate.add_argument(
        "--text",
        required=True,
        action="append",
        metavar="[NAME=]DATA[:SPLIT]",
        help="a file, a folder or a dataset on the Hub; may be given several times",
    )
    evaluate.add_argument("--recipient", help="model to measure beside it (default: itself without its donors)")
    evaluate.add_argument(
        "--strengths", type=float, nargs="+", metavar="S", help="measure the donors at each of these strengths"
    )
    evaluate.add_argument("--plot", type=Path, metavar="FILE", help="with --strengths: draw the curve")
    add_text_options(evaluate)
    add_measuring_options(evaluate)
    add_loading_options(evaluate)


def _run(options: argparse.Namespace) -> int:
    if options.strengths is not None:
        return _dial(options)
    from ..evaluation import evaluate

    report = evaluate(
        options.model,
        text_sources(options),
        recipient=options.recipient,
        **measuring_arguments(options),
        **loading_arguments(options),
    )
    show(report, options)
    return 0


def _dial(options: argparse.Namespace) -> int:
    from ..evaluation import strength_curve

    report = strength_curve(
        options.model,
        text_sources(options),
        options.strengths,
        **measuring_arguments(options),
        **loading_arguments(options),
    )
    if options.plot is not None:
        from ..plots import plot_strengths

        plot_strengths(report, options.plot)
    show(report, options)
    return 0
