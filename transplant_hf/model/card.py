"""The model card of a transplant that is saved with every weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..cards import FULL_TEMPLATE, render_card, write_card
from ..config import TransplantConfig
from ..donor.companions import at_hand, has_tokenizer
from ..donor.entry import CODE_FILE
from ..donor.record import DonorRecord
from ..donor.save import donor_folders
from ..donor.saved_files import foreign_names
from ..heads import BASE, CAUSAL_LM, head_of


def write_full_card(
    model: Any,
    staging: Path,
    target: Path,
    records: Sequence[DonorRecord],
    repo_id: str | None = None,
    license: str | None = None,
) -> None:
    """Write the card of a full save, unless a person wrote or edited the one that is there."""
    state = model._transplant
    config = state.blueprint.config
    folders = donor_folders(state.blueprint.splice.names, foreign_names(target))
    donors = [
        (dataclasses.replace(part.spec, subfolder=folder), record)
        for part, record, folder in zip(state.blueprint.parts, records, folders, strict=True)
        if part.name not in state.disabled
    ]
    running = TransplantConfig(
        recipient=config.recipient,
        recipient_revision=config.recipient_revision,
        donors=[spec for spec, _ in donors],
        composition=config.composition,
    )
    card = render_card(
        FULL_TEMPLATE,
        repo_id or target.absolute().name,
        running,
        [record for _, record in donors],
        model.layer_map,
        recipient_files=at_hand(config.recipient, config.recipient_revision, state.hub.cache_dir)
        if config.recipient
        else None,
        license=license,
        with_tokenizer=has_tokenizer(staging),
        native=not (staging / CODE_FILE).exists(),
        head=head_of([type(model).__name__], model.config) or (CAUSAL_LM if model.can_generate() else BASE),
    )
    write_card(card, staging, target)
