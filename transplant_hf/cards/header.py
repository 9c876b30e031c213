"""The YAML at the top of a card: only values of known form get there."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ..errors import CheckpointError
from .facts import CardFacts, DonorFacts, is_hub_id
from .text import one_line

__all__ = ["card_data", "datasets_of"]

LIBRARY = "transplant-hf"
_TAG = re.compile(r"[\w.-]{1,64}")


def card_data(facts: CardFacts, base_models: list[str], relation: str, results: bool) -> ModelCardData:
    """Build the metadata of a card.

    Args:
        facts: What is known.
        base_models: Hub ids.
        relation: How the repository relates to them.
        results: Whether the perplexities that authors recorded hold for what this repository loads.

    Raises:
        CheckpointError: A perplexity that is not finite.
    """
    license_ = facts.license
    tags = ["transplant", "neural-organ-transplantation", *filter(_TAG.fullmatch, [facts.model_type])]
    evaluations = [result for donor in facts.donors for result in _results(donor, facts.task)]
    return ModelCardData(
        base_model=(base_models if len(base_models) > 1 else base_models[0]) if base_models else None,
        base_model_relation=relation if base_models else None,
        library_name=LIBRARY,
        pipeline_tag=facts.task,
        tags=[*tags, "transformers"] if facts.native else tags,
        license=license_.identifier if license_ else None,
        license_name=license_.name if license_ else None,
        license_link=license_.link if license_ else None,
        datasets=[name for donor in facts.donors for name in datasets_of(donor.metadata) if is_hub_id(name)] or None,
        model_name=one_line(facts.repo) or None if results and evaluations else None,
        eval_results=evaluations if results and evaluations else None,
    )


def datasets_of(metadata: Mapping[str, Any]) -> list[str]:
    """Return the names of data sets that an author recorded, in order."""
    found: list[Any] = []
    for key in ("datasets", "dataset", "dataset_name"):
        value = metadata.get(key)
        found += value if isinstance(value, list | tuple) else [value]
    return list(dict.fromkeys(one_line(name, 96) for name in found if isinstance(name, str) and name.strip()))


def _results(donor: DonorFacts, task: str | None) -> Iterator[EvalResult]:
    """The perplexities in a donor's metadata; whoever reads `model-index` must see whose they are."""
    datasets = datasets_of(donor.metadata)
    name = datasets[0] if len(datasets) == 1 else "not recorded"
    for key, value in donor.metadata.items():
        if not str(key).lower().endswith("perplexity") or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if not math.isfinite(value):
            raise CheckpointError(
                f"donor {donor.name!r} records {key}={value}: a card shows finite numbers only. Leave that entry out."
            )
        yield EvalResult(
            task_type=task or "text-generation",
            dataset_type=name if is_hub_id(name) else "unknown",
            dataset_name=name,
            metric_type="perplexity",
            metric_name=f"{one_line(key, 60)} (reported by the donor's author)",
            metric_value=value,
        )
