"""The heads a model can have: which Auto class puts each on, what loads it in a transplant, and its pipeline."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import transformers
from transformers import PreTrainedConfig

__all__ = ["BASE", "CAUSAL_LM", "HEADS", "Head", "auto_classes", "auto_classes_for", "head_of"]


@dataclasses.dataclass(frozen=True)
class Head:
    """A head, or none.

    Args:
        auto_class: The name of the Auto class that finds models with it.
        task: The pipeline that runs such a model, for model cards.

    Example:
        >>> Head("AutoModelForCausalLM").loader
        'TransplantForCausalLM'
    """

    auto_class: str
    task: str | None = None

    @property
    def loader(self) -> str:
        """What the class is called that the Auto class finds for a transplant; repositories name it in `auto_map`."""
        return f"Transplant{self.auto_class.removeprefix('AutoModel') or 'Model'}"

    def find(self) -> Any:
        """The Auto class; `None` where this release of Transformers has none of that name."""
        return getattr(transformers, self.auto_class, None)


CAUSAL_LM = Head("AutoModelForCausalLM", "text-generation")
BASE = Head("AutoModel")
# The heads that Transformers has for decoder-only models. A class that several Auto classes find belongs to the first.
HEADS = (
    CAUSAL_LM,
    Head("AutoModelForSequenceClassification", "text-classification"),
    Head("AutoModelForTokenClassification", "token-classification"),
    Head("AutoModelForQuestionAnswering"),
    Head("AutoModelForMultipleChoice"),
    Head("AutoModelForImageTextToText"),
    Head("AutoModelForMultimodalLM"),
    BASE,
)


def auto_classes() -> list[Any]:
    """Return every Auto class of Transformers that loads models, those of `HEADS` first.

    `AutoModelForDecision` is left out: the pipeline "decision" asks it for models that were trained for that, and where
    it has none tries the other classes.
    """
    names = [name for name in dir(transformers) if name.startswith("AutoModelFor") and not name.endswith("Decision")]
    others = [Head(name) for name in names]
    found = [head.find() for head in dict.fromkeys(Head(head.auto_class) for head in (*HEADS, *others))]
    return [one for one in found if hasattr(one, "_model_mapping")]


def auto_classes_for(config: PreTrainedConfig) -> list[str]:
    """Name the Auto classes that have a class for a model of this type; no model code is loaded."""
    return [one.__name__ for one in auto_classes() if type(config) in one._model_mapping]


def head_of(class_names: Collection[str], config: PreTrainedConfig) -> Head | None:
    """Return the head of a model: that of the first Auto class which finds its class, or that its class is named after.

    Args:
        class_names: What its class is called; for files, what `architectures` holds.
        config: Its configuration.
    """
    for head in HEADS:
        found = getattr(head.find(), "_model_mapping", {}).get(type(config), ())
        classes: Any = found if isinstance(found, list | tuple) else [found]
        if {one.__name__ for one in classes} & set(class_names):
            return head
    named = ((head, head.auto_class.removeprefix("AutoModel")) for head in HEADS if head is not BASE)
    return next((head for head, end in named if any(name.endswith(end) for name in class_names)), None)
