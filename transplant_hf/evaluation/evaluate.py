"""A model on texts, and the untouched recipient beside it."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

from ..architecture import choose_block_length
from ..errors import ConfigurationError
from ..texts import Blocks
from .perplexity import Perplexity, perplexity
from .reading import Opened, find_tokenizer, open_model, read_text
from .report import EvaluationReport, EvaluationRow

__all__ = ["Ruler", "evaluate"]

_RECIPIENT = "recipient"


def evaluate(
    model: Any,
    texts: Mapping[str, Any],
    tokenizer: Any = None,
    recipient: Any = None,
    *,
    block_length: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    max_tokens: int | None = None,
    revision: str | None = None,
    quiet: bool = False,
    **kwargs: Any,
) -> EvaluationReport:
    """Measure a model's perplexity on texts; of a transplant always the untouched recipient's too.

    Args:
        model: A loaded model, or the Hub id or folder of a model, a transplant or a donor.
        texts: `{name: text}`; a text is `Blocks`, a stream of tokens, a `TextSource`, a file, a folder or the Hub id of
            a dataset.
        tokenizer: The model's tokenizer; by default the one beside the model or its recipient.
        recipient: What to measure beside the model; by default the model itself with its donors switched off.
        block_length: Tokens that are read at once; by default what the model can read, at most 1024.
        stride: How far windows are apart, for a sliding window; by default they do not overlap.
        batch_size: Windows that are read at once.
        max_tokens: Read no further in each text.
        revision: The revision of the model that is named.
        quiet: Show no progress bar.
        **kwargs: As in `from_pretrained`: `dtype`, `device_map`, `token`, ...

    Returns:
        The report; print it.

    Raises:
        DataError: Text that is missing or too short, or of another model's tokens.
        ConfigurationError: No text, no tokenizer, or a donor whose replaced layers were not kept.
        TransplantError: The model cannot be loaded.

    Example:
        >>> import torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from transplant_hf import Donor, transplant
        >>> recipient = GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=8, n_head=2, vocab_size=16, n_positions=8))
        >>> model = transplant(recipient, Donor.from_model(recipient, [1], name="law"), position=2)
        >>> report = evaluate(model, {"numbers": torch.arange(16)})
        >>> report.models
        ('recipient', 'with law')
    """
    if not texts:
        raise ConfigurationError("there is no text to measure on: texts={'name': text}.")
    opened = open_model(model, revision, kwargs)
    ruler = Ruler(opened, texts, tokenizer, block_length, stride, batch_size, max_tokens, kwargs.get("token"), quiet)
    rows = []
    for label, measured, view in _views(opened, recipient, kwargs):
        with view:
            rows += [EvaluationRow(label, name, found) for name, found in ruler.measure(measured).items()]
    return EvaluationReport(tuple(rows), ruler.about)


class Ruler:
    """Texts that are read once, to measure several models, or several states of a model, on them.

    Args:
        opened: The model whose tokens they become.
        texts: As in `evaluate`, and so is all that follows.
        tokenizer: The same.
        block_length: The same.
        stride: The same.
        batch_size: The same.
        max_tokens: The same.
        token: The same.
        quiet: The same.
    """

    def __init__(
        self,
        opened: Opened,
        texts: Mapping[str, Any],
        tokenizer: Any = None,
        block_length: int | None = None,
        stride: int | None = None,
        batch_size: int = 8,
        max_tokens: int | None = None,
        token: str | bool | None = None,
        quiet: bool = False,
    ) -> None:
        tokenizer_of = functools.cache(lambda: tokenizer if tokenizer is not None else find_tokenizer(opened))
        self._read = {
            name: read_text(text, opened.model, tokenizer_of, max_tokens=max_tokens, token=token, quiet=quiet)
            for name, text in texts.items()
        }
        self._length = choose_block_length(opened.model.config, block_length)
        self._stride, self._batch_size, self._quiet = stride, batch_size, quiet
        self.about: dict[str, Any] = {
            "model": opened.reference or opened.name,
            "revision": opened.revision,
            "block_length": {
                name: text.block_length if isinstance(text, Blocks) else self._length
                for name, (text, _) in self._read.items()
            },
            "stride": stride,
        }

    def measure(self, model: Any) -> dict[str, Perplexity]:
        """Return a model's perplexity on every text, by name."""
        return {
            name: perplexity(
                model,
                text,
                block_length=None if isinstance(text, Blocks) else self._length,
                stride=None if isinstance(text, Blocks) else self._stride,
                batch_size=self._batch_size,
                start_token=start,
                name=name,
                quiet=self._quiet,
            )
            for name, (text, start) in self._read.items()
        }


def _views(
    opened: Opened, recipient: Any, kwargs: Mapping[str, Any]
) -> Iterator[tuple[str, Any, AbstractContextManager[Any]]]:
    """What is measured: its label, the model, and the state it is measured in."""
    model = opened.model
    state = getattr(model, "_transplant", None)
    names = state.blueprint.splice.names if state is not None else ()
    if recipient is not None:
        by_name = isinstance(recipient, str | os.PathLike)
        beside = open_model(recipient, kwargs=kwargs if by_name else None).model
        yield _RECIPIENT, beside, _untouched(beside)
    elif names:
        yield _RECIPIENT, model, _untouched(model)
    label = f"with {', '.join(names)}" if names else opened.name
    yield label if label != _RECIPIENT or recipient is None else f"{label} (model)", model, nullcontext()


@contextmanager
def _untouched(model: Any) -> Iterator[None]:
    """Switch off what was put into a model: donors, and adapters of PEFT."""
    with ExitStack() as off:
        if getattr(model, "_transplant", None) is not None:
            off.enter_context(model.disable_transplants())
        if hasattr(model, "peft_config") and hasattr(model, "disable_adapter"):
            off.enter_context(model.disable_adapter())
        elif getattr(model, "_hf_peft_config_loaded", False):
            model.disable_adapters()
            off.callback(model.enable_adapters)
        yield
