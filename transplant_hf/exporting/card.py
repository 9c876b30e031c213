"""The card of an export."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ..cards import CARD_FILE, CardFacts, full_card, keeps_its_card, license_named
from ..donor.card import chosen_license, donor_facts
from ..donor.companions import has_tokenizer
from .opened import Opened

__all__ = ["write_export_card"]


def write_export_card(opened: Opened, staging: Path, target: Path, recipient: Path, license: str | None) -> None:
    """Write the card, unless a person wrote one that stays.

    Args:
        opened: The transplant.
        staging: The folder that its weights are in by now.
        target: The folder that it is going to replace.
        recipient: Where the recipient's files are, its card among them.
        license: What was passed.
    """
    named = license_named(license) if license is not None else None
    if keeps_its_card(target):
        return
    blueprint, config = opened.blueprint, opened.config
    records = [part.donor.record for part in blueprint.parts]
    donors = []
    for part, record in zip(blueprint.parts, records, strict=True):
        spec = part.spec
        reference = spec.donor if spec.revision is not None else None
        known = donor_facts(record, spec)
        donors.append(dataclasses.replace(known, reference=reference, revision=spec.revision, files=()))
    facts = CardFacts(
        repo=target.absolute().name,
        model_type=blueprint.recipient.config.model_type,
        donors=tuple(donors),
        layer_map=blueprint.layer_map(),
        recipient=config.recipient,
        recipient_revision=config.recipient_revision,
        license=named or chosen_license(records, recipient, of_all=True),
        with_tokenizer=has_tokenizer(staging),
        native=True,
        auto_class=opened.head.auto_class,
        task=opened.head.task,
    )
    full_card(facts).save(staging / CARD_FILE)
