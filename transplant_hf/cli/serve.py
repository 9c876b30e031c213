"""`transplant-hf serve`."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from typing import Any

from ..errors import ConfigurationError
from .command import command
from .options import add_donors, add_loading, add_number, add_quantization, loading_arguments
from .values import whole

_TOKEN = "TRANSPLANT_HF_SERVE_TOKEN"
_NEEDED = ("fastapi", "uvicorn", "openai")


def add(commands: Any) -> None:
    """Add the command."""
    parser = command(
        commands,
        "serve",
        _run,
        "serve a model with the API of OpenAI; the field `model` of a request chooses donors",
        "serve user/gpt2-law",
        "serve openai-community/gpt2 --donor user/gpt2-law@10 --donor user/gpt2-code --port 8000",
    )
    parser.add_argument("model", metavar="MODEL", help="Hub id or folder of a donor, a transplant or a model")
    add_donors(parser)
    parser.add_argument("--name", help="what requests call the model without donors (default: the recipient's name)")
    parser.add_argument("--host", default="localhost", help="address to listen at (default: localhost)")
    add_number(parser, "--port", "port to listen at", 8000, whole(0, 65535))
    add_loading(parser)
    add_quantization(parser)


def _run(options: argparse.Namespace) -> int:
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigurationError(f"serve needs {', '.join(missing)}: pip install 'transformers[serving]'.")
    import uvicorn

    from ..evaluation.models_and_texts import find_tokenizer, model_to_measure
    from ..serving.server import build_app

    arguments = loading_arguments(options)
    loaded = model_to_measure(options.model, arguments.pop("revision", None), arguments)
    config = getattr(loaded.model, "transplant_config", None)
    name = options.name or (config.recipient if config is not None else options.model)
    app = build_app(loaded.model, find_tokenizer(loaded), name, os.environ.get(_TOKEN) or None)
    donors = "".join(f", {donor}" for donor in getattr(loaded.model, "strengths", ()))
    print(f"models: {name}{donors}", file=sys.stderr)
    uvicorn.run(app, host=options.host, port=options.port)
    return 0
