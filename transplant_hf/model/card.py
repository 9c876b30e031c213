"""The card of a transplant that is saved with every weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..cards import CARD_FILE, CardFacts, full_card, keeps_its_card, license_named
from ..donor.card import chosen_license, donor_facts
from ..donor.companions import at_hand, has_tokenizer
from ..donor.entry import CODE_FILE
from ..donor.record import DonorRecord
from ..donor.save import donor_folders
from ..donor.saved_files import foreign_names
from ..heads import BASE, CAUSAL_LM, head_of

__all__ = ["write_full_card"]


def write_full_card(
    model: Any,
    staging: Path,
    target: Path,
    records: Sequence[DonorRecord],
    repo_id: str | None = None,
    license: str | None = None,
) -> None:
    """Write the card of a full save, unless a person wrote one.

    Args:
        model: The transplanted model.
        staging: The folder that its weights are in by now.
        target: The folder that it is going to replace.
        records: What is known of each donor; where donors have files of their own, with their sha256.
        repo_id: Where it is going to be loaded from, if not from the target.
        license: What was passed.
    """
    named = license_named(license) if license is not None else None
    if keeps_its_card(target):
        return
    state = model._transplant
    blueprint = state.blueprint
    config = blueprint.config
    native = not (staging / CODE_FILE).exists()
    head = head_of([type(model).__name__], model.config) or (CAUSAL_LM if model.can_generate() else BASE)
    donors = []
    folders = donor_folders(blueprint.splice.names, foreign_names(target))
    for part, record, subfolder in zip(blueprint.parts, records, folders, strict=True):
        if part.name in state.disabled:
            continue
        known = donor_facts(record, dataclasses.replace(part.spec, subfolder=subfolder))
        from_hub = part.spec.revision is not None
        donors.append(
            dataclasses.replace(
                known,
                reference=part.spec.donor if from_hub else None,
                revision=part.spec.revision,
                files=() if native else known.files,
            )
        )
    recipient = config.recipient or None
    folder = at_hand(recipient, config.recipient_revision, state.cache_dir) if recipient else None
    facts = CardFacts(
        repo=repo_id or target.absolute().name,
        model_type=blueprint.recipient.config.model_type,
        donors=tuple(donors),
        layer_map=model.layer_map,
        recipient=recipient,
        recipient_revision=config.recipient_revision,
        license=named or chosen_license(records, folder, of_all=True),
        with_tokenizer=has_tokenizer(staging),
        native=native,
        side_by_side=bool(blueprint.side_by_side_groups),
        auto_class=head.auto_class,
        task=head.task,
    )
    full_card(facts).save(staging / CARD_FILE)
