"""`transplant-hf extract`, `sign` and `convert`: donors from models and files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .options import check_output, run_verb, text_source
from .parser import TEXT_HELP, command, whole


def add_extract(commands: Any) -> None:
    """Add `extract`."""
    summary = "copy layers out of a model and write them as a donor"
    example = "extract openai-community/gpt2 gpt2-new --layers 4-6 --init identity"
    parser = command(commands, "extract", run_verb, summary, example, check=check_output)
    parser.add_argument("model", metavar="MODEL", help="Hub id or folder of a model, a transplant or a donor")
    parser.add_output()
    which = parser.add_mutually_exclusive_group()
    layers = "consecutive layers, such as 4 5 6 or 4-6 (default: from a third of the way up)"
    parser.add_layers("--layers", layers, group=which)
    parser.add_number("--count", "number of layers", 3, metavar="K", group=which)
    init = "copy the weights, or set the output projections to zero: then the layers change nothing before training"
    parser.add_choice("--init", ("copy", "identity"), init)
    recommended = "position to recommend (default: right after the layers in their model)"
    parser.add_number("--position", recommended, None, whole(0), "P")
    parser.add_argument("--name", help="name of the donor (default: the name of the output)")
    parser.add_argument("--revision", help="branch, tag or commit of the model")
    parser.add_dtype()
    parser.add_trust()


def add_sign(commands: Any) -> None:
    """Add `sign`."""
    summary = "record what the text of a donor's domain looks like, so that donors can choose themselves"
    parser = command(commands, "sign", _sign, summary, "sign gpt2-law --text cases.jsonl --general wikitext.txt")
    parser.add_argument("donor", metavar="DONOR", help="folder of the donor, whose record is changed")
    parser.add_argument("--text", required=True, metavar="TEXT", help=f"text of the donor's domain: {TEXT_HELP}")
    parser.add_argument("--general", required=True, metavar="TEXT", help="general text, in the same forms")
    parser.add_argument("--recipient", help="Hub id or folder (default: the donor's recipient)")
    first = "how many recipient layers run before the first donor (default: the donor's own position)"
    parser.add_number("--position", first, None, whole(0), "P")
    parser.add_number("--max-rows", "rows of 32 tokens to use of each text", 512)
    parser.add_number("--batch-size", "rows in a batch", 16)
    parser.add_text(block_length=False)
    parser.add_loading()


def _sign(options: argparse.Namespace) -> int:
    options.text, options.general = (text_source(text, options) for text in (options.text, options.general))
    return run_verb(options)


def add_convert(commands: Any) -> None:
    """Add `convert`."""
    summary = "convert a .pt file of decoder layers into a donor, without running code from the file"
    example = "convert gpt2/donor_layers.pt gpt2-law --recipient openai-community/gpt2 --layers 4-6 --position 1"
    parser = command(commands, "convert", run_verb, summary, example, check=check_output)
    parser.add_argument("path", metavar="FILE", type=Path, help="the .pt file")
    parser.add_output()
    parser.add_argument("--to-revision", dest="revision", metavar="BRANCH", help="branch to push to")
    parser.old_spelling("--revision", "--to-revision", "revision")
    parser.add_argument("--recipient", required=True, help="model of the layers: Hub id, folder or config.json")
    parser.add_argument("--recipient-revision", metavar="REVISION", help="branch, tag or commit of the recipient")
    metadata = "JSON file of the author (default: donor_metadata.json beside FILE)"
    parser.add_argument("--metadata", type=Path, metavar="FILE", help=metadata)
    parser.add_layers("--layers", "numbers of the layers in their model, such as 4 5 6 or 4-6 (default: as recorded)")
    recommended = "position to recommend (default: the best one that is recorded, or a quarter of the way up)"
    parser.add_number("--position", recommended, None, whole(0), "P")
    parser.add_argument("--name", help="name of the donor (default: the name of the output)")
    parser.add_shard_size()
    parser.add_argument("--verify", action="store_true", help="also compare the outputs of a layer with both weights")
