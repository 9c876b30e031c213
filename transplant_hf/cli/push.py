"""`transplant-hf push`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .command import command, show

__all__ = ["add"]


def add(commands: Any) -> None:
    """Add the command."""
    push = command(
        commands,
        "push",
        _run,
        "check a saved donor, transplant or model and upload it as one commit",
        'push gpt2-law user/gpt2-law --private --message "First donor"',
    )
    push.add_argument("folder", metavar="FOLDER", type=Path, help="what was saved")
    push.add_argument("repo_id", metavar="REPO", help="repository on the Hub; made if it does not exist")
    push.add_argument("--private", action="store_true", help="make it private if it is new")
    push.add_argument("--revision", help="the branch to push to; made if it does not exist")
    push.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    push.add_argument("--message", help="first line of the commit (default: says what is uploaded)")


def _run(options: argparse.Namespace) -> int:
    from ..pushing import push

    done = push(
        options.folder,
        options.repo_id,
        private=options.private or None,
        to_revision=options.revision,
        create_pr=options.create_pr,
        commit_message=options.message,
        on_files=_list,
    )
    show(done, options)
    return 0


def _list(files: Mapping[str, int], left_out: Sequence[str]) -> None:
    """Say what is going to be uploaded, and what stays, on standard error."""
    lines = [f"{size:>15,}  {name}" for name, size in files.items()]
    lines = [f"{len(files)} files, {sum(files.values()):,} bytes; what the repository has already is not sent:", *lines]
    lines += [f"not sent, no part of what was saved: {', '.join(left_out)}"] if left_out else []
    print("\n".join(lines), file=sys.stderr, flush=True)
