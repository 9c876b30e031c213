"""What every command has: a summary, an example, `--json`, how it ends, and old spellings that still work."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

EXIT_STATUS = "exit status: 0 success, 1 error, 2 usage error, 130 interrupted by Ctrl-C"


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
