"""The command line: arguments in, one call, a result out. No logic lives here."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import __version__
from .errors import TransplantError

__all__ = ["main"]

_HOW_IT_ENDS = "exit status: 0 done, 1 refused or failed (one sentence on standard error), 2 wrong usage"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: The words after `transplant-hf`; by default those of the process.

    Returns:
        The exit status: 0 done, 1 refused or failed, 2 wrong usage.

    Example:
        >>> main(["--version"])
        Traceback (most recent call last):
        SystemExit: 0
    """
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except TransplantError as error:
        if options.json:
            print(json.dumps({"error": type(error).__name__, "message": str(error)}))
        print(f"transplant-hf: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader has seen enough, as in `| head`
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="transplant-hf",
        description="Whole transformer layers as exchangeable parts of language models.",
        epilog=_HOW_IT_ENDS,
    )
    parser.add_argument("--version", action="version", version=f"transplant_hf {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    demo = _command(commands, "demo", _demo, "train a small recipient and a donor, transplant, compare", "demo")
    demo.add_argument("--folder", type=Path, default=Path("transplant-demo"), help="where to keep everything")
    demo.add_argument("--fresh", action="store_true", help="train again instead of using what is there")
    check = _command(
        commands,
        "check",
        _check,
        "say whether a donor fits a recipient, without reading weights",
        "check openai-community/gpt2 user/gpt2-law --position 1",
    )
    check.add_argument("recipient", help="Hub id or folder")
    check.add_argument("donor", help="Hub id or folder")
    check.add_argument("--position", type=int, help="recipient layers that run before it; the donor's own by default")
    check.add_argument("--trust-remote-code", action="store_true", help="run the recipient's own modelling code")
    _add_convert(commands)
    _add_inspect(commands)
    return parser


def _add_convert(commands: Any) -> None:
    convert = _command(
        commands,
        "convert",
        _convert,
        "turn a .pt file of decoder layers into a donor repo, without unpickling it",
        "convert gpt2/donor_layers.pt gpt2-law --recipient openai-community/gpt2 --layers 4 5 6 --position 1",
    )
    convert.add_argument("file", type=Path, help="the .pt file")
    convert.add_argument("output", type=Path, nargs="?", help="folder to write; may be left out with --push-to-hub")
    convert.add_argument(
        "--recipient", required=True, help="the model the layers came from: Hub id, folder or config.json"
    )
    convert.add_argument("--recipient-revision", help="its branch, tag or commit")
    convert.add_argument("--metadata", type=Path, help="default: donor_metadata.json beside the file, if there is one")
    convert.add_argument(
        "--layers", type=int, nargs="+", metavar="N", help="layer indices in the source model (default: as recorded)"
    )
    convert.add_argument(
        "--position", type=int, help="recommended position (default: the best one recorded, else the first quarter)"
    )
    convert.add_argument("--name", help="what to call the donor (default: after the output)")
    convert.add_argument("--max-shard-size", default="5GB", help="largest weight file (default: 5GB)")
    convert.add_argument("--verify", action="store_true", help="also run one layer with the weights of both files")
    convert.add_argument("--push-to-hub", metavar="REPO", help="upload the donor to this repository, as one commit")
    convert.add_argument("--private", action="store_true", help="make that repository private if it is new")
    convert.add_argument("--revision", help="the branch to push to")


def _add_inspect(commands: Any) -> None:
    inspect = _command(
        commands,
        "inspect",
        _inspect,
        "say what a donor, transplant, model or .pt file is, from headers alone",
        "inspect user/gpt2-law --recipient openai-community/gpt2",
    )
    inspect.add_argument("what", metavar="WHAT", help="Hub id, folder or .pt file")
    inspect.add_argument("--recipient", help="also say whether it fits this model: Hub id or folder")
    inspect.add_argument("--revision", help="branch, tag or commit of WHAT")
    inspect.add_argument("--position", type=int, help="where it would go (default: where it is recommended or placed)")
    inspect.add_argument("--verify", action="store_true", help="hash the weight files that are on this machine")


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], summary: str, example: str
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"example:\n  transplant-hf {example}\n\n{_HOW_IT_ENDS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--json", action="store_true", help="print the result as JSON")
    command.set_defaults(run=run)
    return command


def _demo(options: argparse.Namespace) -> int:
    from .demo import print_report, run_demo

    report = run_demo(options.folder, fresh=options.fresh)
    if options.json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        print_report(report)
    return 0


def _check(options: argparse.Namespace) -> int:
    from .model.auto import check_compatibility

    report = check_compatibility(
        options.recipient,
        options.donor,
        options.position,
        trust_remote_code=options.trust_remote_code or None,
    )
    print(json.dumps(report.to_dict(), indent=2) if options.json else report)
    return 0 if report else 1


def _convert(options: argparse.Namespace) -> int:
    from .conversion import convert

    if options.output is None and options.push_to_hub is None:
        print("transplant-hf convert: name a folder to write, or --push-to-hub REPO", file=sys.stderr)
        return 2
    done = convert(
        options.file,
        options.recipient,
        options.output,
        metadata=options.metadata,
        layers=options.layers,
        position=options.position,
        name=options.name,
        recipient_revision=options.recipient_revision,
        max_shard_size=options.max_shard_size,
        verify=options.verify,
        push_to=options.push_to_hub,
        private=options.private or None,
        revision=options.revision,
    )
    print(json.dumps(done.to_dict(), indent=2) if options.json else done)
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from .inspection import inspect

    found = inspect(
        options.what,
        recipient=options.recipient,
        position=options.position,
        verify=options.verify,
        revision=options.revision,
    )
    print(json.dumps(found.to_dict(), indent=2) if options.json else found)
    return 0 if found else 1
