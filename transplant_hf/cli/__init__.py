"""The command line. Each command parses arguments, makes one call and prints the result."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

from .. import __version__
from ..errors import TransplantError
from .describing import add_check, add_inspect, add_plan
from .making import add_convert, add_extract, add_sign
from .measuring import add_compare, add_evaluate, add_sweep
from .parser import EXIT_STATUS, Parser
from .publishing import add_export, add_push
from .running import add_demo, add_generate, add_serve
from .training import add_recover, add_train

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

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
    if options.check is not None:
        options.check(options)
    try:
        # Read when torch is loaded. Otherwise its threads spin while they wait for each other, which makes
        # training many times slower when other programs use the cores.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        # Imported here: `--help`, `--version` and most usage errors need neither Transformers nor torch.
        from ..registration import register

        register()
        return int(options.run(options))
    except BrokenPipeError:  # the reader closed the pipe, as in `| head`
        return 1
    except (TransplantError, OSError) as error:
        return _failed(options, error, str(error), 1)
    except KeyboardInterrupt as error:
        return _failed(options, error, str(error) or "interrupted.", 130)
    finally:
        _flush_output()


def _failed(options: argparse.Namespace, error: BaseException, sentence: str, status: int) -> int:
    if options.json and not options.printed:
        print(json.dumps({"error": type(error).__name__, "message": sentence}))
    print(f"transplant-hf: {sentence}", file=sys.stderr)
    return status


def _flush_output() -> None:
    """Flush standard output; after an error, keep Python from trying again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def _parser() -> Parser:
    parser = Parser(
        prog="transplant-hf",
        description="Add trained transformer layers to a language model, and remove them again exactly.",
        epilog=EXIT_STATUS,
    )
    parser.add_argument("--version", action="version", version=f"transplant_hf {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for add in (add_demo, add_generate, add_train, add_recover, add_sweep, add_evaluate, add_compare, add_check):
        add(commands)
    for add in (add_inspect, add_plan, add_extract, add_sign, add_convert, add_export, add_push, add_serve):
        add(commands)
    return parser
