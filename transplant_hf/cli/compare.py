"""`transplant-hf compare`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .command import command, show
from .reading import TEXT_HELP, add_loading_options, add_text_options, loading_arguments, text_source

__all__ = ["add"]


def add(commands: Any) -> None:
    """Add the command."""
    compare = command(
        commands,
        "compare",
        _run,
        "train donors, LoRA and whole models on one text, and compare what each learnt, forgot and cost",
        "compare openai-community/gpt2 law.txt --general wikitext.txt --steps 200 --output comparison",
    )
    compare.add_argument("recipient", metavar="RECIPIENT", help="Hub id or folder")
    compare.add_argument("text", metavar="TEXT", help=f"text to learn: {TEXT_HELP}; its last fifth is held out")
    compare.add_argument("--general", metavar="TEXT", required=True, help="general text; its last fifth is held out")
    add_text_options(compare)
    compare.add_argument("--methods", nargs="+", metavar="NAME", help="only these (default: all)")
    compare.add_argument("--learning-rates", type=float, nargs="+", metavar="LR", help="instead of each method's own")
    compare.add_argument("--steps", type=int, default=200, help="optimizer steps (default: 200)")
    compare.add_argument("--batch-size", type=int, default=8, help="blocks in a step (default: 8)")
    compare.add_argument("--blocks", type=int, help="train on so many blocks, evenly spread (default: all)")
    compare.add_argument(
        "--held-out-blocks", type=int, default=192, help="most blocks of each test text (default: 192)"
    )
    compare.add_argument(
        "--replay-shares", type=float, nargs="+", default=[0.0, 0.25], metavar="S", help="(default: 0 0.25)"
    )
    compare.add_argument("--no-equal-time", action="store_true", help="at equal steps only")
    compare.add_argument("--layers", type=int, default=3, metavar="K", help="k (default: 3)")
    compare.add_argument("--rank", type=int, default=16, help="of LoRA (default: 16)")
    compare.add_argument("--seed", type=int, default=0, help="of everything (default: 0)")
    compare.add_argument("--bf16", action="store_true", help="train under bfloat16 autocast")
    compare.add_argument("--output", type=Path, help="folder for comparison.json, comparison.txt and comparison.png")
    add_loading_options(compare)


def _run(options: argparse.Namespace) -> int:
    from ..comparison import compare_texts

    report = compare_texts(
        options.recipient,
        text_source(options.text, options),
        text_source(options.general, options),
        block_length=options.block_length,
        blocks=options.blocks,
        held_out_blocks=options.held_out_blocks,
        methods=options.methods,
        learning_rates=options.learning_rates,
        steps=options.steps,
        batch=options.batch_size,
        shares=options.replay_shares,
        equal_time=not options.no_equal_time,
        layers=options.layers,
        rank=options.rank,
        seed=options.seed,
        bf16=options.bf16,
        quiet=options.json,
        **loading_arguments(options),
    )
    if options.output is not None:
        from ..plots import plot_comparison

        report.save(options.output)
        plot_comparison(report, options.output / "comparison.png")
    show(report, options)
    return 0
