"""The command line: arguments in, one call, a result out. No logic lives here: a file for each command."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

from .. import __version__
from ..errors import TransplantError
from . import check, compare, convert, demo, evaluate, export, extract, inspect, plan, push, sweep, train
from .command import HOW_IT_ENDS

__all__ = ["main"]

_COMMANDS = (demo, convert, inspect, check, plan, extract, train, sweep, evaluate, compare, export, push)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: The words after `transplant-hf`; by default those of the process.

    Returns:
        The exit status: 0 done, 1 refused or failed, 2 wrong usage, 130 stopped by Ctrl-C.

    Example:
        >>> main(["--version"])
        Traceback (most recent call last):
        SystemExit: 0
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 2
    try:
        # Read when torch is loaded. Otherwise its threads spin while they wait for each other, which makes
        # training many times slower when other programs use the cores.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        # Here, not above: what is answered before needs neither Transformers nor torch, which take seconds to import.
        from ..registration import register

        register()
        return int(options.run(options))
    except BrokenPipeError:  # the reader has seen enough, as in `| head`
        return 1
    except (TransplantError, OSError) as error:
        return _failed(options, error, str(error), 1)
    except KeyboardInterrupt as error:
        return _failed(options, error, str(error) or "stopped.", 130)
    finally:
        _let_go_of_output()


def _failed(options: argparse.Namespace, error: BaseException, sentence: str, status: int) -> int:
    if options.json and not options.printed:
        print(json.dumps({"error": type(error).__name__, "message": sentence}))
    print(f"transplant-hf: {sentence}", file=sys.stderr)
    return status


def _let_go_of_output() -> None:
    """Keep Python from writing again, when it ends, what could not be written."""
    try:
        sys.stdout.flush()
    except OSError:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="transplant-hf",
        description="Whole transformer layers as exchangeable parts of language models.",
        epilog=HOW_IT_ENDS,
    )
    parser.add_argument("--version", action="version", version=f"transplant_hf {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for command in _COMMANDS:
        command.add(commands)
    return parser
