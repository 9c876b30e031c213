"""`transplant-hf plan`."""

from __future__ import annotations

import argparse
from typing import Any

from .command import command, show
from .donors import DONOR, DONOR_HELP, donor_spec
from .values import torch_name

__all__ = ["add"]


def add(commands: Any) -> None:
    """Add the command."""
    plan = command(
        commands,
        "plan",
        _run,
        "estimate the memory that a transplant needs, without downloading weights",
        "plan openai/gpt-oss-20b --count 3 --devices 2 --memory 24GiB --context 32768",
    )
    plan.add_argument("what", metavar="MODEL", help="Hub id or folder of a recipient, a donor or a transplant")
    plan.add_argument("--donor", action="append", metavar=DONOR, help=f"{DONOR_HELP}; may be repeated")
    plan.add_argument("--count", type=int, metavar="K", help="a donor of K layers that does not exist yet")
    plan.add_argument("--position", type=int, metavar="P", help="where these layers go (default: after a third)")
    plan.add_argument("--devices", type=int, default=1, metavar="N", help="number of accelerators (default: 1)")
    plan.add_argument("--memory", metavar="SIZE", help="memory of each, such as 80GiB (default: no limit)")
    plan.add_argument("--cpu-memory", metavar="SIZE", help="CPU memory to offload to (default: none)")
    plan.add_argument(
        "--dtype", type=torch_name, default="auto", help="such as float32 or bfloat16 (default: as saved)"
    )
    plan.add_argument("--batch-size", type=int, default=1, metavar="N", help="sequences at once (default: 1)")
    plan.add_argument("--context", type=int, metavar="N", help="tokens of each (default: 4096, or all that it reads)")
    plan.add_argument("--dequantize", action="store_true", help="plan a quantized recipient as if it were dequantized")
    plan.add_argument("--revision", help="branch, tag or commit of MODEL")


def _run(options: argparse.Namespace) -> int:
    from ..planning import plan

    names = ("count", "position", "devices", "memory", "cpu_memory", "dtype", "batch_size", "context", "dequantize")
    result = plan(
        options.what,
        [donor_spec(text) for text in options.donor or ()] or None,
        revision=options.revision,
        **{name: getattr(options, name) for name in names},
    )
    show(result, options)
    return 0 if result else 1
