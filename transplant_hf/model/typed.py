"""What a transplanted model is to a type checker, which cannot know the recipient's class. Empty at run time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import GenerationMixin, PreTrainedModel

    from .mixin import TransplantMixin

    class TransplantedModel(TransplantMixin, PreTrainedModel, GenerationMixin):
        """A model of Transformers with donors in place; of the recipient's own class when the program runs.

        For annotations. `isinstance` is asked with the recipient's class, and narrows to it.
        """

        # Typed more narrowly, they would exclude the recipients' own classes, or calls that run.
        push_to_hub: Any
        generate: Any
