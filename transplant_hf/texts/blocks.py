"""Blocks of tokens: what models are trained and measured on."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch.utils.data import Dataset

from ..errors import ConfigurationError, DataError
from .encoding import encode, starting_token
from .source import TextSource, documents
from .tables import row_documents

__all__ = ["Blocks", "pack"]


class Blocks(Dataset[dict[str, torch.Tensor]]):
    """Blocks of equally many tokens; a dataset for `Trainer` as it stands.

    Args:
        tokens: `[blocks, block_length]`; kept as int32.
        name: What to call the text.

    Raises:
        DataError: No block, or blocks of fewer than two tokens.

    Example:
        >>> blocks = Blocks(torch.arange(12).view(3, 4), name="numbers")
        >>> len(blocks), blocks[1]["labels"].tolist()
        (3, [4, 5, 6, 7])
        >>> [len(part) for part in blocks.split(2, 1)]
        [2, 1]
    """

    def __init__(self, tokens: torch.Tensor, name: str = "text") -> None:
        if tokens.dim() != 2 or not len(tokens) or tokens.shape[1] < 2:
            raise DataError(
                f"blocks of {name!r} must be at least one, of at least 2 tokens ([blocks, block_length]); got "
                f"{list(tokens.shape)}."
            )
        self.tokens = tokens.to(torch.int32)
        self.name = name

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        """Return a block as a model is trained on it; `input_ids` and `labels` are `[block_length]`, int64."""
        ids = self.tokens[number].long()
        return {"input_ids": ids, "labels": ids.clone()}

    @property
    def block_length(self) -> int:
        """Tokens in each block."""
        return int(self.tokens.shape[1])

    @property
    def num_tokens(self) -> int:
        """Tokens in all blocks."""
        return self.tokens.numel()

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of shape and tokens: 64 hexadecimal digits."""
        digest = hashlib.sha256(str(tuple(self.tokens.shape)).encode())
        digest.update(self.tokens.contiguous().numpy().astype("<i4", copy=False).data)
        return digest.hexdigest()

    def part(self, start: int, stop: int | None = None) -> Blocks:
        """Return blocks `start` to `stop`, sharing their memory.

        Args:
            start: The first one; from the end if negative, as in Python.
            stop: The first that is left out; the end by default.

        Raises:
            DataError: There would be none.
        """
        part = self.tokens[start:stop]
        if not len(part):
            raise DataError(f"blocks {start}..{stop} of {self.name!r} are none: it has {len(self)}.")
        return Blocks(part, self.name)

    def split(self, *shares: float) -> tuple[Blocks, ...]:
        """Cut the blocks into consecutive parts, such as for training, validation and test.

        Args:
            *shares: How much goes into each part, in proportion.

        Returns:
            One for each share; together they are all blocks.

        Raises:
            ConfigurationError: Shares that are not positive.
            DataError: A part would be empty.
        """
        if not shares or min(shares) <= 0:
            raise ConfigurationError(f"shares must be positive, got {shares}.")
        whole = sum(shares)
        ends = [round(len(self) * sum(shares[: number + 1]) / whole) for number in range(len(shares))]
        starts = [0, *ends[:-1]]
        if any(start >= end for start, end in zip(starts, ends, strict=True)):
            raise DataError(
                f"{self.name!r} has {len(self)} blocks, too few for parts of {', '.join(f'{s:g}' for s in shares)}. "
                "Use more text or shorter blocks."
            )
        return tuple(self.part(start, end) for start, end in zip(starts, ends, strict=True))

    def __repr__(self) -> str:
        return f"Blocks({self.name!r}, {len(self)} x {self.block_length} tokens)"


def pack(
    data: Any,
    tokenizer: Any,
    block_length: int,
    max_blocks: int | None = None,
    *,
    name: str | None = None,
    token: str | bool | None = None,
    quiet: bool = False,
) -> Blocks:
    """Pack text into blocks; the last part block is dropped.

    Where the tokenizer puts a beginning-of-text token before every text by default, each block begins with it.

    Args:
        data: A `TextSource`, a file, folder or Hub id, documents, rows with a column of text, or a stream of tokens
            `[tokens]`.
        tokenizer: The model's tokenizer.
        block_length: Tokens in a block.
        max_blocks: Stop reading as soon as there are so many.
        name: What to call the text; by default the source's name.
        token: As in `from_pretrained`, for a dataset on the Hub.
        quiet: Show no progress bar.

    Raises:
        DataError: Too little text for one block, or text that is missing or cannot be read.
        ConfigurationError: A block of less than two tokens.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"?": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="?"))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
        >>> pack(["a b", "b b a"], tokenizer, block_length=3).tokens.tolist()
        [[2, 3, 1], [3, 3, 2]]
    """
    if block_length < 2 or (max_blocks is not None and max_blocks < 1):
        raise ConfigurationError(
            f"block_length must be at least 2 and max_blocks at least 1, got {block_length} and {max_blocks}."
        )
    start = starting_token(tokenizer)
    step = block_length - (start is not None)
    stream, name = _as_stream(data, tokenizer, None if max_blocks is None else max_blocks * step, name, token, quiet)
    count = len(stream) // step
    if not count:
        raise DataError(f"{name} has {len(stream)} tokens; a block needs {step}. Use more text or shorter blocks.")
    tokens = stream[: count * step].view(count, step)
    if start is not None:
        tokens = torch.cat([torch.full((count, 1), start, dtype=tokens.dtype), tokens], dim=1)
    return Blocks(tokens, name)


def _as_stream(
    data: Any, tokenizer: Any, most: int | None, name: str | None, token: str | bool | None, quiet: bool
) -> tuple[torch.Tensor, str]:
    if isinstance(data, torch.Tensor):
        if data.dim() != 1:
            raise DataError(f"a stream of tokens has one dimension, got {list(data.shape)}.")
        return data[:most].to(torch.int32), name or "text"
    if isinstance(data, str | os.PathLike):
        data = TextSource.parse(os.fspath(data))
    if isinstance(data, TextSource):
        name = name or str(data.name)
        return encode(documents(data, token), tokenizer, max_tokens=most, name=name, quiet=quiet), name
    name = name or "text"
    return encode(_texts(data, name), tokenizer, max_tokens=most, name=name, quiet=quiet), name


def _texts(data: Iterable[Any], name: str) -> Iterator[str]:
    """Documents as they are, or out of rows."""
    rows = iter(data)
    first = next(rows, None)
    if first is None:
        return
    if isinstance(first, Mapping):
        yield from row_documents(itertools.chain([first], rows), None, name)
        return
    for number, text in enumerate(itertools.chain([first], rows)):
        if not isinstance(text, str):
            raise DataError(f"document {number} of {name} is a {type(text).__name__}, not a string.")
        yield text
