"""The model card of a donor."""

from __future__ import annotations

from huggingface_hub import ModelCard, ModelCardData

from ..config import TransplantConfig
from .record import DonorRecord

__all__ = ["donor_card"]

_BODY = """
# {name}

{k} decoder layer{s} of `{recipient}` ({model_type}, layer{s} {layers}), to be inserted at position {position}:
{position} of the recipient's layers run before {them}. Needs `pip install transplant_hf`.

```python
import transplant_hf
from transformers import pipeline

generate = pipeline("text-generation", model="{repo}")
print(generate("Once upon a time")[0]["generated_text"])
```

Recipient: `{recipient}`{revision}. Method: *Neural Organ Transplantation* (arXiv 2601.13580).
"""


def donor_card(record: DonorRecord, config: TransplantConfig, repo: str) -> ModelCard:
    """Render the card of a donor repo.

    Args:
        record: What is known of the donor.
        config: Where it belongs.
        repo: The name by which the snippet loads it.
    """
    is_hub_id = not config.recipient.startswith((".", "/"))
    data = ModelCardData(
        base_model=config.recipient if is_hub_id else None,
        base_model_relation="adapter" if is_hub_id else None,
        library_name="transplant-hf",
        pipeline_tag="text-generation",
        tags=["transplant", "neural-organ-transplantation", record.model_type],
    )
    k = len(record.layer_indices)
    body = _BODY.format(
        name=record.name,
        k=k,
        s="" if k == 1 else "s",
        them="it" if k == 1 else "them",
        recipient=config.recipient,
        revision=f" at `{config.recipient_revision}`" if config.recipient_revision else "",
        model_type=record.model_type,
        layers=", ".join(map(str, record.layer_indices)),
        position=config.donors[0].position,
        repo=repo,
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{body}")
