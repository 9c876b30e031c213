"""`transplant-hf evaluate`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .command import add_overwrite, command, show
from .reading import (
    add_loading_options,
    add_measuring_options,
    add_text_options,
    loading_arguments,
    measuring_arguments,
    text_sources,
)
from .values import number

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
        "--strengths", type=number(), nargs="+", metavar="S", help="measure the donors at each of these strengths"
    )
    evaluate.add_argument("--plot", type=Path, metavar="FILE", help="with --strengths: draw the curve")
    add_overwrite(evaluate)
    add_text_options(evaluate)
    add_measuring_options(evaluate)
    add_loading_options(evaluate)


def _run(options: argparse.Namespace) -> int:
    wrong = _wrong_usage(options)
    if wrong:
        print(f"transplant-hf evaluate: {wrong}", file=sys.stderr)
        return 2
    if options.strengths is not None:
        return _dial(options)
    from ..evaluation import evaluate

    report = evaluate(
        options.model,
        text_sources(options.text, options),
        recipient=options.recipient,
        **measuring_arguments(options),
        **loading_arguments(options),
    )
    show(report, options)
    return 0


def _wrong_usage(options: argparse.Namespace) -> str | None:
    if options.plot is not None and options.strengths is None:
        return "--plot draws the curve of --strengths; give both, or neither"
    if options.recipient is not None and options.strengths is not None:
        return "--recipient does not go with --strengths: a transplant at strength 0 is its own recipient"
    return None


def _dial(options: argparse.Namespace) -> int:
    from ..evaluation import strength_curve
    from ..plots import check_strengths_picture, plot_strengths

    texts = text_sources(options.text, options)
    if options.plot is not None:
        check_strengths_picture(options.plot, texts, options.overwrite)
    report = strength_curve(
        options.model,
        texts,
        options.strengths,
        **measuring_arguments(options),
        **loading_arguments(options),
    )
    show(report, options)
    if options.plot is not None:
        plot_strengths(report, options.plot, options.overwrite)
    return 0
