"""Render the cards of the author's three donors, which stand beside this file.

    python model_cards/render.py            write them
    python model_cards/render.py --check    only say whether they are up to date

What is said of the donors are the author's claims; nobody here has measured them.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from transplant_hf.cards import CardFacts, DonorFacts, donor_card
from transplant_hf.conversion import SEEDS, Seed
from transplant_hf.conversion.seeds import CHECKPOINTS
from transplant_hf.layer_map import Placement, Splice

HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Known:
    """What is known of a seed's recipient, and how large the author says the file is."""

    model_type: str
    num_layers: int
    size: str


KNOWN = {
    "gpt2": Known("gpt2", 12, "81 MB"),
    "tinyllama": Known("llama", 22, "252 MB"),
    "gptoss": Known("gpt_oss", 24, "4.6 GB"),
}

ORIGIN = (
    "To be converted with `transplant_hf.conversion.convert_seeds` from `{folder}/donor_layers.pt` in "
    "[{repository}](https://huggingface.co/{repository}), a gated repository: ask its author for access first. The "
    "conversion writes the folder `{name}` that is named above, with a card of its own that lists its files and their "
    "sha256.\n\n"
    "No perplexity of this donor was measured for this card, and none is claimed here."
)


def facts_of(seed: Seed) -> CardFacts:
    """Say of a seed what is known without its weights."""
    known = KNOWN[seed.folder]
    claims = {"layers": list(seed.layers), "best position": seed.position, "size of the file": known.size}
    donor = DonorFacts(seed.name, seed.layers, seed.position, source=seed.recipient, metadata=claims)
    placement = Placement(seed.name, seed.position, seed.layers)
    return CardFacts(
        repo=seed.name,
        model_type=known.model_type,
        donors=(donor,),
        layer_map=Splice(known.num_layers, [placement]).layer_map(),
        recipient=seed.recipient,
        origin=ORIGIN.format(folder=seed.folder, repository=CHECKPOINTS, name=seed.name),
        quoted_from="what the author publishes about the checkpoints",
    )


def rendered() -> dict[Path, str]:
    """Every card's text, by the file it belongs in."""
    return {HERE / f"{seed.name}.md": str(donor_card(facts_of(seed))) for seed in SEEDS}


def main() -> int:
    """Write the cards, or compare them."""
    parser = argparse.ArgumentParser(description="Render the cards of the author's three donors.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a card is out of date")
    check = parser.parse_args().check
    stale = [path for path, text in rendered().items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        print(f"{path}: {'out of date' if check else 'written'}")
        if not check:
            path.write_text(rendered()[path], encoding="utf-8")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
