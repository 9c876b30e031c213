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
        "say what a transplant costs on given hardware, from headers alone, beside its recipient",
        "plan openai/gpt-oss-20b --layers 3 --devices 2 --memory 24GiB --context 32768 --bandwidth 2GB/s",
    )
    plan.add_argument("what", metavar="WHAT", help="Hub id or folder of a recipient, a donor or a transplant")
    plan.add_argument(
        "--donor",
        action="append",
        metavar=DONOR,
        help=f"{DONOR_HELP}; may be given several times",
    )
    plan.add_argument("--layers", type=int, metavar="K", help="instead: K layers of the recipient's shape, yet to come")
    plan.add_argument("--position", type=int, metavar="P", help="where those go (default: after a third)")
    plan.add_argument("--devices", type=int, default=1, metavar="N", help="accelerators, or processes (default: 1)")
    plan.add_argument("--memory", metavar="SIZE", help="what each may use, such as 80GiB")
    plan.add_argument("--cpu-memory", metavar="SIZE", help="main memory for what finds no place (default: none)")
    plan.add_argument("--bandwidth", metavar="RATE", help="what a process reads in a second, such as 2GB/s")
    plan.add_argument(
        "--parallel",
        choices=["auto", "tensor", "expert", "fsdp"],
        default="auto",
        help="whole layers on devices, or a part of every tensor or some experts on each (default: auto)",
    )
    plan.add_argument(
        "--dtype", type=torch_name, default="auto", help="such as float32 or bfloat16 (default: as it is saved)"
    )
    plan.add_argument("--batch", type=int, default=1, metavar="N", help="sequences at once (default: 1)")
    plan.add_argument("--context", type=int, metavar="N", help="tokens of each (default: 4096, or all it reads)")
    plan.add_argument("--dequantize", action="store_true", help="plan a quantised recipient as dequantised")
    plan.add_argument("--revision", help="branch, tag or commit of WHAT")


def _run(options: argparse.Namespace) -> int:
    from ..planning import plan

    names = ("layers", "position", "devices", "memory", "cpu_memory", "bandwidth", "parallel", "dtype", "batch")
    found = plan(
        options.what,
        [donor_spec(text) for text in options.donor or ()] or None,
        context=options.context,
        dequantize=options.dequantize,
        revision=options.revision,
        **{name: getattr(options, name) for name in names},
    )
    show(found, options)
    return 0 if found else 1
