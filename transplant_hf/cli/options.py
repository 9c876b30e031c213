"""What commands share: a summary, an example, `--json`, how they end, their options, and the arguments these become."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import inspect
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError, DataError

EXIT_STATUS = "exit status: 0 success, 1 error, 2 usage error, 130 interrupted by Ctrl-C"
DONOR = "DONOR[@POSITION]"
TEXT_HELP = (
    "a .txt, .md, .json, .jsonl, .parquet or .csv file, a folder of such files, or a dataset on the Hub, as "
    "[NAME=]DATA[:SPLIT]"
)
Parser = argparse.ArgumentParser
_DTYPES = {
    **dict.fromkeys(("bf16", "bfloat16"), "bfloat16"),
    **dict.fromkeys(("fp16", "half", "f16", "float16"), "float16"),
    **dict.fromkeys(("fp32", "float", "f32", "float32"), "float32"),
    **dict.fromkeys(("fp64", "double", "float64"), "float64"),
    "auto": "auto",
}


def command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    *examples: str,
    check: Callable[[argparse.Namespace], None] | None = None,
) -> argparse.ArgumentParser:
    """Add a command; `check` finds wrong usage, before torch is imported for `run`."""
    lines = "\n".join(f"  transplant-hf {example}" for example in examples)
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"example:\n{lines}\n\n{EXIT_STATUS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=run, check=check, usage_error=parser.error, printed=False)
    return parser


def old_spelling(parser: argparse.ArgumentParser, old: str, new: str, dest: str, **arguments: Any) -> None:
    """Accept an old option for one release, with a warning on standard error; it is added after the new one."""
    parser.add_argument(old, action=_OldSpelling, new=new, dest=dest, help=argparse.SUPPRESS, **arguments)


class _OldSpelling(argparse.Action):
    def __init__(self, option_strings: list[str], dest: str, new: str, append: bool = False, **arguments: Any) -> None:
        super().__init__(option_strings, dest, **arguments)
        self.new, self.append = new, append

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        print(f"{parser.prog}: {option} is deprecated; use {self.new}", file=sys.stderr)
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest) or ()), values] if self.append else values)


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


def run_verb(options: argparse.Namespace) -> int:
    """Call the function that has the name of the command, with the options that are its arguments."""
    import transplant_hf

    verb = getattr(transplant_hf, options.command)
    return show(verb(**arguments_for(verb, options)), options)


def add_number(
    parser: Any,
    flag: str,
    description: str,
    default: float | None = None,
    kind: Callable[[str], Any] | None = None,
    metavar: str = "N",
    **more: Any,
) -> None:
    """Add an option for a number, by default a whole number from 1; its help names the default value."""
    described = description if default is None else f"{description} (default: {default:g})"
    parser.add_argument(flag, type=kind or whole(), default=default, metavar=metavar, help=described, **more)


def add_choice(parser: Parser, flag: str, choices: Sequence[str], description: str) -> None:
    """Add an option with a few values; the first is the default."""
    parser.add_argument(flag, choices=choices, default=choices[0], help=f"{description} (default: {choices[0]})")


def add_seed(parser: Parser) -> None:
    """Add the random seed."""
    add_number(parser, "--seed", "random seed", 42, whole(0, 2**32 - 1))


def add_layers(parser: Any, flag: str, description: str) -> None:
    """Add an option that says which layers, such as 4 5 6 or 4-6."""
    parser.add_argument(flag, type=layer_range, action=LayerNumbers, nargs="+", metavar="N", help=description)


def add_donors(parser: Parser) -> None:
    """Add `--donor`, which may be repeated."""
    description = "insert this donor (Hub id or folder) after POSITION recipient layers (default: the position that it "
    description += "recommends). May be repeated"
    parser.add_argument("--donor", action="append", dest="donors", metavar=DONOR, help=description)


# -- Output --------------------------------------------------------------------------------------------------------


def add_overwrite(parser: Parser) -> None:
    """Add the option of every command that writes files."""
    description = "replace files that transplant_hf wrote to the output before; other files stay (default: refuse an "
    parser.add_argument("--overwrite", action="store_true", help=f"{description}output that is not empty)")


def add_output(parser: Parser) -> None:
    """Add a folder to write and a repository to push to."""
    output = "folder to write; optional with --push-to-hub"
    parser.add_argument("output", metavar="OUTPUT", type=Path, nargs="?", help=output)
    add_overwrite(parser)
    push = "also upload the result to this repository, in one commit"
    parser.add_argument("--push-to-hub", metavar="REPO", dest="push_to", help=push)
    add_private(parser)
    license = "license for the card, such as apache-2.0 (default: the one that is recorded, or the recipient's)"
    parser.add_argument("--license", help=license)


def add_private(parser: Parser) -> None:
    """Add the option for new repositories."""
    parser.add_argument("--private", action="store_true", default=None, help="make the repository private if it is new")


def check_output(options: argparse.Namespace) -> None:
    """Exit with a usage error where there is nowhere to write to."""
    if options.output is None and options.push_to is None:
        options.usage_error("give a folder to write, or --push-to-hub REPO")
    if options.private and options.push_to is None:
        options.usage_error("--private goes with --push-to-hub")


def add_shard_size(parser: Parser) -> None:
    """Add the size of weight files."""
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="largest weight file (default: 5GB)")


# -- Texts ---------------------------------------------------------------------------------------------------------


def add_text(parser: Parser, block_length: bool = True) -> None:
    """Add options on how text is read."""
    parser.add_argument("--column", help='column with the text (default: "text", or the only column of strings)')
    parser.add_argument("--config", help="configuration of a dataset on the Hub")
    parser.add_argument("--text-revision", metavar="REVISION", help="branch, tag or commit of that dataset")
    parser.add_argument("--streaming", action="store_true", help="stream the dataset instead of downloading all of it")
    if block_length:
        add_number(parser, "--block-length", "tokens in a block (default: the model's context length, at most 1024)")


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


# -- Loading -------------------------------------------------------------------------------------------------------


def add_dtype(parser: Parser, *more: str, note: str = "") -> None:
    """Add the dtype of the model."""
    description = f"such as float32 or bfloat16 (default: as in the checkpoint{note})"
    read = lambda text: text if text in more else dtype(text)  # noqa: E731
    parser.add_argument("--dtype", type=read, default="auto", help=description)


def add_trust(parser: Parser) -> None:
    """Add the option that lets code of a repository run."""
    description = "run modeling code of the model's repository"
    parser.add_argument("--trust-remote-code", action="store_true", default=None, help=description)


def add_loading(parser: Parser) -> None:
    """Add options on how the model is loaded."""
    parser.add_argument("--revision", help="branch, tag or commit of the model")
    add_dtype(parser)
    parser.add_argument("--device-map", metavar="DEVICE", help='such as "cuda" or "auto" (default: the CPU)')
    parser.add_argument("--gguf-file", metavar="NAME", help="load the model from this GGUF file of its folder or repo")
    add_trust(parser)


def add_quantization(parser: Parser) -> None:
    """Add options that quantize the model while it is loaded."""
    bits = parser.add_mutually_exclusive_group()
    for width, how in ((4, "NF4"), (8, "LLM.int8")):
        description = f"quantize the model to {width} bits ({how}) while it is loaded; needs bitsandbytes"
        bits.add_argument(f"--load-in-{width}bit", action="store_true", help=description)


def _quantization(options: argparse.Namespace) -> Any:
    """Return the quantization that the options name."""
    in_4bit, in_8bit = (getattr(options, f"load_in_{width}bit", False) for width in (4, 8))
    if not (in_4bit or in_8bit):
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigurationError(
            "--load-in-4bit and --load-in-8bit need the package bitsandbytes: pip install bitsandbytes."
        )
    from transformers import BitsAndBytesConfig

    if in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    computed_in = None if options.dtype == "auto" else options.dtype
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=computed_in)


def loading_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that are given."""
    names = ("revision", "dtype", "device_map", "gguf_file", "trust_remote_code", "donors")
    arguments = {name: getattr(options, name, None) for name in names}
    arguments["quantization_config"] = _quantization(options)
    return {name: value for name, value in arguments.items() if value is not None}


# -- Values, checked while arguments are read: a wrong one is a usage error, before any work is done -------------------


class LayerNumbers(argparse.Action):
    """Store the numbers of one or several ranges of layers as one list."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        """Store them."""
        ranges: Sequence[range] = values
        setattr(namespace, self.dest, [number for layers in ranges for number in layers])


def layer_range(text: str) -> range:
    """Read the number of a layer, such as 4, or the first and last number of several, such as 4-6."""
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text, re.ASCII)
    layers = range(int(found[1]), int(found[2] or found[1]) + 1) if found else range(0)
    if not layers:
        raise argparse.ArgumentTypeError(f"must be layer numbers, such as 4 5 6 or 4-6, got {text!r}")
    return layers


def whole(least: int = 1, most: float = math.inf) -> Callable[[str], int]:
    """Return a reader of whole numbers."""

    def read(text: str) -> int:
        value = int(text)
        if not least <= value <= most:
            limit = f"at least {least}" if most == math.inf else f"in {least}..{most:g}"
            raise argparse.ArgumentTypeError(f"must be {limit}, got {value}")
        return value

    read.__name__ = "whole number"  # argparse puts it into its messages
    return read


def number(above: float = -math.inf) -> Callable[[str], float]:
    """Return a reader of finite numbers."""

    def read(text: str) -> float:
        value = float(text)
        if not math.isfinite(value) or value <= above:
            limit = "" if above == -math.inf else f" above {above:g}"
            raise argparse.ArgumentTypeError(f"must be a finite number{limit}, got {text}")
        return value

    read.__name__ = "number"
    return read


def share(text: str) -> float:
    """Read a share: at least 0 and below 1."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 1, got {text}")
    return value


def any_dtype(text: str) -> str:
    """Return torch's name of a dtype for a common short one, and other names as they are."""
    return _DTYPES.get(text.lower(), text.lower())


def dtype(text: str) -> str:
    """Read the dtype of a model, by its name in torch or a common short name."""
    if text.lower() not in _DTYPES:
        known = ", ".join(dict.fromkeys(["auto", *_DTYPES.values()]))
        raise argparse.ArgumentTypeError(f"must be one of {known}, or bf16, fp16, fp32, got {text!r}")
    return any_dtype(text)
