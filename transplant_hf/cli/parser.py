"""The parser of a command: options that commands share, and values that are checked while they are read."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

EXIT_STATUS = "exit status: 0 success, 1 error, 2 usage error, 130 interrupted by Ctrl-C"
DONOR = "DONOR[@POSITION]"
TEXT_HELP = (
    "a .txt, .md, .json, .jsonl, .parquet or .csv file, a folder of such files, or a dataset on the Hub, as "
    "[NAME=]DATA[:SPLIT]"
)
_DTYPES = {
    **dict.fromkeys(("bf16", "bfloat16"), "bfloat16"),
    **dict.fromkeys(("fp16", "half", "f16", "float16"), "float16"),
    **dict.fromkeys(("fp32", "float", "f32", "float32"), "float32"),
    **dict.fromkeys(("fp64", "double", "float64"), "float64"),
    "auto": "auto",
}


class Parser(argparse.ArgumentParser):
    """A parser with the options that commands share."""

    def old_spelling(self, old: str, new: str, dest: str, **arguments: Any) -> None:
        """Accept an old option for one release, with a warning on standard error; it is added after the new one."""
        self.add_argument(old, action=_OldSpelling, new=new, dest=dest, help=argparse.SUPPRESS, **arguments)

    def add_number(
        self,
        flag: str,
        description: str,
        default: float | None = None,
        kind: Callable[[str], Any] | None = None,
        metavar: str = "N",
        group: Any = None,
        **more: Any,
    ) -> None:
        """Add an option for a number, by default a whole number from 1; its help names the default value."""
        text = description if default is None else f"{description} (default: {default:g})"
        (group or self).add_argument(flag, type=kind or whole(), default=default, metavar=metavar, help=text, **more)

    def add_choice(self, flag: str, choices: Sequence[str], description: str) -> None:
        """Add an option with a few values; the first is the default."""
        self.add_argument(flag, choices=choices, default=choices[0], help=f"{description} (default: {choices[0]})")

    def add_seed(self) -> None:
        """Add the random seed."""
        self.add_number("--seed", "random seed", 42, whole(0, 2**32 - 1))

    def add_layers(self, flag: str, description: str, group: Any = None) -> None:
        """Add an option that says which layers, such as 4 5 6 or 4-6."""
        several: Any = {"action": _LayerNumbers, "nargs": "+"}
        (group or self).add_argument(flag, type=layer_range, metavar="N", help=description, **several)

    def add_model(self) -> None:
        """Add the model that runs."""
        self.add_argument("model", metavar="MODEL", help="Hub id or folder of a donor, a transplant or a model")

    def add_donors(self) -> None:
        """Add `--donor`, which may be repeated."""
        description = (
            "insert this donor (Hub id or folder) after POSITION recipient layers (default: the position that it "
            "recommends). May be repeated"
        )
        self.add_argument("--donor", action="append", dest="inserted", metavar=DONOR, help=description)

    def add_overwrite(self) -> None:
        """Add the option of every command that writes files."""
        description = "replace files that transplant_hf wrote to the output before; other files stay (default: refuse "
        self.add_argument("--overwrite", action="store_true", help=f"{description}an output that is not empty)")

    def add_output(self) -> None:
        """Add a folder to write and a repository to push to."""
        output = "folder to write; optional with --push-to-hub"
        self.add_argument("output", metavar="OUTPUT", type=Path, nargs="?", help=output)
        self.add_overwrite()
        push = "also upload the result to this repository, in one commit"
        self.add_argument("--push-to-hub", metavar="REPO", dest="push_to", help=push)
        self.add_private()
        license = "license for the card, such as apache-2.0 (default: the one that is recorded, or the recipient's)"
        self.add_argument("--license", help=license)

    def add_private(self) -> None:
        """Add the option for new repositories."""
        description = "make the repository private if it is new"
        self.add_argument("--private", action="store_true", default=None, help=description)

    def add_shard_size(self) -> None:
        """Add the size of weight files."""
        self.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="largest weight file (default: 5GB)")

    def add_text(self, block_length: bool = True) -> None:
        """Add options on how text is read."""
        self.add_argument("--column", help='column with the text (default: "text", or the only column of strings)')
        self.add_argument("--config", help="configuration of a dataset on the Hub")
        self.add_argument("--text-revision", metavar="REVISION", help="branch, tag or commit of that dataset")
        self.add_argument("--streaming", action="store_true", help="stream the dataset instead of downloading it")
        if block_length:
            self.add_number("--block-length", "tokens in a block (default: the model's context length, at most 1024)")

    def add_dtype(self, *more: str, note: str = "") -> None:
        """Add the dtype of the model."""
        description = f"such as float32 or bfloat16 (default: as in the checkpoint{note})"
        self.add_argument("--dtype", type=partial(dtype, more=more), default="auto", help=description)

    def add_trust(self) -> None:
        """Add the option that lets code of a repository run."""
        description = "run modeling code of the model's repository"
        self.add_argument("--trust-remote-code", action="store_true", default=None, help=description)

    def add_loading(self) -> None:
        """Add options on how the model is loaded."""
        self.add_argument("--revision", help="branch, tag or commit of the model")
        self.add_dtype()
        self.add_argument("--device-map", metavar="DEVICE", help='such as "cuda" or "auto" (default: the CPU)')
        self.add_argument("--gguf-file", metavar="NAME", help="load this GGUF file of the model's folder or repo")
        self.add_trust()

    def add_quantization(self) -> None:
        """Add options that quantize the model while it is loaded."""
        bits = self.add_mutually_exclusive_group()
        for width, how in ((4, "NF4"), (8, "LLM.int8")):
            description = f"quantize the model to {width} bits ({how}) while it is loaded; needs bitsandbytes"
            bits.add_argument(f"--load-in-{width}bit", action="store_const", const=width, dest="bits", help=description)


class _OldSpelling(argparse.Action):
    def __init__(self, option_strings: list[str], dest: str, new: str, append: bool = False, **arguments: Any) -> None:
        super().__init__(option_strings, dest, **arguments)
        self.new, self.append = new, append

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        print(f"{parser.prog}: {option} is deprecated; use {self.new}", file=sys.stderr)
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest) or ()), values] if self.append else values)


def command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    *examples: str,
    check: Callable[[argparse.Namespace], None] | None = None,
) -> Parser:
    """Add a command; `check` finds wrong usage, before torch is imported for `run`."""
    lines = "\n".join(f"  transplant-hf {example}" for example in examples)
    parser: Parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"example:\n{lines}\n\n{EXIT_STATUS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=run, check=check, usage_error=parser.error, printed=False)
    return parser


# -- Values: a wrong one is a usage error, before any work is done -----------------------------------------------------


class _LayerNumbers(argparse.Action):
    """Store the numbers of one or several ranges of layers as one list."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        setattr(namespace, self.dest, [number for layers in values for number in layers])


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


def dtype(text: str, more: Sequence[str] = ()) -> str:
    """Read the dtype of a model, by its name in torch or a common short name; or one of `more` names."""
    if text in more:
        return text
    if text.lower() not in _DTYPES:
        known = ", ".join(dict.fromkeys(["auto", *_DTYPES.values()]))
        raise argparse.ArgumentTypeError(f"must be one of {known}, or bf16, fp16, fp32, got {text!r}")
    return any_dtype(text)
