"""Perplexity: the exponential of the mean negative log-likelihood of the tokens that were predicted."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from tqdm import tqdm

from ..architecture import choose_block_length, eval_mode
from ..errors import ConfigurationError, DataError
from ..texts import Blocks, check_tokenizer
from .losses import batch_loss, check_vocabulary, device_of, rows_at_once
from .windows import IGNORED, Batch, Windows

__all__ = ["Perplexity", "document_perplexity", "perplexity"]

_QUICK = 1.0  # seconds, below which no progress bar is shown


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """What was measured on one text.

    Args:
        nll: Mean negative log-likelihood of a token, in nats.
        tokens: How many tokens were predicted.
        seconds: How long it took.
    """

    nll: float
    tokens: int
    seconds: float = 0.0

    @property
    def value(self) -> float:
        """The perplexity itself; infinite where it is too large to write down."""
        return math.exp(self.nll) if self.nll < 700 else math.inf

    def __str__(self) -> str:
        return f"{self.value:.2f}"

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON."""
        return {"perplexity": self.value, **dataclasses.asdict(self)}


def perplexity(
    model: Any,
    text: Blocks | torch.Tensor,
    *,
    block_length: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    start_token: int | None = None,
    name: str | None = None,
    quiet: bool = False,
) -> Perplexity:
    """Measure a model on blocks or on a stream of tokens; every token counts alike, and nothing is padded.

    In blocks, all tokens but each block's first are predicted. A stream is read in windows that do not overlap, the
    shorter rest by itself; with `stride`, in a sliding window, so that each token but those of the first window has at
    least `block_length - stride` tokens before it. Either way each token but the stream's first is predicted once.

    Args:
        model: Any causal language model, a PEFT model included; its mode is as before afterwards.
        text: `Blocks`, or a stream `[tokens]`.
        block_length: Tokens in a window of a stream; by default what the model can read, at most 1024.
        stride: How far windows are apart.
        batch_size: Windows that are read at once; fewer where their logits would take more than a gibibyte.
        start_token: A token to put before each window of a stream, for models that were trained with one;
            `starting_token(tokenizer)` tells.
        name: What to call the text in messages.
        quiet: Show no progress bar.

    Raises:
        DataError: Nothing to predict, or tokens that the model does not know.
        ConfigurationError: A window that the model cannot read.
        CheckpointError: The loss is not finite.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16, n_positions=8))
        >>> _ = torch.nn.init.zeros_(model.lm_head.weight)
        >>> print(perplexity(model, torch.arange(16), block_length=8, stride=4))
        16.00
    """
    length = choose_block_length(model.config, block_length) if isinstance(text, torch.Tensor) else block_length
    windows = Windows(text, length, stride, start_token, name)
    check_vocabulary(model, windows, windows.name)
    rows = rows_at_once(model, windows, _checked(batch_size))
    return _measured(model, windows.batches(rows), windows.num_batches(rows), windows.name, quiet)


def document_perplexity(
    model: Any,
    documents: Iterable[str],
    tokenizer: Any,
    max_length: int | None = None,
    batch_size: int = 8,
    *,
    name: str = "the documents",
    quiet: bool = False,
) -> Perplexity:
    """Measure a model on documents, each read by itself from its start.

    Documents that are read together are padded to one length; padding is masked, and no target. Whatever the tokenizer
    puts around a text by default is there, as the model was trained.

    Args:
        model: Any causal language model.
        documents: The documents; what is beyond `max_length` tokens is left out.
        tokenizer: The model's tokenizer.
        max_length: By default what the model can read, at most 1024.
        batch_size: Documents that are read at once.
        name: What to call them in messages.
        quiet: Show no progress bar.

    Raises:
        DataError: No document has two tokens, or the tokenizer is another model's.
        CheckpointError: The loss is not finite.
    """
    length = choose_block_length(model.config, max_length)
    known = getattr(model.config.get_text_config(decoder=True), "vocab_size", None)
    if known is not None:
        check_tokenizer(tokenizer, known, str(model.config.name_or_path or type(model).__name__))
    texts = list(documents)
    encoded = tokenizer(texts, truncation=True, max_length=length)["input_ids"] if texts else []
    rows = sorted((torch.tensor(ids) for ids in encoded if len(ids) > 1), key=len, reverse=True)
    if not rows:
        raise DataError(f"none of {len(texts)} documents of {name} has 2 tokens: there is nothing to predict.")
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    count = math.ceil(len(rows) / _checked(batch_size))
    return _measured(model, _padded(rows, batch_size, padding), count, name, quiet)


def _checked(batch_size: int) -> int:
    if batch_size < 1:
        raise ConfigurationError(f"batch_size must be at least 1, got {batch_size}.")
    return batch_size


def _padded(rows: Sequence[torch.Tensor], batch_size: int, padding: int) -> Iterator[Batch]:
    for begin in range(0, len(rows), batch_size):
        some = rows[begin : begin + batch_size]
        shape = (len(some), max(map(len, some)) - 1)
        ids, targets, mask = torch.full(shape, padding), torch.full(shape, IGNORED), torch.zeros(shape).long()
        for number, row in enumerate(some):
            end = len(row) - 1
            ids[number, :end], targets[number, :end], mask[number, :end] = row[:-1], row[1:], 1
        yield Batch(ids, targets, mask)


def _measured(model: Any, batches: Iterator[Batch], count: int, name: str, quiet: bool) -> Perplexity:
    began = time.perf_counter()
    device = device_of(model)
    total, tokens = 0.0, 0
    with (
        eval_mode(model),
        tqdm(total=count, desc=f"Reading {name}", unit="batch", delay=_QUICK, disable=quiet, leave=False) as bar,
    ):
        for number, batch in enumerate(batches):
            mask = {} if batch.attention_mask is None else {"attention_mask": batch.attention_mask.to(device)}
            logits = model(input_ids=batch.input_ids.to(device), use_cache=False, **mask).logits
            total += batch_loss(logits, batch, number, name)
            tokens += int((batch.targets != IGNORED).sum())
            bar.update()
    return Perplexity(total / tokens, tokens, time.perf_counter() - began)
