"""What a card can say, before it is put into words."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from ..layer_map import LayerMap
from .licenses import License

__all__ = ["CardFacts", "DonorFacts", "FileFacts", "is_hub_id"]


@dataclasses.dataclass(frozen=True)
class FileFacts:
    """A weight file.

    Args:
        name: Its path in the repository.
        size: In bytes.
        sha256: Hexadecimal.
    """

    name: str
    size: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class DonorFacts:
    """One donor of a card.

    Args:
        name: What it is called.
        layers: Its layers' numbers in the source model.
        position: Recipient layers that run before it.
        mode: "insert" or "replace".
        strength: What its layers' contribution is multiplied by.
        reference: Its own Hub id, if it came from there.
        revision: The commit.
        source: The model its layers came from, if known.
        metadata: What its author recorded, unchanged.
        files: Its weight files.
    """

    name: str
    layers: tuple[int, ...]
    position: int
    mode: str = "insert"
    strength: float = 1.0
    reference: str | None = None
    revision: str | None = None
    source: str | None = None
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    files: tuple[FileFacts, ...] = ()


@dataclasses.dataclass(frozen=True)
class CardFacts:
    """What a card is rendered from.

    Args:
        repo: The name by which the snippets load it: a Hub id or a folder.
        model_type: The recipient's, such as "gpt2".
        donors: The donors, in the order they are applied.
        layer_map: What runs.
        recipient: Hub id or folder; `None` when nobody knows.
        recipient_revision: Its commit.
        whole_map: Whether the map shows all of the recipient's layers; else those behind the last donor are left out,
            because nothing at hand says how many there are.
        license: The licence, if one is known.
        with_tokenizer: Whether the repository holds a tokenizer; else the snippets name the recipient's.
        native: Of a full save: whether plain Transformers loads it.
        auto_class: Of a native full save: the Auto class that loads it.
        task: The pipeline's name, if there is one.
        origin: Where the donor was converted from, in Markdown of our own.
        quoted_from: Where the authors' claims stand, in Markdown of our own.
        side_by_side: Whether donors at one position all get the same hidden state.
    """

    repo: str
    model_type: str
    donors: tuple[DonorFacts, ...]
    layer_map: LayerMap
    recipient: str | None = None
    recipient_revision: str | None = None
    whole_map: bool = True
    license: License | None = None
    with_tokenizer: bool = True
    native: bool = False
    auto_class: str = "AutoModelForCausalLM"
    task: str | None = "text-generation"
    origin: str | None = None
    quoted_from: str = "`donor_config.json`"
    side_by_side: bool = False

    @property
    def recipient_id(self) -> str | None:
        """The recipient, if it is on the Hub."""
        return self.recipient if is_hub_id(self.recipient, self.recipient_revision) else None


def is_hub_id(reference: str | None, revision: str | None = None) -> bool:
    """Whether a reference names a repository on the Hub, and no folder; with a revision it can only be the former.

    Example:
        >>> is_hub_id("openai-community/gpt2"), is_hub_id("../gpt2"), is_hub_id("/models/gpt2")
        (True, False, False)
    """
    if not reference or reference.startswith((".", "/", "~")) or (revision is None and Path(reference).is_dir()):
        return False
    try:
        validate_repo_id(reference)
    except HFValidationError:
        return False
    return True
