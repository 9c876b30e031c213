"""`transplant-hf check`, `inspect` and `plan`: what is known from configurations and headers."""

from __future__ import annotations

import argparse
from typing import Any

from .options import arguments_for, run_verb, show
from .parser import DONOR, any_dtype, command, whole


def add_check(commands: Any) -> None:
    """Add `check`."""
    summary = "say whether a donor fits a recipient, without reading weights"
    parser = command(commands, "check", _check, summary, "check openai-community/gpt2 user/gpt2-law@1")
    parser.add_argument("recipient", metavar="RECIPIENT", help="Hub id or folder")
    donor = "Hub id or folder of a donor, and how many recipient layers run before it (default: its recommendation)"
    parser.add_argument("donor", metavar=DONOR, help=donor)
    parser.old_spelling("--position", "DONOR@POSITION", "position", type=int)
    parser.add_trust()


def _check(options: argparse.Namespace) -> int:
    options.donor = _without_position(options.donor, options)
    return run_verb(options)


def _without_position(text: str, options: argparse.Namespace) -> str:
    """Return the donor of DONOR@POSITION; its position becomes an option."""
    from .. import DonorSpec

    spec = DonorSpec.parse(text)
    if options.position is not None and spec.position is not None:
        options.usage_error("the position is given twice, by @POSITION and by --position")
    options.position = spec.position if options.position is None else options.position
    return spec.donor


def add_inspect(commands: Any) -> None:
    """Add `inspect`."""
    summary = "describe a donor, a transplant, a model or a .pt file, from headers only"
    example = "inspect user/gpt2-law@4 --recipient openai-community/gpt2"
    parser = command(commands, "inspect", _inspect, summary, example)
    what = "Hub id, folder or .pt file; the position is for --recipient (default: the recommended one)"
    parser.add_argument("what", metavar="WHAT[@POSITION]", help=what)
    parser.add_argument("--recipient", help="also say whether it fits this model: Hub id or folder")
    parser.add_argument("--revision", help="branch, tag or commit of the repository")
    parser.old_spelling("--position", "WHAT@POSITION", "position", type=int)
    parser.add_argument("--verify", action="store_true", help="compare local weight files with the recorded sha256")


def _inspect(options: argparse.Namespace) -> int:
    options.what = _without_position(options.what, options)
    return run_verb(options)


def add_plan(commands: Any) -> None:
    """Add `plan`."""
    summary = "estimate the memory that a transplant needs, without downloading weights"
    examples = (
        "plan openai/gpt-oss-20b --count 3 --devices 2 --memory 24GiB --context 32768",
        "plan meta-llama/Llama-3.1-8B --train --stream-prefix --count 1 --context 512 --blocks 2000 --memory 12GiB",
    )
    parser = command(commands, "plan", _plan, summary, *examples)
    parser.add_argument("what", metavar="MODEL", help="Hub id or folder of a recipient, a donor or a transplant")
    parser.add_donors()
    parser.add_number("--count", "estimate for a donor of K layers that does not exist yet", metavar="K")
    parser.old_spelling("--layers", "--count", "count", type=whole())
    place = parser.add_mutually_exclusive_group()
    position = "position of that donor (default: where `train` puts it)"
    parser.add_number("--position", position, None, whole(0), "P", group=place)
    spread = "positions of its parts, if it is spread through the recipient (with --train)"
    place.add_argument("--positions", nargs="+", type=whole(0), dest="position", metavar="P", help=spread)
    parser.add_number("--devices", "number of GPUs", 1)
    parser.add_argument("--memory", metavar="SIZE", help="memory of each, such as 80GiB (default: no limit)")
    parser.add_argument("--cpu-memory", metavar="SIZE", help="CPU memory to offload to (default: none)")
    dtype = "such as float32 or bfloat16 (default: as in the checkpoint)"
    parser.add_argument("--dtype", type=any_dtype, default="auto", help=dtype)
    parser.add_number("--batch-size", "sequences in a batch (default: 1; 8 with --train)")
    parser.old_spelling("--batch", "--batch-size", "batch_size", type=whole())
    context = "tokens per sequence (default: 4096, with --train 1024, or the model's context length)"
    parser.add_number("--context", context)
    train = "plan the training of a donor of --count layers (default: 3) as well"
    parser.add_argument("--train", action="store_true", help=train)
    optimizer = "optimizer of --train (default: adamw_torch)"
    parser.add_argument("--optim", metavar="NAME", default="adamw_torch", help=optimizer)
    parser.add_choice("--mode", ("insert", "replace"), "whether that donor is inserted or replaces layers")
    stream = "put that donor where `train --stream-prefix` does (default: spread)"
    parser.add_argument("--stream-prefix", action="store_true", help=stream)
    parser.add_number("--blocks", "blocks of text of --train, for the size of their hidden states")
    parser.add_argument(
        "--gradient-checkpointing", action="store_true", help="plan --train with gradient checkpointing"
    )
    parser.add_argument("--dequantize", action="store_true", help="estimate a quantized recipient as dequantized")
    parser.add_argument("--revision", help="branch, tag or commit of the model")


def _plan(options: argparse.Namespace) -> int:
    from .. import plan

    chosen = {**arguments_for(plan, options), "train": None}
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
    return show(plan(**chosen), options)
