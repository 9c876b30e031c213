"""Perplexity: the exponential of the mean negative log-likelihood of the predicted tokens."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from ..architecture import choose_block_length, eval_mode
from ..display import progress_bar
from ..errors import CheckpointError, ConfigurationError, DataError
from ..texts import Blocks, check_tokenizer
from .windows import IGNORED, Batch, Windows

__all__ = [
    "Perplexity",
    "batch_loss",
    "check_tokenizer_of",
    "check_vocabulary",
    "document_perplexity",
    "input_device",
    "max_rows",
    "perplexity",
    "perplexity_of_windows",
]

_CHUNK_LOGITS = 1 << 22  # logits that are turned to float32 at once
_MAX_LOGITS = 1 << 28  # logits of one forward pass: one GiB in float32


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """The perplexity of a model on one text.

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
        """The perplexity itself; infinite where it is too large for a float."""
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
    """Measure a model on blocks or on a stream of tokens; every token has the same weight, and nothing is padded.

    In blocks, all tokens except each block's first are predicted. A stream is read in windows without overlap, or with
    `stride` in a sliding window, where each token outside the first window has at least `block_length - stride` tokens
    before it. Either way each token except the stream's first is predicted once.

    Args:
        model: Any causal language model, a PEFT model included; its mode is restored afterwards.
        text: `Blocks`, or a stream `[tokens]`.
        block_length: Tokens in a window of a stream; by default what the model can read, at most 1024.
        stride: The distance between windows, in tokens.
        batch_size: Windows in a batch; fewer where their logits would take more than one GiB.
        start_token: A token to put before each window of a stream, for models that were trained with one; see
            `starting_token(tokenizer)`.
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
    return perplexity_of_windows(model, Windows(text, length, stride, start_token, name), batch_size, quiet)


def perplexity_of_windows(model: Any, windows: Windows, batch_size: int = 8, quiet: bool = False) -> Perplexity:
    """Measure a model on a text that is cut into windows; see `perplexity`."""
    check_vocabulary(model, windows)
    rows = max_rows(model, windows, batch_size)
    return _measure(model, windows.batches(rows), windows.num_batches(rows), windows.name, quiet)


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
    """Measure a model on documents, each read separately from its start.

    Documents in one batch are padded to one length; padding is masked and never a target. The tokenizer adds the
    special tokens that it adds by default.

    Args:
        model: Any causal language model.
        documents: The documents; tokens beyond `max_length` are dropped.
        tokenizer: The model's tokenizer.
        max_length: By default what the model can read, at most 1024.
        batch_size: Documents in a batch.
        name: What to call them in messages.
        quiet: Show no progress bar.

    Raises:
        DataError: No document has two tokens, or the tokenizer belongs to another model.
        CheckpointError: The loss is not finite.
    """
    _check_batch_size(batch_size)
    length = choose_block_length(model.config, max_length)
    check_tokenizer_of(model, tokenizer)
    texts = list(documents)
    encoded = tokenizer(texts, truncation=True, max_length=length)["input_ids"] if texts else []
    rows = sorted((torch.tensor(ids) for ids in encoded if len(ids) > 1), key=len, reverse=True)
    if not rows:
        raise DataError(f"none of {len(texts)} documents of {name} has 2 tokens: there is nothing to predict.")
    batches = [_padded(rows[begin : begin + batch_size]) for begin in range(0, len(rows), batch_size)]
    return _measure(model, batches, len(batches), name, quiet)


def _padded(rows: Sequence[torch.Tensor]) -> Batch:
    lengths = torch.tensor([len(row) - 1 for row in rows])
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    ids, targets = (
        torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=value)
        for parts, value in (([row[:-1] for row in rows], 0), ([row[1:] for row in rows], IGNORED))
    )
    return Batch(ids, targets, mask)


def _measure(model: Any, batches: Iterable[Batch], count: int, name: str, quiet: bool) -> Perplexity:
    began = time.perf_counter()
    device = input_device(model)
    total, tokens = 0.0, 0
    with eval_mode(model), progress_bar(count, f"Reading {name}", unit="batch", quiet=quiet) as bar:
        for number, batch in enumerate(batches):
            mask = {} if batch.attention_mask is None else {"attention_mask": batch.attention_mask.to(device)}
            logits = model(input_ids=batch.input_ids.to(device), use_cache=False, **mask).logits
            total += batch_loss(logits, batch, number, name)
            tokens += int((batch.targets != IGNORED).sum())
            bar.update()
    return Perplexity(total / tokens, tokens, time.perf_counter() - began)


def batch_loss(logits: torch.Tensor, batch: Batch, number: int, name: str) -> float:
    """Return the negative log-likelihood of all targets of a batch that count, in nats."""
    logits, targets = logits.flatten(0, 1), batch.targets.flatten().to(logits.device)
    rows = max(1, _CHUNK_LOGITS // logits.shape[1])
    loss = sum(
        F.cross_entropy(chunk.float(), wanted, ignore_index=IGNORED, reduction="sum").item()
        for chunk, wanted in zip(logits.split(rows), targets.split(rows), strict=True)
    )
    if not math.isfinite(loss):
        raise CheckpointError(
            f"the loss on batch {number} of {name} ({len(batch.input_ids)} x {batch.input_ids.shape[1]} tokens) is "
            f"{loss}: the model's weights contain NaN or infinity, or its dtype is too small. Try dtype=float32 "
            "(--dtype float32)."
        )
    return loss


def max_rows(model: Any, windows: Windows, batch_size: int) -> int:
    """Return how many windows a batch has: at most `batch_size`, and so few that the logits fit into memory."""
    _check_batch_size(batch_size)
    return max(1, min(batch_size, _MAX_LOGITS // (windows.block_length * (_vocab_size(model) or 1))))


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ConfigurationError(f"batch_size must be at least 1, got {batch_size}.")


def check_vocabulary(model: Any, windows: Windows) -> None:
    """Refuse a text with tokens that the model does not know."""
    size = _vocab_size(model)
    if size is not None and windows.highest >= size:
        raise DataError(
            f"{windows.name} contains the token number {windows.highest}, the model has {size} tokens, "
            f"0..{size - 1}. Encode the text with the model's own tokenizer."
        )


def check_tokenizer_of(model: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer with tokens that the model does not know."""
    size = _vocab_size(model)
    if size is not None:
        check_tokenizer(tokenizer, size, str(model.config.name_or_path or type(model).__name__))


def _vocab_size(model: Any) -> Any:
    return getattr(model.config.get_text_config(decoder=True), "vocab_size", None)


def input_device(model: Any) -> torch.device:
    """Return the device on which a model takes its input; an offloaded model takes it on the CPU."""
    device: torch.device = next(model.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device
