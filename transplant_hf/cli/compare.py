"""`transplant-hf compare`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .command import add_overwrite, command, show
from .reading import TEXT_HELP, add_loading_options, add_text_options, loading_arguments, text_source
from .values import number, share, whole

if TYPE_CHECKING:
    from ..comparison import RunResult

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
    compare.add_argument(
        "--learning-rates", type=number(above=0), nargs="+", metavar="LR", help="instead of each method's own"
    )
    compare.add_argument("--steps", type=whole(), default=200, help="optimizer steps (default: 200)")
    compare.add_argument("--batch-size", type=whole(), default=8, help="blocks in a step (default: 8)")
    compare.add_argument("--blocks", type=whole(), help="number of blocks to train on, evenly spread (default: all)")
    compare.add_argument(
        "--held-out-blocks", type=whole(), default=192, help="most blocks of each test text (default: 192)"
    )
    compare.add_argument(
        "--replay-shares", type=share, nargs="+", default=[0.0, 0.25], metavar="S", help="(default: 0 0.25)"
    )
    compare.add_argument("--no-equal-time", action="store_true", help="at equal steps only")
    compare.add_argument("--layers", type=whole(), default=3, metavar="K", help="k (default: 3)")
    compare.add_argument("--rank", type=whole(), default=16, help="of LoRA (default: 16)")
    compare.add_argument("--seed", type=whole(0, 2**32 - 1), default=0, help="random seed (default: 0)")
    compare.add_argument("--bf16", action="store_true", help="train under bfloat16 autocast")
    compare.add_argument(
        "--output",
        type=Path,
        help="folder for comparison.json, comparison.txt, comparison.png, and runs.jsonl: a line as each run ends",
    )
    add_overwrite(compare)
    add_loading_options(compare)


def _run(options: argparse.Namespace) -> int:
    from ..comparison import compare_texts
    from ..comparison.report import PICTURE, check_comparison_folder, run_writer
    from ..plots import check_picture, plot_comparison

    folder: Path | None = options.output
    if folder is not None:
        check_comparison_folder(folder, options.overwrite)
        check_picture(folder / PICTURE, options.overwrite)

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
        on_result=_tell if folder is None else run_writer(folder),
        **loading_arguments(options),
    )
    show(report, options)
    if folder is not None:
        report.save(folder, overwrite=True)  # of what the runs have just written there
        plot_comparison(report, folder / PICTURE, options.overwrite)
    return 0


def _tell(result: RunResult) -> None:
    """Without a folder to write into, a run that is done is at least seen."""
    found = result.failed or ", ".join(f"{text} {value:.2f}" for text, value in result.test.items())
    name = ", ".join(filter(None, (result.method, result.view)))
    print(
        f"{name}, replay {result.share:g}, lr {result.learning_rate:g}, {result.steps} steps: {found}", file=sys.stderr
    )
