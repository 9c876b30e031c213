"""`transplant-hf evaluate`."""

from __future__ import annotations

import argparse
from typing import Any

from .command import command, show
from .options import add_donors, add_measuring, measuring_arguments, text_sources


def add(commands: Any) -> None:
    """Add the command."""
    parser = command(
        commands,
        "evaluate",
        _run,
        "measure the perplexity of a model on texts, with its donors and without",
        "evaluate user/gpt2-law --text law=cases.jsonl --text general=wikitext.txt --stride 512",
        "evaluate openai-community/gpt2 --donor user/gpt2-law@10 --text cases.jsonl",
        check=_check,
    )
    parser.add_argument("model", metavar="MODEL", help="Hub id or folder of a donor, a transplant or a model")
    add_donors(parser)
    parser.add_argument("--recipient", help="model to compare with (default: MODEL without its donors)")
    add_measuring(
        parser,
        strengths="measure with the donors at each of these strengths",
        plot="with --strengths: plot perplexity against strength",
        action="append",
    )


def _check(options: argparse.Namespace) -> None:
    if options.plot is not None and options.strengths is None:
        options.usage_error("--plot goes with --strengths")
    if options.recipient is not None and options.strengths is not None:
        options.usage_error("--recipient does not go with --strengths: strength 0 is the recipient")


def _run(options: argparse.Namespace) -> int:
    from .. import evaluate
    from ..evaluation import strength_curve
    from ..plots import check_strengths_picture, plot_strengths

    texts, arguments = text_sources(options.text, options), measuring_arguments(options)
    if options.strengths is None:
        show(evaluate(options.model, texts, recipient=options.recipient, **arguments), options)
        return 0
    if options.plot is not None:
        check_strengths_picture(options.plot, texts, options.overwrite)
    curve = strength_curve(options.model, texts, options.strengths, **arguments)
    show(curve, options)
    if options.plot is not None:
        plot_strengths(curve, options.plot, options.overwrite)
    return 0
