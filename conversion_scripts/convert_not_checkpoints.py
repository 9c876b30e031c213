"""Convert the three donors of the author of Neural Organ Transplantation (arXiv 2601.13580) into donor repos.

The author's repository is gated: ask for access on its page and log in with `hf auth login`, or name a folder with
the same files. Only the configuration and the tokenizer of the recipients are downloaded.

example: python conversion_scripts/convert_not_checkpoints.py donors --only gpt2 --verify
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from transplant_hf import TransplantError
from transplant_hf.conversion import CHECKPOINTS, SEEDS, convert_seeds

_FOLDERS = [seed.folder for seed in SEEDS]


def main() -> int:
    """Convert the donors that the command line names."""
    options = vars(_parser().parse_args())
    recipients = dict(options.pop("recipient"))
    only, as_json = options.pop("only"), options.pop("json")
    seeds = [
        dataclasses.replace(seed, recipient=recipients.get(seed.folder, seed.recipient))
        for seed in SEEDS
        if seed.folder in only
    ]
    try:
        conversions = convert_seeds(options.pop("output"), seeds=seeds, **options)
    except TransplantError as error:
        print(f"convert_not_checkpoints: {error}", file=sys.stderr)
        return 1
    print(json.dumps([one.to_dict() for one in conversions], indent=2) if as_json else "\n".join(map(str, conversions)))
    return 0


def _recipient(text: str) -> tuple[str, str]:
    folder, _, model = text.partition("=")
    if folder not in _FOLDERS or not model:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(_FOLDERS)}, then = and a model; got {text!r}")
    return folder, model


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("output", type=Path, help="folder that receives a donor repo for each donor")
    add("--overwrite", action="store_true", help="replace donors that transplant_hf wrote there before")
    add("--source", default=CHECKPOINTS, help="the author's repository, or a folder (default: %(default)s)")
    add("--only", nargs="+", choices=_FOLDERS, default=_FOLDERS, help="which donors (default: all three)")
    another = f"another recipient for one of the donors {', '.join(_FOLDERS)}"
    add("--recipient", type=_recipient, action="append", default=[], metavar="FOLDER=MODEL", help=another)
    add("--max-shard-size", default="5GB", help="largest weight file (default: 5GB)")
    add("--verify", action="store_true", help="also run one layer with the weights of both files")
    add("--push-to-hub", dest="push_to", metavar="NAMESPACE", help="upload each donor to a repository of its own there")
    add("--private", action="store_true", default=None, help="make those repositories private if they are new")
    add("--json", action="store_true", help="print the result as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
