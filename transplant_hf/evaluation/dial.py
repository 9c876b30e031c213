"""The curve that a donor's strength gives: what is gained on one text against what is lost on another."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ConfigurationError
from ..numeric import finite_number
from .evaluate import Ruler
from .perplexity import Perplexity
from .reading import open_model

__all__ = ["StrengthCurve", "strength_curve"]


@dataclasses.dataclass(frozen=True)
class StrengthCurve:
    """Perplexities at several strengths.

    Args:
        points: `{strength: {text: perplexity}}`, in the order asked for.
        donors: The donors whose strength was set.
        about: How it was measured.
    """

    points: Mapping[float, Mapping[str, Perplexity]]
    donors: tuple[str, ...]
    about: Mapping[str, Any]

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts' names."""
        return tuple(next(iter(self.points.values())))

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON."""
        rows = [
            {"strength": strength, **{text: found.to_dict() for text, found in point.items()}}
            for strength, point in self.points.items()
        ]
        return {**self.about, "donors": list(self.donors), "rows": rows}

    def __str__(self) -> str:
        head = ["strength", *self.texts]
        lines = [head, *([f"{s:g}", *map(str, point.values())] for s, point in self.points.items())]
        widths = [max(len(line[number]) for line in lines) for number in range(len(head))]
        return "\n".join(
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines
        )


def strength_curve(
    model: Any,
    texts: Mapping[str, Any],
    strengths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    *,
    names: Sequence[str] | None = None,
    tokenizer: Any = None,
    block_length: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    max_tokens: int | None = None,
    revision: str | None = None,
    quiet: bool = False,
    **kwargs: Any,
) -> StrengthCurve:
    """Measure a transplant at several strengths of its donors; 0 is the untouched recipient.

    Args:
        model: A transplanted model, or the Hub id or folder of a transplant or donor.
        texts: As in `evaluate`.
        strengths: What is measured.
        names: The donors whose strength is set; all that are inserted by default.
        tokenizer: As in `evaluate`, and so is all that follows.
        block_length: The same.
        stride: The same.
        batch_size: The same.
        max_tokens: The same.
        revision: The same.
        quiet: The same.
        **kwargs: The same.

    Returns:
        The curve. The model's strengths are afterwards as they were.

    Raises:
        ConfigurationError: No transplant, or no donor whose strength can be set.

    Example:
        >>> import torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from transplant_hf import Donor, transplant
        >>> recipient = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=16, n_positions=8))
        >>> model = transplant(recipient, Donor.from_model(recipient, [0], name="law"), position=1)
        >>> curve = strength_curve(model, {"noise": torch.arange(16)}, [0, 1])
        >>> list(curve.points), model.strengths
        ([0.0, 1.0], {'law': 1.0})
    """
    strengths = [finite_number(strength, "each strength") for strength in strengths]
    if not strengths:
        raise ConfigurationError("a curve needs at least one strength.")
    opened = open_model(model, revision, kwargs)
    loaded = opened.model
    config = getattr(loaded, "transplant_config", None)
    inserted = [str(spec.name) for spec in config.donors if spec.mode == "insert"] if config is not None else []
    chosen = inserted if names is None else list(names)
    if not chosen or set(chosen) - set(inserted):
        raise ConfigurationError(
            f"{opened.reference or type(loaded).__name__} has {', '.join(inserted) or 'no'} donors whose strength can "
            f"be set, asked for {', '.join(chosen) or 'all'}. Donors that replace layers have strength 1."
        )
    ruler = Ruler(opened, texts, tokenizer, block_length, stride, batch_size, max_tokens, kwargs.get("token"), quiet)
    before = {name: loaded.strengths[name] for name in chosen}
    points: dict[float, dict[str, Perplexity]] = {}
    try:
        for strength in strengths:
            for name in chosen:
                loaded.set_strength(name, strength)
            points[strength] = ruler.measure(loaded)
    finally:
        for name, strength in before.items():
            loaded.set_strength(name, strength)
    return StrengthCurve(points, tuple(chosen), ruler.about)
