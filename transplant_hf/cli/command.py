"""What every command has: a summary, an example, `--json`, and how it ends."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

__all__ = ["HOW_IT_ENDS", "add_overwrite", "command", "printing", "show"]

HOW_IT_ENDS = (
    "exit status: 0 done, 1 refused or failed (one sentence on standard error), 2 wrong usage, 130 stopped by Ctrl-C"
)


class Shown(Protocol):
    """A result that prints itself and has a form for machines."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON."""
        ...


def command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], summary: str, example: str
) -> argparse.ArgumentParser:
    """Add a command.

    Args:
        commands: Where to.
        name: Its name.
        run: What it does; returns the exit status.
        summary: One phrase that says so.
        example: The words of one good call, after `transplant-hf`.
    """
    made: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"example:\n  transplant-hf {example}\n\n{HOW_IT_ENDS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--json", action="store_true", help="print the result as JSON")
    made.set_defaults(run=run, printed=False)
    return made


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    """Add the option that every command with an output has."""
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace what transplant_hf wrote to the output before; other files stay (default: refuse an output that "
        "is there)",
    )


def show(result: Shown, options: argparse.Namespace) -> None:
    """Print a result on standard output, for people or for machines."""
    with printing(options):
        print(json.dumps(result.to_dict(), indent=2) if options.json else result)


@contextmanager
def printing(options: argparse.Namespace) -> Iterator[None]:
    """Print a result inside a `with` block; when the block ends, all of it is written.

    Args:
        options: Of the command; they remember that there is a result on standard output.

    Raises:
        CheckpointError: It could not be written: the disk is full.
    """
    from ..storage import writing

    options.printed = True
    with writing("the result on standard output", "What the command wrote into files is there."):
        yield
        sys.stdout.flush()
