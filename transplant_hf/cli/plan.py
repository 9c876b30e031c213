"""`transplant-hf plan`."""

from __future__ import annotations

import argparse
from typing import Any

from .command import command, old_spelling, show
from .options import add_choice, add_donors, add_number, arguments_for, donors_of
from .values import torch_name, whole


def add(commands: Any) -> None:
    """Add the command."""
    parser = command(
        commands,
        "plan",
        _run,
        "estimate the memory that a transplant needs, without downloading weights",
        "plan openai/gpt-oss-20b --count 3 --devices 2 --memory 24GiB --context 32768",
        "plan meta-llama/Llama-3.1-8B --train --stream-prefix --count 1 --context 512 --blocks 2000 --memory 12GiB",
    )
    parser.add_argument("what", metavar="MODEL", help="Hub id or folder of a recipient, a donor or a transplant")
    add_donors(parser)
    add_number(parser, "--count", "estimate for a donor of K layers that does not exist yet", metavar="K")
    old_spelling(parser, "--layers", "--count", "count", type=whole())
    position = "position of that donor (default: where `train` puts it)"
    place = parser.add_mutually_exclusive_group()
    add_number(place, "--position", position, None, whole(0), "P")
    spread = "positions of its parts, if it is spread through the recipient (with --train)"
    place.add_argument("--positions", nargs="+", type=whole(0), dest="position", metavar="P", help=spread)
    add_number(parser, "--devices", "number of GPUs", 1)
    parser.add_argument("--memory", metavar="SIZE", help="memory of each, such as 80GiB (default: no limit)")
    parser.add_argument("--cpu-memory", metavar="SIZE", help="CPU memory to offload to (default: none)")
    parser.add_argument(
        "--dtype", type=torch_name, default="auto", help="such as float32 or bfloat16 (default: as in the checkpoint)"
    )
    add_number(parser, "--batch-size", "sequences in a batch (default: 1; 8 with --train)")
    old_spelling(parser, "--batch", "--batch-size", "batch_size", type=whole())
    add_number(
        parser, "--context", "tokens per sequence (default: 4096, with --train 1024, or the model's context length)"
    )
    parser.add_argument(
        "--train", action="store_true", help="plan the training of a donor of --count layers (default: 3) as well"
    )
    parser.add_argument(
        "--optim", metavar="NAME", default="adamw_torch", help="optimizer of --train (default: adamw_torch)"
    )
    add_choice(parser, "--mode", ("insert", "replace"), "whether that donor is inserted or replaces layers")
    parser.add_argument(
        "--stream-prefix",
        action="store_true",
        help="put that donor where `train --stream-prefix` does (default: spread)",
    )
    add_number(parser, "--blocks", "blocks of text of --train, for the size of their hidden states")
    parser.add_argument(
        "--gradient-checkpointing", action="store_true", help="plan the training with gradient checkpointing"
    )
    parser.add_argument("--dequantize", action="store_true", help="estimate a quantized recipient as dequantized")
    parser.add_argument("--revision", help="branch, tag or commit of the model")


def _run(options: argparse.Namespace) -> int:
    from .. import plan

    chosen = {**arguments_for(plan, options), "donors": donors_of(options), "train": None}
    if options.train:
        from ..training import DonorTrainingArguments

        chosen["train"] = DonorTrainingArguments(
            "plan",  # nothing is written
            donor_layers=chosen.pop("count", None),
            per_device_train_batch_size=chosen.pop("batch_size", 8),
            block_length=chosen.pop("context", None),
            position=chosen.pop("position", None),
            mode=options.mode,
            stream_prefix=options.stream_prefix,
            optim=options.optim,
            # Transformers warns of its old name, False too.
            gradient_checkpointing=options.gradient_checkpointing or None,
        )
    result = plan(**chosen)
    show(result, options)
    return 0 if result else 1
