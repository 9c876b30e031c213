"""`transplant-hf plan`."""

from __future__ import annotations

import argparse
from typing import Any

from .command import command, old_spelling, show
from .options import add_donors, add_number, donors_of, pick
from .values import torch_name, whole


def add(commands: Any) -> None:
    """Add the command."""
    parser = command(
        commands,
        "plan",
        _run,
        "estimate the memory that a transplant needs, without downloading weights",
        "plan openai/gpt-oss-20b --count 3 --devices 2 --memory 24GiB --context 32768",
    )
    parser.add_argument("what", metavar="MODEL", help="Hub id or folder of a recipient, a donor or a transplant")
    add_donors(parser)
    add_number(parser, "--count", "estimate for a donor of K layers that does not exist yet", metavar="K")
    old_spelling(parser, "--layers", "--count", "count", type=whole())
    add_number(parser, "--position", "its position (default: where `train` puts it)", None, whole(0), "P")
    add_number(parser, "--devices", "number of GPUs", 1)
    parser.add_argument("--memory", metavar="SIZE", help="memory of each, such as 80GiB (default: no limit)")
    parser.add_argument("--cpu-memory", metavar="SIZE", help="CPU memory to offload to (default: none)")
    parser.add_argument(
        "--dtype", type=torch_name, default="auto", help="such as float32 or bfloat16 (default: as in the checkpoint)"
    )
    add_number(parser, "--batch-size", "sequences in a batch", 1)
    old_spelling(parser, "--batch", "--batch-size", "batch_size", type=whole())
    add_number(parser, "--context", "tokens per sequence (default: 4096, or the model's context length)")
    parser.add_argument("--dequantize", action="store_true", help="estimate a quantized recipient as dequantized")
    parser.add_argument("--revision", help="branch, tag or commit of the model")


def _run(options: argparse.Namespace) -> int:
    from .. import plan

    names = ("count", "position", "devices", "memory", "cpu_memory", "dtype", "batch_size", "context", "dequantize")
    result = plan(options.what, donors=donors_of(options), **pick(options, *names, "revision"))
    show(result, options)
    return 0 if result else 1
