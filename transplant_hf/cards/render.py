"""From facts to a card, through the templates in `model_cards/`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..config import TransplantConfig
from ..errors import ConfigurationError
from ..layer_map import RECIPIENT, LayerMap
from .authorship import signed
from .facts import CardFacts, DonorFacts, FileFacts, is_hub_id
from .header import card_data
from .text import code, escaped, one_line, python_literal, quoted

__all__ = ["donor_card", "full_card", "template_path"]

DONOR_TEMPLATE, FULL_TEMPLATE = "donor.md", "full_export.md"
# An installed package carries the templates inside; a source checkout has them at its top.
PLACES = (Path(__file__).parent / "templates", Path(__file__).parents[2] / "model_cards")
_MOST_ENTRIES = 40
# The metadata entry of trainings: {text: {state of the model: perplexity}}.
MEASURED = "held_out_perplexity"


def template_path(name: str) -> Path:
    """Find a template.

    Raises:
        ConfigurationError: The installation is not whole.
    """
    for place in PLACES:
        if (place / name).is_file():
            return place / name
    raise ConfigurationError(
        f"the card template {name} is missing: looked in {' and '.join(map(str, PLACES))}. This installation of "
        "transplant_hf is not whole; install it again."
    )


def donor_card(facts: CardFacts) -> ModelCard:
    """Render the card of a donor repo or of another thin transplant.

    Args:
        facts: What is known.

    Returns:
        The card, with a line at its end by which `written_by_us` knows it.

    Raises:
        CheckpointError: A perplexity in the metadata is not finite.
        ConfigurationError: The template is missing.
    """
    base_models = [facts.recipient_id] if facts.recipient_id else []
    title = facts.donors[0].name if len(facts.donors) == 1 else _last_part(facts.repo)
    return _rendered(DONOR_TEMPLATE, facts, card_data(facts, base_models, "adapter", results=True), title)


def full_card(facts: CardFacts) -> ModelCard:
    """Render the card of a transplant that was saved with every weight.

    Args:
        facts: What is known.

    Returns:
        The card, with a line at its end by which `written_by_us` knows it.

    Raises:
        CheckpointError: A perplexity in the metadata is not finite.
        ConfigurationError: The template is missing.
    """
    references = [facts.recipient_id, *(donor.reference for donor in facts.donors)]
    base_models = [str(name) for name in dict.fromkeys(references) if is_hub_id(name)]
    # What a donor's author measured was in a place of the author's choosing, not this whole.
    data = card_data(facts, base_models, "merge", results=False)
    return _rendered(FULL_TEMPLATE, facts, data, _last_part(facts.repo))


def _rendered(template: str, facts: CardFacts, data: ModelCardData, title: str) -> ModelCard:
    # Values are handed over as variables: what looks like a template in them is text.
    values = {"title": escaped(title), **_variables(facts)}
    card = ModelCard.from_template(data, template_path=str(template_path(template)), **values)
    card.text = re.sub(r"\n{3,}", "\n\n", card.text)  # parts that were left out leave their blank lines behind
    return signed(card)


def _last_part(reference: str) -> str:
    return Path(reference).name or reference


def _variables(facts: CardFacts) -> dict[str, Any]:
    revision = facts.recipient_revision
    recipient_literal = python_literal(facts.recipient_id) if facts.recipient_id else None
    return {
        "repo": python_literal(facts.repo),
        "recipient": _named(facts.recipient),
        "recipient_revision": code(revision) if revision else None,
        "recipient_literal": recipient_literal,
        "tokenizer": None if facts.with_tokenizer else recipient_literal,
        "revision_literal": python_literal(revision) if facts.recipient_id and revision else None,
        "kind": code(facts.model_type),
        "picture": _picture(facts),
        "whole_map": facts.whole_map,
        "donors": [_donor(donor) for donor in facts.donors],
        "side_by_side": facts.side_by_side,
        "license_id": code(facts.license.identifier) if facts.license else None,
        "native": facts.native,
        "auto_class": facts.auto_class,
        "generates": facts.task == "text-generation",
        "origin": facts.origin,
        "quoted_from": facts.quoted_from,
        "records": any(_entries(donor) for donor in facts.donors),
        "measured": any(_measured(donor) for donor in facts.donors),
        "files": [_file(file) for donor in facts.donors for file in donor.files],
        "format": code(TransplantConfig.model_type),
    }


def _donor(donor: DonorFacts) -> dict[str, Any]:
    count = len(donor.layers)
    entries = _entries(donor)
    return {
        "name": code(donor.name),
        "count": count,
        "layers": f"layer{'s' if count > 1 else ''} {', '.join(map(str, donor.layers))}",
        "source": _named(donor.source) if donor.source else None,
        "position": donor.position,
        "replaces": donor.mode == "replace",
        "strength": donor.strength if donor.strength != 1.0 else None,
        "reference": code(donor.reference) if donor.reference else None,
        "revision": code(donor.revision) if donor.revision else None,
        "entries": [(code(key), quoted(value)) for key, value in entries[:_MOST_ENTRIES]],
        "left_out": max(0, len(entries) - _MOST_ENTRIES),
        "measured": _measured(donor)[:_MOST_ENTRIES],
        "untrained": donor.metadata.get("init") == "identity" and not donor.metadata.get("steps"),
    }


def _entries(donor: DonorFacts) -> list[tuple[str, Any]]:
    """What the author recorded, without what has a part of the card to itself."""
    return [(key, value) for key, value in donor.metadata.items() if key != MEASURED]


def _measured(donor: DonorFacts) -> list[tuple[str, str]]:
    """The perplexities on held-out texts that a training or a recovery recorded, each text with its numbers."""
    records = (donor.metadata, donor.metadata.get("recovered"))
    held = [record.get(MEASURED) for record in records if isinstance(record, Mapping)]
    return [
        (code(text), ", ".join(f"{escaped(state)} {_number(value)}" for state, value in states.items()))
        for texts in held
        if isinstance(texts, Mapping)
        for text, states in texts.items()
        if isinstance(states, Mapping)
    ]


def _number(value: Any) -> str:
    """A perplexity; one that JSON has no number for was too large to write down."""
    return f"{value:.2f}" if isinstance(value, int | float) and math.isfinite(value) else "too large"


def _named(reference: str | None) -> str:
    """A model's name; of a folder only the last part, for the rest is nobody's business."""
    if not reference:
        return "a model that was not loaded by name"
    return code(reference) if is_hub_id(reference) else f"the local folder {code(_last_part(reference))}"


def _picture(facts: CardFacts) -> str:
    plain = LayerMap((s.source if s.source == RECIPIENT else one_line(s.source, 60), s.index) for s in facts.layer_map)
    picture = str(plain)
    return picture if facts.whole_map else picture.rpartition("\n")[0]


def _file(file: FileFacts) -> Mapping[str, str]:
    return {"name": code(file.name), "size": f"{file.size:,}", "sha256": code(file.sha256)}
