"""From options to arguments, and from results to what is printed."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Iterable
from typing import Any

from ..errors import ConfigurationError, DataError


def run_verb(options: argparse.Namespace) -> int:
    """Call the function that has the name of the command, with the options that are its arguments."""
    import transplant_hf

    verb = getattr(transplant_hf, options.command)
    return show(verb(**arguments_for(verb, options)), options)


def show(result: Any, options: argparse.Namespace) -> int:
    """Print a result on standard output, for people or as JSON, and flush it; return the exit status."""
    from ..storage import writing

    options.printed = True  # no error is printed as JSON after it
    with writing("the result on standard output", "Files that the command wrote are complete."):
        print(json.dumps(result.to_dict(), indent=2) if options.json else result)
        sys.stdout.flush()
    return 0 if result else 1


def arguments_for(function: Callable[..., Any], options: argparse.Namespace) -> dict[str, Any]:
    """Return the options that are given and have the names of a function's parameters, or are for loading a model."""
    parameters = inspect.signature(function).parameters
    found = {name: value for name, value in vars(options).items() if name in parameters and value is not None}
    passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return {**found, **loading_arguments(options)} if passes_on else found


def loading_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that are given."""
    names = ("revision", "dtype", "device_map", "gguf_file", "trust_remote_code")
    arguments = {name: getattr(options, name, None) for name in names}
    arguments |= {"donors": getattr(options, "inserted", None), "quantization_config": _quantization(options)}
    return {name: value for name, value in arguments.items() if value is not None}


def _quantization(options: argparse.Namespace) -> Any:
    """Return the quantization that the options name."""
    bits = getattr(options, "bits", None)
    if bits is None:
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigurationError(f"--load-in-{bits}bit needs the package bitsandbytes: pip install bitsandbytes.")
    from transformers import BitsAndBytesConfig

    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    computed_in = None if options.dtype == "auto" else options.dtype
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=computed_in)


def check_output(options: argparse.Namespace) -> None:
    """Exit with a usage error where there is nowhere to write to."""
    if options.output is None and options.push_to is None:
        options.usage_error("give a folder to write, or --push-to-hub REPO")
    if options.private and options.push_to is None:
        options.usage_error("--private goes with --push-to-hub")


def text_source(specification: str | None, options: argparse.Namespace) -> Any:
    """Return the text of a specification such as `law=user/cases:test`; `None` stays `None`.

    The options are those of all texts of a command: each takes those that apply to it, and one of them has to.
    """
    from ..texts import TextSource

    if specification is None:
        return None
    how = {"column": options.column, "config": options.config, "revision": options.text_revision}
    words = [getattr(options, name, None) or () for name in ("text", "general", "held_out", "other")]
    names = {name for word in words for name in ([word] if isinstance(word, str) else word)}
    unused = [{*TextSource.parse(name, **how).unused} for name in names]
    for field in sorted(set.intersection(*unused)):
        flag = "--text-revision" if field == "revision" else f"--{field}"
        options.usage_error(f"{flag} applies to none of the texts: {', '.join(sorted(names))}")
    source = TextSource.parse(specification, streaming=options.streaming, **how)
    left_out: dict[str, Any] = dict.fromkeys(source.unused)
    return dataclasses.replace(source, **left_out)


def text_sources(specifications: Iterable[str], options: argparse.Namespace) -> dict[str, Any]:
    """Return texts by their names."""
    texts: dict[str, Any] = {}
    for specification in specifications:
        source = text_source(specification, options)
        if source.name in texts:
            raise DataError(f"two texts are named {source.name!r}. Name them: NAME={source.data}.")
        texts[str(source.name)] = source
    return texts
