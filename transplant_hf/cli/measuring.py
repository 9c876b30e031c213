"""`transplant-hf sweep`, `evaluate` and `compare`: measurements on texts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .options import arguments_for, loading_arguments, show, text_source, text_sources
from .parser import DONOR, TEXT_HELP, Parser, command, number, share, whole

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


def add_sweep(commands: Any) -> None:
    """Add `sweep`."""
    summary = "measure the perplexity of donors, one at a time, at every position"
    example = "sweep openai-community/gpt2 user/gpt2-law user/gpt2-code@4 --text cases.jsonl --strengths 1 0.5"
    parser = command(commands, "sweep", _sweep, summary, example)
    parser.add_argument("recipient", metavar="MODEL", help="Hub id or folder of a recipient, a transplant or a donor")
    donors = "Hub ids or folders; with @POSITION, measured only there (default: the donors of MODEL)"
    parser.add_argument("donors", nargs="*", metavar=DONOR, help=donors)
    parser.add_number("--positions", "positions to measure (default: all)", None, whole(0), "P", nargs="+")
    how = "add the donor's layers, or replace as many (default: insert)"
    parser.add_argument("--mode", choices=("insert", "replace"), help=how)
    _add_measuring(parser, strengths="strengths to measure (default: 1)", plot="plot perplexity against position")


def _sweep(options: argparse.Namespace) -> int:
    from .. import DonorSpec, sweep
    from ..plots import check_picture, plot_sweep

    if options.plot is not None:
        check_picture(options.plot, options.overwrite)
    donors = {spec.donor: spec.position for spec in map(DonorSpec.parse, options.donors)}
    if len(donors) < len(options.donors):
        options.usage_error("a donor is given twice; give it once, with --positions")
    report = sweep(
        options.recipient,
        donors or None,
        text_source(options.text, options),
        options.positions,
        options.strengths,
        mode=options.mode,
        **_measuring_arguments(options),
    )
    show(report, options)
    if options.plot is not None:
        plot_sweep(report, options.plot, options.overwrite)
    return 0 if report.best else 1


def add_evaluate(commands: Any) -> None:
    """Add `evaluate`."""
    summary = "measure the perplexity of a model on texts, with its donors and without"
    examples = (
        "evaluate user/gpt2-law --text law=cases.jsonl --text general=wikitext.txt --stride 512",
        "evaluate openai-community/gpt2 --donor user/gpt2-law@10 --text cases.jsonl",
    )
    parser = command(commands, "evaluate", _evaluate_texts, summary, *examples, check=_check_evaluate)
    parser.add_model()
    parser.add_donors()
    parser.add_argument("--recipient", help="model to compare with (default: MODEL without its donors)")
    strengths = "measure with the donors at each of these strengths"
    _add_measuring(parser, strengths, "with --strengths: plot perplexity against strength", action="append")


def _check_evaluate(options: argparse.Namespace) -> None:
    if options.plot is not None and options.strengths is None:
        options.usage_error("--plot goes with --strengths")
    if options.recipient is not None and options.strengths is not None:
        options.usage_error("--recipient does not go with --strengths: strength 0 is the recipient")


def _evaluate_texts(options: argparse.Namespace) -> int:
    from .. import evaluate
    from ..evaluation import strength_curve
    from ..plots import check_strengths_picture, plot_strengths

    texts, arguments = text_sources(options.text, options), _measuring_arguments(options)
    if options.strengths is None:
        return show(evaluate(options.model, texts, recipient=options.recipient, **arguments), options)
    if options.plot is not None:
        check_strengths_picture(options.plot, texts, options.overwrite)
    curve = strength_curve(options.model, texts, options.strengths, **arguments)
    status = show(curve, options)
    if options.plot is not None:
        plot_strengths(curve, options.plot, options.overwrite)
    return status


def _add_measuring(parser: Parser, strengths: str, plot: str, **text: Any) -> None:
    """Add the options of `sweep` and `evaluate`."""
    repeated = ". May be repeated" if text else ""
    what = f"text to measure on: {TEXT_HELP}{repeated}"
    parser.add_argument("--text", required=True, metavar="TEXT", help=what, **text)
    parser.add_number("--strengths", strengths, None, number(), "S", nargs="+")
    parser.add_argument("--plot", type=Path, metavar="FILE", help=plot)
    parser.add_argument("--overwrite", action="store_true", help="replace the file of --plot if it exists")
    parser.add_text()
    parser.add_number("--max-tokens", "stop after this many tokens of each text", None, whole(2))
    parser.add_number("--stride", "window stride in tokens (default: no overlap)")
    parser.add_number("--batch-size", "windows in a batch", 8)
    stream = "leave the layers before the first donor in their files and read each of them once: they take no memory"
    parser.add_argument("--stream", action="store_true", help=stream)
    parser.add_loading()
    parser.add_quantization()


def _measuring_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """Return how text is read and the model is loaded."""
    names = ("max_tokens", "block_length", "stride", "batch_size", "stream")
    return {name: getattr(options, name) for name in names} | loading_arguments(options)


def add_compare(commands: Any) -> None:
    """Add `compare`."""
    summary = "train donors, LoRA and whole models on one text, and compare quality, forgetting and cost"
    example = "compare openai-community/gpt2 law.txt --general wikitext.txt --steps 200 --output comparison"
    parser = command(commands, "compare", _compare, summary, example)
    parser.add_argument("recipient", metavar="RECIPIENT", help="Hub id or folder")
    parser.add_argument("text", metavar="TEXT", help=f"text to train on: {TEXT_HELP}; the last fifth is held out")
    parser.add_argument("--general", metavar="TEXT", required=True, help="general text; the last fifth is held out")
    other = "text that is not trained on, to measure forgetting on. May be repeated"
    parser.add_argument("--other", metavar="TEXT", action="append", default=[], help=other)
    parser.add_text()
    parser.add_donors()
    only = f"only these methods (default: all): {', '.join(f'{name} ({what})' for name, what in _METHODS.items())}"
    parser.add_argument("--methods", nargs="+", choices=_METHODS, metavar="NAME", help=only)
    rates = "learning rates to try (default: those of each method)"
    parser.add_number("--learning-rates", rates, None, number(above=0), "LR", nargs="+")
    parser.add_number("--steps", "optimizer steps", 200)
    parser.add_number("--batch-size", "blocks per step", 8)
    parser.add_number("--blocks", "blocks to train on, evenly spaced (default: all)")
    parser.add_number("--held-out-blocks", "maximum number of blocks of each test text", 192)
    shares = "shares of general text in each batch (default: 0 0.25)"
    parser.add_number("--replay-shares", shares, None, share, "S", nargs="+")
    parser.add_argument("--no-equal-time", action="store_false", dest="equal_time", help="compare at equal steps only")
    parser.add_number("--count", "layers of a donor", 3, metavar="K", dest="layers")
    parser.old_spelling("--layers", "--count", "layers", type=whole())
    parser.add_number("--rank", "rank of LoRA", 16)
    parser.add_seed()
    parser.add_argument("--bf16", action="store_true", help="train with bfloat16 autocast")
    output = "folder for comparison.json, comparison.txt, comparison.png, and runs/, with a file for each run"
    parser.add_argument("--output", type=Path, help=output)
    parser.add_argument("--resume", action="store_true", help="reuse the runs of the same setup in --output")
    parser.add_overwrite()
    parser.add_loading()


def _compare(options: argparse.Namespace) -> int:
    from .. import compare
    from ..comparison.report import PICTURE, check_comparison_folder
    from ..plots import check_picture, plot_comparison

    folder: Path | None = options.output
    if folder is not None:
        check_comparison_folder(folder, options.overwrite or options.resume)
        check_picture(folder / PICTURE, options.overwrite or options.resume)
    arguments = {**arguments_for(compare, options), "quiet": options.json}
    arguments |= {name: text_source(arguments[name], options) for name in ("text", "general")}
    arguments["others"] = [text_source(text, options) for text in options.other]
    report = compare(**arguments)
    status = show(report, options)
    if folder is not None:
        plot_comparison(report, folder / PICTURE, overwrite=True)
    return status
