"""`transplant-hf push`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .command import command, old_spelling, show
from .options import add_private, arguments_for


def add(commands: Any) -> None:
    """Add the command."""
    parser = command(
        commands,
        "push",
        _run,
        "check a saved donor, transplant or model and upload it in one commit",
        'push gpt2-law user/gpt2-law --private --message "First donor"',
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="folder with the saved files")
    parser.add_argument("repo_id", metavar="REPO", help="repository on the Hub; created if it does not exist")
    add_private(parser)
    parser.add_argument("--to-revision", metavar="BRANCH", help="branch to push to; created if it does not exist")
    old_spelling(parser, "--revision", "--to-revision", "to_revision")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    parser.add_argument(
        "--message", dest="commit_message", help="first line of the commit message (default: names what is uploaded)"
    )


def _run(options: argparse.Namespace) -> int:
    from .. import push

    show(push(on_files=_list_files, **arguments_for(push, options)), options)
    return 0


def _list_files(files: Mapping[str, int], left_out: Sequence[str]) -> None:
    """Print on standard error which files are uploaded and which are not."""
    lines = [f"{size:>15,}  {name}" for name, size in files.items()]
    lines = [f"{len(files)} files, {sum(files.values()):,} bytes; unchanged files are not uploaded again:", *lines]
    lines += [f"not uploaded, not part of the donor or model: {', '.join(left_out)}"] if left_out else []
    print("\n".join(lines), file=sys.stderr, flush=True)
