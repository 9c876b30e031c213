"""Does plain Transformers compute from an export what the transplant computes?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..architecture import max_context_length
from ..errors import CheckpointError
from ..model.auto import load_transplant
from ..sources import reading
from .opened import Opened

__all__ = ["compare_logits"]

_TOKENS = 32
# How many times the smallest step of a type, of the largest logit: sums of the same numbers in another order.
_LAST_BITS = 16


def compare_logits(opened: Opened, folder: Path, dtype: torch.dtype, seed: int = 0) -> float:
    """Load both, one after the other, and run them on the same random tokens.

    Logits may differ in their last bits only, as sums do whose numbers lie otherwise in memory, and only where every
    weight of both models is equal in every bit.

    Args:
        opened: The transplant.
        folder: The export.
        dtype: What both are loaded in.
        seed: Of the tokens.

    Returns:
        The largest difference of logits; nearly always 0.

    Raises:
        CheckpointError: Other logits or weights, none that are finite, or weights of the export are missing.
    """
    transplant = _transplant(opened, dtype)
    expected = _logits(transplant, seed)
    del transplant
    plain = _plain(opened, folder, dtype)
    found = _logits(plain, seed)
    if not torch.isfinite(expected).all():
        raise CheckpointError(
            f"the transplant's logits are not finite in {dtype}, so there is nothing to compare with. Export in a "
            "wider type (dtype=), or look at its donors. Nothing was kept."
        )
    worst = float((found - expected).abs().max())
    largest = float(expected.abs().max())
    if not worst <= _LAST_BITS * torch.finfo(dtype).eps * largest:
        raise CheckpointError(
            f"the export gives other logits than the transplant in {dtype} (largest difference {worst:.3g}, logits up "
            f"to {largest:.3g}). Nothing was kept."
        )
    if worst > 0:
        _compare_weights(_transplant(opened, dtype), plain)
    return worst


def _transplant(opened: Opened, dtype: torch.dtype) -> Any:
    config = opened.config
    return load_transplant(
        opened.auto_class,
        str(config.recipient),
        donors=list(config.donors),
        composition=config.composition,
        recipient_overrides=config.recipient_overrides,
        revision=config.recipient_revision,
        dtype=dtype,
        **opened.hub.as_kwargs(),
    )


def _plain(opened: Opened, folder: Path, dtype: torch.dtype) -> Any:
    """Load the export as anybody would.

    Raises:
        CheckpointError: Weights are missing, or it is another class than the transplant's.
    """
    model_class = opened.blueprint.recipient.model_class
    # Text parts of some composite models are no type of their own for the Auto classes; their own class loads them.
    known = type(opened.blueprint.built_config.config) in opened.auto_class._model_mapping
    with reading("the weights", str(folder)):
        plain, info = (opened.auto_class if known else model_class).from_pretrained(
            folder, dtype=dtype, output_loading_info=True
        )
    wrong = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if wrong:
        raise CheckpointError(
            f"the export lacks {wrong[0]}{f' and {len(wrong) - 1} more' if len(wrong) > 1 else ''}, which "
            f"{type(plain).__name__} wants: they would be made up at random. Are they in the checkpoint of "
            f"{opened.recipient}? Nothing was kept."
        )
    if type(plain) is not model_class:
        raise CheckpointError(
            f"the export loads as {type(plain).__name__}, the transplant is a {model_class.__name__}. Nothing was kept."
        )
    return plain


def _compare_weights(transplant: Any, plain: Any) -> None:
    wanted, found = transplant.state_dict(), plain.state_dict()
    differing = [name for name, tensor in wanted.items() if name not in found or not torch.equal(found[name], tensor)]
    if differing:
        raise CheckpointError(f"the export has other values in {differing[0]} than the transplant. Nothing was kept.")


@torch.no_grad()
def _logits(model: Any, seed: int) -> torch.Tensor:
    """`[1, tokens, vocabulary]`, or what else the model's head gives."""
    text = model.config.get_text_config()
    length = min(_TOKENS, max_context_length(model.config) or _TOKENS)
    ids = torch.randint(0, text.vocab_size, (1, length), generator=torch.Generator().manual_seed(seed))
    first: torch.Tensor = model.eval()(ids.to(model.device), use_cache=False)[0]
    return first.float().cpu()
