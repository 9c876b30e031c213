"""From what is known of a transplant to its model card, through the templates in `model_cards/`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from ..config import DonorSpec, TransplantConfig
from ..display import position_numbers, position_text
from ..errors import ConfigurationError
from ..heads import CAUSAL_LM, Head
from ..layer_map import RECIPIENT, LayerMap, Placement, Splice
from .authorship import sign_card
from .escape import code_span, escape_markdown, one_line, python_literal
from .licenses import check_license, choose_license

if TYPE_CHECKING:
    from ..donor.record import DonorRecord

DONOR_TEMPLATE, FULL_TEMPLATE = "donor.md", "full_export.md"
# An installed package carries the templates inside; a source checkout has them at its top.
PLACES = (Path(__file__).parent / "templates", Path(__file__).parents[2] / "model_cards")
_MAX_ENTRIES = 40
_RECOVERED = "recovered"  # the metadata entry of a recovery
_MEASURED = "held_out_perplexity"  # the metadata entry of a training: {text: {state of the model: perplexity}}
TRAINED_HERE = "transplant_hf DonorTrainer"  # the metadata entry "made_by" of what `train` records
_TAG = re.compile(r"[\w.-]{1,64}")


def template_path(name: str) -> Path:
    """Find a template."""
    for place in PLACES:
        if (place / name).is_file():
            return place / name
    raise ConfigurationError(
        f"the card template {name} is missing: looked in {' and '.join(map(str, PLACES))}. This installation of "
        "transplant_hf is incomplete; install it again."
    )


def render_card(
    template: str,
    repo: str,
    config: TransplantConfig,
    records: Sequence[DonorRecord],
    layer_map: LayerMap | None = None,
    *,
    num_layers: int | None = None,
    recipient_files: Path | None = None,
    license: str | None = None,
    with_tokenizer: bool = True,
    native: bool = False,
    head: Head = CAUSAL_LM,
    quoted_from: str = "`donor_config.json`",
    origin: str | None = None,
) -> ModelCard:
    """Render the card of a donor, a thin transplant or a full save, with the layer map or with what draws one."""
    full = template == FULL_TEMPLATE
    donors = [_donor_facts(spec, record, native) for spec, record in zip(config.donors, records, strict=True)]
    metadata = [record.metadata for record in records]
    recipient, revision = config.recipient, config.recipient_revision
    recipient_id = str(recipient) if _is_hub_id(recipient, revision) else None
    chosen = check_license(license) if license is not None else choose_license(metadata, recipient_files, full=full)
    if layer_map is None:
        picture, whole_map = _drawn_map(config, records, num_layers)
    else:
        picture, whole_map = str(_plain_map(layer_map)), True
    values: dict[str, Any] = {
        "title": escape_markdown((Path(repo).name or repo) if full or len(donors) > 1 else config.donors[0].name),
        "repo": python_literal(repo),
        "recipient": _model_name(recipient, revision),
        "recipient_revision": code_span(revision) if revision else None,
        "recipient_literal": python_literal(recipient_id) if recipient_id else None,
        "revision_literal": python_literal(revision) if recipient_id and revision else None,
        "tokenizer": python_literal(recipient_id) if recipient_id and not with_tokenizer else None,
        "model_type": code_span(records[0].model_type),
        "donors": donors,
        "picture": picture,
        "whole_map": whole_map,
        "side_by_side": bool(config.side_by_side_groups),
        "license": code_span(chosen["license"]) if chosen else None,
        "native": native,
        "format": code_span(TransplantConfig.model_type),
        "auto_class": head.auto_class,
        "generates": head.task == "text-generation",
        "quoted_from": quoted_from,
        "origin": origin,
    }
    sources = [recipient_id, *(spec.donor for spec in config.donors if full and spec.revision)]
    data = _header(list(dict.fromkeys(filter(None, sources))), "merge" if full else "adapter", records, head, native)
    for name, value in chosen.items():
        data[name] = value
    # Values are passed as variables: what looks like a template in them is text.
    card = ModelCard.from_template(data, template_path=str(template_path(template)), **values)
    card.text = re.sub(r"\n{3,}", "\n\n", card.text)  # parts that were left out leave their blank lines behind
    return sign_card(card)


def _header(
    base_models: list[str], relation: str, records: Sequence[DonorRecord], head: Head, native: bool
) -> ModelCardData:
    """The YAML at the top of a card: only values of known form get there."""
    named = [record.metadata.get(key) for record in records for key in ("datasets", "dataset", "dataset_name")]
    datasets = [name for value in named for name in (value if isinstance(value, list | tuple) else [value])]
    known = dict.fromkeys(name for name in datasets if isinstance(name, str) and _is_hub_id(name))
    tags = ["transplant", "neural-organ-transplantation", *filter(_TAG.fullmatch, [records[0].model_type])]
    return ModelCardData(
        base_model=(base_models if len(base_models) > 1 else base_models[0]) if base_models else None,
        base_model_relation=relation if base_models else None,
        library_name="transplant-hf",
        pipeline_tag=head.task,
        tags=[*tags, "transformers"] if native else tags,
        datasets=list(known) or None,
    )


def _donor_facts(spec: DonorSpec, record: DonorRecord, native: bool) -> dict[str, Any]:
    count, metadata = len(record.layer_indices), record.metadata
    made_here = metadata.get("made_by") == TRAINED_HERE
    trained = [key for key in metadata if key != _MEASURED and (made_here or key == _RECOVERED)]
    entries = [key for key in metadata if key != _MEASURED and key not in trained]
    folder = f"{spec.subfolder}/" if spec.subfolder else ""
    return {
        "name": code_span(spec.name),
        "count": count,
        "layers": f"layer{'s' if count > 1 else ''} {', '.join(map(str, record.layer_indices))}",
        "source": _model_name(record.source_id) if record.source_id else None,
        "position": position_numbers(spec.position),
        "place": position_text(spec.position),
        "replaces": spec.mode == "replace",
        "strength": spec.strength if spec.strength != 1.0 else None,
        "reference": code_span(spec.donor) if spec.revision else None,
        "revision": code_span(spec.revision) if spec.revision else None,
        "untrained": metadata.get("init") == "identity" and not metadata.get("steps"),
        "trained": _quoted(metadata, trained),
        "entries": _quoted(metadata, entries),
        "hidden": max(0, len(entries) - _MAX_ENTRIES),
        "measured": _measured(metadata)[:_MAX_ENTRIES],
        "files": [
            (code_span(f"{folder}{name}"), f"{stamp.size:,}", code_span(stamp.sha256))
            for name, stamp in sorted(record.files.items())
            if not native
        ],
    }


def _quoted(metadata: Mapping[str, Any], keys: Sequence[str]) -> list[tuple[str, str]]:
    return [(code_span(key), code_span(metadata[key])) for key in keys[:_MAX_ENTRIES]]


def _measured(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The perplexities on held-out texts that a training or a recovery recorded, each text with its numbers."""
    records = (metadata, metadata.get(_RECOVERED))
    found = [record.get(_MEASURED) for record in records if isinstance(record, Mapping)]
    return [
        (code_span(text), ", ".join(f"{escape_markdown(state)} {_number(value)}" for state, value in states.items()))
        for texts in found
        if isinstance(texts, Mapping)
        for text, states in texts.items()
        if isinstance(states, Mapping)
    ]


def _number(value: Any) -> str:
    """A perplexity; one that was not finite is `null` in JSON."""
    return f"{value:.2f}" if isinstance(value, int | float) and math.isfinite(value) else "too large"


def _is_hub_id(reference: str | None, revision: str | None = None) -> bool:
    """Whether a reference names a repository on the Hub and not a folder; with a revision it can only be the former."""
    if not reference or reference.startswith((".", "/", "~")) or (revision is None and Path(reference).is_dir()):
        return False
    try:
        validate_repo_id(reference)
    except HFValidationError:
        return False
    return True


def _model_name(reference: str | None, revision: str | None = None) -> str:
    """A model's name; only the last part of a folder, since the rest concerns nobody else."""
    if not reference:
        return "a model that was not loaded by name"
    hub_id = _is_hub_id(reference, revision)
    return code_span(reference) if hub_id else f"the local folder {code_span(Path(reference).name or reference)}"


# -- Which layers run -----------------------------------------------------------------------------------------------


def _plain_map(layer_map: LayerMap) -> LayerMap:
    return LayerMap((s.source if s.source == RECIPIENT else one_line(s.source, 60), s.index) for s in layer_map)


def _drawn_map(config: TransplantConfig, records: Sequence[DonorRecord], num_layers: int | None) -> tuple[str, bool]:
    """Draw the layers that run, and say whether these are all: the number of the recipient's layers may be unknown."""
    pairs = zip(config.donors, records, strict=True)
    placements = [Placement.of(spec, record.layer_indices) for spec, record in pairs]
    last = max(placement.end for placement in placements)
    if num_layers is not None and num_layers >= last:
        return str(_plain_map(Splice(num_layers, placements).layer_map())), True
    picture = str(_plain_map(Splice(last, placements).layer_map()))
    return picture.rpartition("\n")[0], False
