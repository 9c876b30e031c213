"""`transplant-hf train` and `transplant-hf recover`."""

from __future__ import annotations

import argparse
from typing import Any

from .options import arguments_for, check_output, loading_arguments, show, text_source, text_sources
from .parser import TEXT_HELP, Parser, command, number, share, whole


def add_train(commands: Any) -> None:
    """Add `train`."""
    summary = "train a donor on a text, inside a frozen recipient"
    example = "train openai-community/gpt2 law.txt gpt2-law --general wikitext.txt --steps 1000"
    train = command(commands, "train", _run, summary, example, check=_check)
    train.add_argument("model", metavar="RECIPIENT", help="Hub id or folder of a model or of a transplant")
    _add_shared(train)
    method = "train inside the recipient, or between its embeddings and its head as the paper does"
    train.add_choice("--method", ("in_place", "standalone"), method)
    train.add_choice("--mode", ("insert", "replace"), "add layers, or train layers in the place of existing ones")
    init = "initialize the donor so that it changes nothing, or as a copy of recipient layers"
    train.add_argument("--init", choices=("identity", "copy"), help=f"{init} (default: identity; copy to replace)")
    position = "number of recipient layers before the donor (default: spread evenly through a recipient of at least 12 "
    position += "layers; L-1 in others and with streamed layers, or L-K to replace)"
    place = train.add_mutually_exclusive_group()
    train.add_number("--position", position, None, whole(0), "P", group=place)
    spread = "spread the donor through the recipient: the position of each part, such as 10 20 29"
    place.add_argument("--positions", nargs="+", type=whole(0), dest="position", metavar="P", help=spread)
    count = "number of layers (default: 3, or as many as --start-layers or --positions)"
    train.add_number("--count", count, metavar="K", dest="donor_layers")
    train.old_spelling("--layers", "--count", "donor_layers", type=whole())
    train.add_layers("--start-layers", "recipient layers to start from, such as 4 5 6 or 4-6")
    train.add_argument("--name", dest="donor_name", help="name of the donor (default: the name of the output)")
    stream = "leave the layers before the donor in their files and read each of them once, so that they take no memory "
    stream += "(default: if the recipient does not fit into free memory)"
    train.add_argument("--stream-prefix", action=argparse.BooleanOptionalAction, help=stream)
    train.add_number("--distillation", "weight of the KL divergence from the recipient", 0.0, number(), "W")
    strength = "strength to recommend (default: 1; 0.75 without general text); with --mode replace, weights are "
    strength += "interpolated: 0 for those before training, 1 (default) for the trained ones"
    train.add_number("--strength", strength, None, number(), "S")


def add_recover(commands: Any) -> None:
    """Add `recover`."""
    summary = "train some parts of a transplant together for a few steps"
    example = "recover user/gpt2-law law.txt gpt2-law-recovered --parts donor neighbors --steps 50"
    recover = command(commands, "recover", _run, summary, example, check=_check)
    recover.add_argument("model", metavar="TRANSPLANT", help="Hub id or folder of a transplant or donor")
    _add_shared(recover, learning_rate=1e-3)
    known = ("donor", "neighbors", "neighbours", "norms", "gate")  # "neighbours" for one release
    parts = "parts to train: donor, neighbors (recipient layers beside it), norms (only the norms of both), gate (the "
    parts += "donor's strength) (default: donor neighbors)"
    default = ["donor", "neighbors"]
    recover.add_argument("--parts", nargs="+", choices=known, default=default, metavar="PART", help=parts)
    recover.add_number("--neighbors", "recipient layers on each side", 1, whole(0))
    recover.old_spelling("--neighbours", "--neighbors", "neighbors", type=whole(0))
    recover.add_argument("--donors", nargs="+", metavar="NAME", help="only these donors (default: all)")


def _add_shared(parser: Parser, learning_rate: float | None = None) -> None:
    parser.add_argument("text", metavar="TEXT", help=f"text to train on: {TEXT_HELP}")
    parser.add_output()
    parser.add_argument("--general", metavar="TEXT", help="general text to replay, so that the model forgets less")
    held_out = "measure perplexity on this text before and after, and record it. May be repeated"
    parser.add_argument("--held-out", action="append", metavar="TEXT", help=held_out)
    parser.add_number("--held-out-blocks", "maximum number of blocks of each such text (default: all)")
    parser.add_text()
    parser.add_number("--replay-share", "general text in each batch (default: 0.25)", None, share, "S")
    length = parser.add_mutually_exclusive_group()
    parser.add_number("--steps", "optimizer steps (default: as many as --epochs takes)", dest="max_steps", group=length)
    parser.add_number("--epochs", "passes over the text", 1.0, number(above=0), dest="num_train_epochs", group=length)
    parser.add_number("--batch-size", "blocks per step and process", 8, dest="per_device_train_batch_size")
    rate = "peak learning rate" if learning_rate else "peak learning rate (default: by method and width)"
    parser.add_number("--learning-rate", rate, learning_rate, number(above=0), "LR")
    parser.add_seed()
    parser.add_argument("--bf16", action="store_true", help="train with bfloat16 autocast")
    chunk = "tokens in a chunk of the loss, 0 for the model's own loss (default: as many as have 128 MiB of logits)"
    parser.add_number("--loss-chunk", chunk, None, whole(0))
    cache = "where to keep hidden states from before the trained layers"
    parser.add_choice("--cache-prefix", ("auto", "memory", "disk", "off"), cache)
    limit = "largest size of that cache (default: 20GB)"
    parser.add_argument("--prefix-cache-limit", default="20GB", metavar="SIZE", help=limit)
    folder = "keep that cache on disk, in this folder, which later runs use again (default: beside the output, removed "
    parser.add_argument("--prefix-cache-dir", metavar="DIR", help=f"{folder}at the end)")
    parser.add_number("--save-steps", "steps between checkpoints", 200)
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint, also for more steps")
    parser.add_argument("--keep-checkpoints", action="store_true", help="keep checkpoints when training is done")
    parser.add_loading()
    parser.add_quantization()


def _check(options: argparse.Namespace) -> None:
    check_output(options)
    if options.replay_share is not None and options.general is None:
        options.usage_error("--replay-share goes with --general")
    if options.held_out_blocks is not None and options.held_out is None:
        options.usage_error("--held-out-blocks goes with --held-out")


def _run(options: argparse.Namespace) -> int:
    from accelerate import PartialState

    from .. import recover, train
    from ..training import DonorTrainingArguments, RecoveryArguments

    verb, kind = (train, DonorTrainingArguments) if options.command == "train" else (recover, RecoveryArguments)
    loading = loading_arguments(options)
    report = verb(
        options.model,
        text_source(options.text, options),
        options.output,
        general=text_source(options.general, options),
        held_out=text_sources(options.held_out, options) if options.held_out else None,
        push_kwargs={"private": True} if options.private else {},
        revision=loading.pop("revision", None),
        model_kwargs=loading,
        logging_steps=10,
        disable_tqdm=options.json,
        push_to=options.push_to,
        resume=options.resume,
        overwrite=options.overwrite,
        keep_checkpoints=options.keep_checkpoints,
        license=options.license,
        **arguments_for(kind, options),
    )
    return show(report, options) if PartialState().is_main_process else 0
