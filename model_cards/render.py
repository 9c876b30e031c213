"""Render the cards of the author's three donors, which stand beside this file.

    python model_cards/render.py            write them
    python model_cards/render.py --check    only say whether they are up to date

What they say of the donors is what the author publishes with the checkpoints; it was not measured here.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from transplant_hf import DonorSpec, TransplantConfig
from transplant_hf.architecture.stack import stated_layers
from transplant_hf.cards import DONOR_TEMPLATE, render_card
from transplant_hf.conversion import CHECKPOINTS, SEEDS, Seed
from transplant_hf.donor import DonorRecord

HERE = Path(__file__).parent

# The recipient's own configuration, as far as a card needs it.
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", "n_layer": 12},
    "tinyllama": {"model_type": "llama", "num_hidden_layers": 22},
    "gptoss": {"model_type": "gpt_oss", "num_hidden_layers": 24},
}
# As the author writes them.
CLAIMS: dict[str, dict[str, Any]] = {
    "gpt2": {"size": "81 MB", "perplexity": 17.33, "train_time": 12.83},
    "tinyllama": {"size": "252 MB", "perplexity": 54.15},
    "gptoss": {"size": "4.6 GB", "perplexity": 34.56},
}
TRAINING = {
    "dataset": "WikiText (1,000 samples)",
    "epochs": 5,
    "optimizer": "AdamW (lr=1e-4)",
    "method": "standalone wrapper training with frozen embeddings",
}
LICENSE = "mit"
ORIGIN = (
    "To be converted with `transplant_hf.conversion.convert_seeds` from `{folder}/donor_layers.pt` in "
    "[{repository}](https://huggingface.co/{repository}), a gated repository: ask its author for access first. The "
    "conversion writes the folder `{name}` that is named above, with a card that lists its files and their sha256."
)


def rendered(seed: Seed) -> str:
    """Return the card of a donor, from what is known without its weights."""
    config = TransplantConfig(recipient=seed.recipient, donors=[DonorSpec(".", seed.position, name=seed.name)])
    record = DonorRecord(
        model_type=CONFIGS[seed.folder]["model_type"],
        source_config=CONFIGS[seed.folder],
        layer_indices=seed.layers,
        source_id=seed.recipient,
        name=seed.name,
        metadata={
            "layer_indices": list(seed.layers),
            "best position": seed.position,
            **CLAIMS[seed.folder],
            **TRAINING,
        },
    )
    card = render_card(
        DONOR_TEMPLATE,
        seed.name,
        config,
        [record],
        num_layers=stated_layers(CONFIGS[seed.folder]),
        license=LICENSE,
        quoted_from="what the author publishes about the checkpoints",
        origin=ORIGIN.format(folder=seed.folder, repository=CHECKPOINTS, name=seed.name),
    )
    return str(card)


def main() -> int:
    """Write the cards, or compare them."""
    parser = argparse.ArgumentParser(description="Render the cards of the author's three donors.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a card is out of date")
    check = parser.parse_args().check
    cards = {HERE / f"{seed.name}.md": rendered(seed) for seed in SEEDS}
    stale = [path for path, text in cards.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        print(f"{path}: {'out of date' if check else 'written'}")
        if not check:
            path.write_text(cards[path], encoding="utf-8")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
