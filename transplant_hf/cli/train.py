"""`transplant-hf train` and `transplant-hf recover`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .command import add_overwrite, command, show
from .reading import TEXT_HELP, add_loading_options, add_text_options, loading_arguments, text_source, text_sources
from .values import number, share, whole

__all__ = ["add"]

_DONOR_OPTIONS = (
    "method",
    "mode",
    "init",
    "position",
    "donor_layers",
    "start_layers",
    "donor_name",
    "distillation",
    "strength",
)
_SHARED_OPTIONS = (
    "block_length",
    "held_out_blocks",
    "replay_share",
    "learning_rate",
    "seed",
    "cache_prefix",
    "prefix_cache_limit",
    "bf16",
)


def add(commands: Any) -> None:
    """Add the commands."""
    training = command(
        commands,
        "train",
        _train,
        "train a donor on a text, inside a frozen recipient",
        "train openai-community/gpt2 law.txt gpt2-law --general wikitext.txt --steps 1000",
    )
    _add_shared(training, "RECIPIENT", "Hub id or folder of a model; of a transplant, which then gets one more donor")
    training.add_argument(
        "--method",
        choices=("in_place", "standalone"),
        default="in_place",
        help="inside the recipient, or alone between its embeddings and its head as in the paper (default: in_place)",
    )
    training.add_argument(
        "--mode", choices=("insert", "replace"), default="insert", help="add layers, or train the ones there"
    )
    training.add_argument("--init", choices=("identity", "copy"), default="identity", help="how the donor starts")
    training.add_argument(
        "--position", type=int, help="recipient layers that run before it (default: L-1; L-k to replace)"
    )
    training.add_argument(
        "--layers", type=whole(), default=3, dest="donor_layers", metavar="K", help="how many (default: 3)"
    )
    training.add_argument("--start-layers", type=int, nargs="+", metavar="N", help="recipient layers it starts from")
    training.add_argument("--name", dest="donor_name", help="what to call it (default: the name of the output)")
    training.add_argument(
        "--distillation", type=number(), default=0.0, help="weight of KL to the untouched recipient (default: 0)"
    )
    training.add_argument(
        "--strength", type=number(), help="recommended strength (default: 1; 0.75 without general text)"
    )
    recovery = command(
        commands,
        "recover",
        _recover,
        "train chosen parts of a transplant together for a few steps",
        "recover user/gpt2-law law.txt gpt2-law-recovered --parts donor neighbors --steps 50",
    )
    _add_shared(recovery, "TRANSPLANT", "Hub id or folder of a transplant or donor", learning_rate=1e-3)
    recovery.add_argument(
        "--parts",
        nargs="+",
        choices=("donor", "neighbors", "neighbours", "norms", "gate"),
        default=["donor", "neighbors"],
        help="what is trained (default: donor neighbors)",
    )
    recovery.add_argument(
        "--neighbors", "--neighbours", type=whole(0), default=1, help="recipient layers on either side (default: 1)"
    )
    recovery.add_argument("--donors", nargs="+", metavar="NAME", help="only these (default: all)")


def _add_shared(parser: argparse.ArgumentParser, what: str, told: str, learning_rate: float | None = None) -> None:
    parser.add_argument("model", metavar=what, help=told)
    parser.add_argument("text", metavar="TEXT", help=f"text to learn: {TEXT_HELP}")
    parser.add_argument(
        "output", metavar="OUTPUT", type=Path, nargs="?", help="folder; may be left out with --push-to-hub"
    )
    add_overwrite(parser)
    parser.add_argument("--general", metavar="TEXT", help="general text to replay against forgetting")
    parser.add_argument(
        "--held-out",
        action="append",
        metavar="TEXT",
        help="text to measure on before and after; may be given several times. What is found is recorded",
    )
    parser.add_argument(
        "--held-out-blocks", type=whole(), metavar="N", help="most blocks of each such text (default: all)"
    )
    add_text_options(parser)
    parser.add_argument("--replay-share", type=share, help="its share of each batch (default: 0.25)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=whole(), default=-1, help="optimizer steps")
    length.add_argument("--epochs", type=number(above=0), default=1.0, help="times through the text (default: 1)")
    parser.add_argument("--batch-size", type=whole(), default=8, help="blocks in a step and process (default: 8)")
    chosen = "by method and width" if learning_rate is None else f"{learning_rate:g}"
    parser.add_argument(
        "--learning-rate", type=number(above=0), default=learning_rate, help=f"the peak (default: {chosen})"
    )
    parser.add_argument("--seed", type=whole(0, 2**32 - 1), default=42, help="random seed (default: 42)")
    parser.add_argument("--bf16", action="store_true", help="train under bfloat16 autocast")
    parser.add_argument(
        "--cache-prefix",
        choices=("auto", "memory", "disk", "off"),
        default="auto",
        help="where hidden states before the trained part are kept (default: auto)",
    )
    parser.add_argument("--prefix-cache-limit", default="20GB", help="most bytes for that (default: 20GB)")
    parser.add_argument("--save-steps", type=whole(), default=200, help="steps between checkpoints (default: 200)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint, also for more steps")
    parser.add_argument("--keep-checkpoints", action="store_true", help="keep them when all is done")
    add_loading_options(parser)
    parser.add_argument("--push-to-hub", metavar="REPO", help="upload the result to this repository, as one commit")
    parser.add_argument("--private", action="store_true", help="make that repository private if it is new")


def _train(options: argparse.Namespace) -> int:
    from ..training import train

    chosen = {name: getattr(options, name) for name in _DONOR_OPTIONS if getattr(options, name) is not None}
    return _run(options, train, chosen)


def _recover(options: argparse.Namespace) -> int:
    from ..training import recover

    return _run(options, recover, {name: getattr(options, name) for name in ("parts", "neighbors", "donors")})


def _wrong_usage(options: argparse.Namespace) -> str | None:
    if options.output is None and options.push_to_hub is None:
        return "name a folder to write, or --push-to-hub REPO"
    if options.private and options.push_to_hub is None:
        return "--private goes with --push-to-hub"
    if options.replay_share is not None and options.general is None:
        return "--replay-share is the share of --general; give both, or neither"
    if options.held_out_blocks is not None and options.held_out is None:
        return "--held-out-blocks goes with --held-out"
    return None


def _run(options: argparse.Namespace, run: Any, chosen: dict[str, Any]) -> int:
    wrong = _wrong_usage(options)
    if wrong:
        print(f"transplant-hf: {wrong}", file=sys.stderr)
        return 2
    chosen |= {name: getattr(options, name) for name in _SHARED_OPTIONS if getattr(options, name) is not None}
    loaded = loading_arguments(options)
    report = run(
        options.model,
        text_source(options.text, options),
        options.output,
        general=text_source(options.general, options),
        held_out=text_sources(options.held_out, options) if options.held_out else None,
        push_to=options.push_to_hub,
        push_kwargs={"private": True} if options.private else {},
        resume=options.resume,
        overwrite=options.overwrite,
        keep_checkpoints=options.keep_checkpoints,
        revision=loaded.pop("revision", None),
        model_kwargs=loaded,
        max_steps=options.steps,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        save_steps=options.save_steps,
        logging_steps=10,
        disable_tqdm=options.json,
        **chosen,
    )
    show(report, options)
    return 0
