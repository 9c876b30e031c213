"""What commands that read text have in common: where it is, how it is read, and how the model is loaded."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from ..errors import DataError
from .values import dtype, whole

__all__ = [
    "TEXT_HELP",
    "add_loading_options",
    "add_measuring_options",
    "add_text_options",
    "loading_arguments",
    "measuring_arguments",
    "text_source",
    "text_sources",
]

TEXT_HELP = "a .txt, .md, .json, .jsonl, .parquet or .csv file, a folder of those, or a Hub dataset, as NAME=DATA:SPLIT"


def add_text_options(parser: argparse.ArgumentParser) -> None:
    """Add options on how text is read."""
    parser.add_argument("--column", help='column with the text (default: "text", else the only one of strings)')
    parser.add_argument("--config", help="configuration of a dataset on the Hub")
    parser.add_argument("--text-revision", help="its branch, tag or commit")
    parser.add_argument("--streaming", action="store_true", help="read it no further than needed")
    parser.add_argument(
        "--block-length",
        type=whole(),
        metavar="N",
        help="tokens in a block (default: what the model reads, at most 1024)",
    )


def add_measuring_options(parser: argparse.ArgumentParser) -> None:
    """Add options on how perplexity is measured."""
    parser.add_argument("--max-tokens", type=whole(2), metavar="N", help="read no further in each text")
    parser.add_argument("--stride", type=whole(), metavar="N", help="window stride in tokens (default: no overlap)")
    parser.add_argument("--batch-size", type=whole(), metavar="N", default=8, help="windows read at once (default: 8)")


def add_loading_options(parser: argparse.ArgumentParser) -> None:
    """Add options on how the model is loaded."""
    parser.add_argument("--revision", help="branch, tag or commit of the model")
    parser.add_argument(
        "--dtype", type=dtype, default="auto", help="such as float32 or bfloat16 (default: as it is saved)"
    )
    parser.add_argument("--device-map", metavar="WHERE", help='such as "cuda" or "auto" (default: the CPU)')
    parser.add_argument("--gguf-file", metavar="NAME", help="read the model from this GGUF file of its folder or repo")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the model's own modelling code")


def text_source(specification: str | None, options: argparse.Namespace) -> Any:
    """Read what names a text, such as `law=user/cases:test`; `None` stays `None`."""
    from ..texts import TextSource

    if specification is None:
        return None
    return TextSource.parse(
        specification,
        column=options.column,
        config=options.config,
        revision=options.text_revision,
        streaming=options.streaming,
    )


def text_sources(specifications: Iterable[str], options: argparse.Namespace) -> dict[str, Any]:
    """Return texts by their names.

    Args:
        specifications: What names each.
        options: How they are read.

    Raises:
        DataError: Two have one name.
    """
    found: dict[str, Any] = {}
    for text in specifications:
        source = text_source(text, options)
        if source.name in found:
            raise DataError(f"two texts are named {source.name!r}. Name them: NAME={source.data}.")
        found[str(source.name)] = source
    return found


def measuring_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `evaluate` and `sweep` on how text is read."""
    return {name: getattr(options, name) for name in ("max_tokens", "block_length", "stride", "batch_size")}


def loading_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `from_pretrained`."""
    known = {"revision": options.revision, "dtype": options.dtype, "device_map": options.device_map}
    known["gguf_file"] = options.gguf_file
    trust = {"trust_remote_code": True} if options.trust_remote_code else {}
    return {**{name: value for name, value in known.items() if value is not None}, **trust}
