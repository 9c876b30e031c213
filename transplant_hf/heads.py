"""The heads of models: the Auto class of each, the class that loads it in a transplant, and its pipeline."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection
from typing import Any

import transformers
from transformers import PreTrainedConfig


@dataclasses.dataclass(frozen=True)
class Head:
    """A head, or no head."""

    auto_class: str
    task: str | None = None

    @property
    def loader(self) -> str:
        """The name of the class that the Auto class finds for a transplant; repositories name it in `auto_map`."""
        return f"Transplant{self.auto_class.removeprefix('AutoModel') or 'Model'}"

    def find(self) -> Any:
        """The Auto class."""
        return getattr(transformers, self.auto_class)


CAUSAL_LM = Head("AutoModelForCausalLM", "text-generation")
BASE = Head("AutoModel")
# The heads that Transformers has for decoder-only models. A class that several Auto classes have counts for the first.
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

    Without `AutoModelForDecision`: the pipeline "decision" tries the other classes only if this one has no model.
    """
    others = [name for name in _names() if name.startswith("AutoModelFor") and not name.endswith("Decision")]
    return [getattr(transformers, name) for name in dict.fromkeys([*(head.auto_class for head in HEADS), *others])]


def model_mapping(auto_class: Any) -> Any:
    """Return the mapping from configuration classes to the model classes of an Auto class; empty for another class."""
    # AutoModelForCausalLM has MODEL_FOR_CAUSAL_LM_MAPPING, and so on.
    wanted = f"{auto_class.__name__.removeprefix('Auto').upper()}MAPPING"
    return getattr(transformers, _mapping_names().get(wanted, ""), {})


@functools.cache
def _mapping_names() -> dict[str, str]:
    return {name.replace("_", ""): name for name in _names() if name.endswith("MAPPING")}


@functools.cache
def _names() -> tuple[str, ...]:
    """The public names of Transformers; listing them takes a tenth of a second."""
    return tuple(dir(transformers))


def auto_classes_for(config: PreTrainedConfig) -> list[str]:
    """Return the names of the Auto classes that have a class for a model of this type; loads no model code."""
    return [one.__name__ for one in auto_classes() if type(config) in model_mapping(one)]


def head_of(class_names: Collection[str], config: PreTrainedConfig) -> Head | None:
    """Return the head of a model: that of the first Auto class that has its class, else the one in its class's name."""
    for head in HEADS:
        found = model_mapping(head.find()).get(type(config), ())
        classes: Any = found if isinstance(found, list | tuple) else [found]
        if {one.__name__ for one in classes} & set(class_names):
            return head
    named = ((head, head.auto_class.removeprefix("AutoModel")) for head in HEADS if head is not BASE)
    return next((head for head, end in named if any(name.endswith(end) for name in class_names)), None)
