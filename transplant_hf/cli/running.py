"""`transplant-hf demo`, `generate` and `serve`: models at work."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import socket
import sys
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError
from .options import arguments_for, loading_arguments, show
from .parser import command, whole

_TOKEN = "TRANSPLANT_HF_SERVE_TOKEN"
_SECONDS_TO_END = 10  # of requests that run when the server is stopped
_NEEDED = ("fastapi", "uvicorn", "openai")


def add_demo(commands: Any) -> None:
    """Add `demo`."""
    summary = "train a small recipient and a donor, and compare text with and without it"
    parser = command(commands, "demo", _demo, summary, "demo")
    folder = Path("transplant-demo")
    parser.add_argument("--folder", type=Path, default=folder, help=f"folder for the models (default: {folder})")
    parser.add_overwrite()
    parser.add_argument("--fresh", action="store_true", help="train again, even if the folder has trained models")


def _demo(options: argparse.Namespace) -> int:
    from ..demo import run_demo

    return show(run_demo(**arguments_for(run_demo, options)), options)


def add_generate(commands: Any) -> None:
    """Add `generate`."""
    summary = "continue a prompt with the donors of a model and without, side by side, by greedy decoding"
    examples = (
        'generate user/gpt2-law "The court held that"',
        'generate openai-community/gpt2 "The court held that" --donor user/gpt2-law@10 --max-new-tokens 40',
    )
    parser = command(commands, "generate", _generate, summary, *examples)
    parser.add_model()
    parser.add_argument("prompt", metavar="PROMPT", help="text to continue, or the message to a chat model")
    parser.add_donors()
    parser.add_argument("--off", action="store_true", help="generate only without the donors")
    parser.add_number("--max-new-tokens", "maximum number of tokens to generate", 60)
    chat = "put the prompt into the chat template (default: if the tokenizer has one)"
    parser.add_argument("--chat", action=argparse.BooleanOptionalAction, help=chat)
    parser.add_loading()
    parser.add_quantization()


def _generate(options: argparse.Namespace) -> int:
    from .. import generate

    done = generate(**arguments_for(generate, options))
    if done.chat and options.chat is None:
        print("the prompt is in the model's chat template; --no-chat continues it as it is", file=sys.stderr)
    return show(done, options)


def add_serve(commands: Any) -> None:
    """Add `serve`."""
    summary = "serve a model with the API of OpenAI; the field `model` of a request chooses donors"
    examples = (
        "serve user/gpt2-law",
        "serve openai-community/gpt2 --donor user/gpt2-law@10 --donor user/gpt2-code --port 8000",
    )
    parser = command(commands, "serve", _serve, summary, *examples)
    parser.add_model()
    parser.add_donors()
    name = "name of the model without donors in requests (default: the recipient's name, or that of its folder)"
    parser.add_argument("--name", help=name)
    parser.add_argument("--host", default="localhost", help="address to listen on (default: localhost)")
    parser.add_number("--port", "port to listen on", 8000, whole(0, 65535))
    parser.add_loading()
    parser.add_quantization()


def _serve(options: argparse.Namespace) -> int:
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigurationError(f"serve needs {', '.join(missing)}: pip install 'transformers[serving]'.")
    import uvicorn

    token = os.environ.get(_TOKEN) or None
    if token is not None and not token.isascii():
        raise ConfigurationError(f"{_TOKEN} must be ASCII: it is sent in a header.")
    # Before the model is loaded, which takes time.
    listening = socket.create_server((options.host, options.port))
    from ..evaluation.models_and_texts import find_tokenizer, model_to_measure
    from ..serving.server import build_app

    arguments = loading_arguments(options)
    loaded = model_to_measure(options.model, arguments.pop("revision", None), arguments)
    config = getattr(loaded.model, "transplant_config", None)
    recipient = config.recipient if config is not None else options.model
    name = options.name or (Path(recipient).name if Path(recipient).is_dir() else recipient)
    app = build_app(loaded.model, find_tokenizer(loaded), name, token)
    print(f"models: {', '.join([name, *loaded.model.strengths])}", file=sys.stderr)
    server = uvicorn.Server(uvicorn.Config(app, timeout_graceful_shutdown=_SECONDS_TO_END))
    with listening, contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listening])
    return 0
