"""`transplant-hf generate`."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from .command import command, show
from .options import add_donors, add_loading, add_number, add_quantization, arguments_for, loading_arguments


def add(commands: Any) -> None:
    """Add the command."""
    parser = command(
        commands,
        "generate",
        _run,
        "continue a prompt with the donors of a model and without, side by side, by greedy decoding",
        'generate user/gpt2-law "The court held that"',
        'generate openai-community/gpt2 "The court held that" --donor user/gpt2-law@10 --max-new-tokens 40',
    )
    parser.add_argument("model", metavar="MODEL", help="Hub id or folder of a donor, a transplant or a model")
    parser.add_argument("prompt", metavar="PROMPT", help="text to continue, or the message to a chat model")
    add_donors(parser)
    parser.add_argument("--off", action="store_true", help="generate only without the donors")
    add_number(parser, "--max-new-tokens", "maximum number of tokens to generate", 60)
    parser.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="put the prompt into the chat template (default: if the tokenizer has one)",
    )
    add_loading(parser)
    add_quantization(parser)


def _run(options: argparse.Namespace) -> int:
    from .. import generate

    done = generate(**{**arguments_for(generate, options), **loading_arguments(options)})
    if done.chat and options.chat is None:
        print("the prompt is in the model's chat template; --no-chat continues it as it is", file=sys.stderr)
    show(done, options)
    return 0
