"""`transplant-hf export` and `push`: models for others."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import run_verb
from .parser import command

if TYPE_CHECKING:
    from .. import DonorSpec


def add_export(commands: Any) -> None:
    """Add `export`."""
    summary = "write a transplant as a plain checkpoint that loads without transplant_hf, or as a GGUF file"
    examples = (
        "export user/gpt2-law gpt2-law-full --dtype bfloat16",
        "export openai-community/gpt2 full --donor user/gpt2-law@4",
        "export --gguf gpt2.Q4_K_M.gguf user/gpt2-law@4 gpt2-law.gguf",
    )
    parser = command(commands, "export", _export, summary, *examples)
    parser.add_argument("source", metavar="MODEL", help="Hub id or folder of a transplant, a donor or a recipient")
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="folder to write; with --gguf, the file")
    gguf = "a GGUF file of the recipient: copy its tensors as they are, and write a GGUF file. MODEL is then a "
    gguf += "transplant or DONOR[@POSITION]"
    parser.add_argument("--gguf", metavar="FILE", type=Path, help=gguf)
    parser.add_overwrite()
    parser.add_donors()
    parser.old_spelling("--position", "--donor DONOR@POSITION", "position", type=int, append=True)
    mode = "mode of donors with a given position (default: insert)"
    parser.add_argument("--mode", choices=("insert", "replace"), help=mode)
    parser.add_dtype("q8_0", note="; q8_0 also for the donors in a GGUF file, which are float16 by default")
    parser.add_shard_size()
    no_verify = "do not load the result to compare logits (needed if it does not fit)"
    parser.add_argument("--no-verify", action="store_false", dest="verify", help=no_verify)
    composition = "how donors at one position are combined (default: as in the source)"
    parser.add_argument("--composition", choices=("stacked", "side_by_side"), help=composition)
    parser.add_argument("--license", help="license for the card (default: the one that recipient and donors share)")
    parser.add_argument("--revision", help="branch, tag or commit of the source")


def _export(options: argparse.Namespace) -> int:
    from .. import DonorSpec

    words = options.inserted or []
    if options.gguf and (words or options.mode or DonorSpec.parse(options.source).position is not None):
        words = [options.source, *words]
        options.source, options.gguf = options.gguf, None
    options.inserted = _donors(words, options)
    return run_verb(options)


def _donors(words: Sequence[str], options: argparse.Namespace) -> list[DonorSpec] | None:
    from .. import DonorSpec

    positions = options.position or []
    if positions and len(positions) != len(words):
        options.usage_error(f"{len(positions)} --position for {len(words)} --donor; use --donor DONOR@POSITION")
    if positions:  # one for each donor, in order
        words = [f"{word}@{position}" for word, position in zip(words, positions, strict=True)]
    donors = [DonorSpec.parse(word, options.mode) for word in words]
    # Donors with a given position have strength 1 in an export, also spread donors at the positions they recommend.
    donors = [
        DonorSpec(one.donor, one.position, options.mode, strength=1.0) if isinstance(one.position, tuple) else one
        for one in donors
    ]
    if options.mode and not any(donor.position is not None for donor in donors):
        options.usage_error("--mode goes with --donor DONOR@POSITION")
    return donors or None


def add_push(commands: Any) -> None:
    """Add `push`."""
    summary = "check a saved donor, transplant or model and upload it in one commit"
    parser = command(commands, "push", _push, summary, 'push gpt2-law user/gpt2-law --private --message "First donor"')
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="folder with the saved files")
    parser.add_argument("repo_id", metavar="REPO", help="repository on the Hub; created if it does not exist")
    parser.add_private()
    parser.add_argument("--to-revision", metavar="BRANCH", help="branch to push to; created if it does not exist")
    parser.old_spelling("--revision", "--to-revision", "to_revision")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead")
    message = "first line of the commit message (default: names what is uploaded)"
    parser.add_argument("--message", dest="commit_message", help=message)


def _push(options: argparse.Namespace) -> int:
    options.on_files = _list_files
    return run_verb(options)


def _list_files(files: Mapping[str, int], left_out: Sequence[str]) -> None:
    """Print on standard error which files are uploaded and which are not."""
    lines = [f"{len(files)} files, {sum(files.values()):,} bytes; unchanged files are not uploaded again:"]
    lines += [f"{size:>15,}  {name}" for name, size in files.items()]
    lines += [f"not uploaded, not part of the donor or model: {', '.join(left_out)}"] if left_out else []
    print("\n".join(lines), file=sys.stderr, flush=True)
