"""Blocks of tokens: the form in which models are trained and measured on text."""

from __future__ import annotations

import hashlib
import itertools
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch.utils.data import Dataset

from ..display import progress_bar
from ..errors import ConfigurationError, DataError
from .documents import TextSource, as_source, documents, row_documents

__all__ = ["Blocks", "check_tokenizer", "encode", "pack", "read_stream", "starting_token"]

# Characters that are tokenized in one call: enough for fast tokenizers to use all cores.
_CHARACTERS_PER_CALL = 1 << 21


class Blocks(Dataset[dict[str, torch.Tensor]]):
    """Blocks of tokens of equal length; a dataset that `Trainer` accepts.

    Args:
        tokens: `[blocks, block_length]`; stored as int32.
        name: The name of the text.

    Raises:
        DataError: There is no block, or a block has fewer than two tokens.

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
                f"{name!r} needs at least one block of at least 2 tokens ([blocks, block_length]), got "
                f"{list(tokens.shape)}."
            )
        self.tokens = tokens.to(torch.int32)
        self.name = name

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        """Return a block as a training example; `input_ids` and `labels` are `[block_length]`, int64."""
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
            start: The first block; negative numbers count from the end.
            stop: The block after the last one. Default: the end.

        Raises:
            DataError: There is no block in this range.
        """
        part = self.tokens[start:stop]
        if not len(part):
            raise DataError(f"there are no blocks {start}..{stop} of {self.name!r}: it has {len(self)}.")
        return Blocks(part, self.name)

    def split(self, *shares: float) -> tuple[Blocks, ...]:
        """Cut the blocks into consecutive parts, for example for training, validation and test.

        Args:
            *shares: The relative size of each part.

        Returns:
            One `Blocks` for each share; together they are all blocks.

        Raises:
            ConfigurationError: A share is not positive.
            DataError: A part would be empty.
        """
        if not shares or min(shares) <= 0:
            raise ConfigurationError(f"shares must be positive, got {shares}.")
        ends = [round(len(self) * total / sum(shares)) for total in itertools.accumulate(shares)]
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
    """Pack text into blocks of equal length; tokens left over at the end are dropped.

    If the tokenizer adds a beginning-of-text token by default, each block begins with it.

    Args:
        data: A `TextSource`, a file, folder or Hub id, documents, rows with a column of text, or a stream of tokens
            `[tokens]`.
        tokenizer: The model's tokenizer.
        block_length: Tokens in a block.
        max_blocks: The most blocks to return. Default: all.
        name: The name of the text. Default: the source's name.
        token: As in `from_pretrained`, for a dataset on the Hub.
        quiet: Show no progress bar.

    Raises:
        DataError: There is too little text for one block, or it cannot be read.
        ConfigurationError: A block would have fewer than two tokens.

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
    max_tokens = None if max_blocks is None else max_blocks * step
    stream, name = read_stream(data, tokenizer, max_tokens, name=name, token=token, quiet=quiet)
    count = len(stream) // step
    if not count:
        raise DataError(f"{name} has {len(stream)} tokens; a block needs {step}. Use more text or shorter blocks.")
    tokens = stream[: count * step].view(count, step)
    if start is not None:
        tokens = torch.cat([torch.full((count, 1), start, dtype=tokens.dtype), tokens], dim=1)
    return Blocks(tokens, name)


def encode(
    documents: Iterable[str], tokenizer: Any, *, max_tokens: int | None = None, name: str = "text", quiet: bool = False
) -> torch.Tensor:
    """Encode documents as one stream of tokens, separated by the end-of-text token if the tokenizer has one.

    Args:
        documents: The documents.
        tokenizer: The model's tokenizer.
        max_tokens: Return this many tokens at most, and stop reading when there are enough.
        name: The name of the text in messages.
        quiet: Show no progress bar.

    Returns:
        `[tokens]`, int32.

    Raises:
        DataError: There is no token in the documents.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"?": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="?"))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> encode(["a b", "b"], PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")).tolist()
        [2, 3, 1, 3]
    """
    stream = array("i")
    remaining = iter(documents)
    with progress_bar(max_tokens, f"Reading {name}", unit="token", quiet=quiet) as progress:
        while max_tokens is None or len(stream) < max_tokens:
            # Few tokens are shorter than a character, so this reads hardly further than needed.
            missing = _CHARACTERS_PER_CALL if max_tokens is None else max_tokens - len(stream)
            batch = _next_batch(remaining, min(missing, _CHARACTERS_PER_CALL))
            if not batch:
                break
            before = len(stream)
            # verbose=False: the stream is meant to be longer than the model's context and is cut into blocks later.
            encoded = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)
            for ids in encoded["input_ids"]:
                if stream and ids and tokenizer.eos_token_id is not None:
                    stream.append(tokenizer.eos_token_id)
                stream.extend(ids)
            progress.update(len(stream) - before)
    if not stream:
        raise DataError(f"{name} is empty: it has no tokens.")
    return torch.frombuffer(stream, dtype=torch.int32)[:max_tokens].clone()


def _next_batch(documents: Iterator[str], min_characters: int) -> list[str]:
    batch: list[str] = []
    characters = 0
    while characters < min_characters and (document := next(documents, None)) is not None:
        batch.append(document)
        characters += len(document)
    return batch


def starting_token(tokenizer: Any) -> int | None:
    """Return the beginning-of-text token, if the tokenizer puts it before every text by default.

    Args:
        tokenizer: The tokenizer.
    """
    start = tokenizer.bos_token_id
    if start is None:
        return None
    # Not every tokenizer with a setting for this follows it: look at what it returns.
    default, bare = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    return start if default[:1] == [start] and len(default) > len(bare) else None


def check_tokenizer(tokenizer: Any, vocab_size: int, what: str) -> None:
    """Refuse a tokenizer with tokens that a model does not have.

    Args:
        tokenizer: The tokenizer.
        vocab_size: The number of tokens in the model's vocabulary.
        what: The model, for the error message.

    Raises:
        DataError: The tokenizer has a token with number `vocab_size` or above.
    """
    token, highest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if highest >= vocab_size:
        raise DataError(
            f"the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} does not belong to {what}: its token "
            f"{token!r} has number {highest}, but the model has {vocab_size} tokens, 0..{vocab_size - 1}. Use the "
            "model's own tokenizer, or call model.resize_token_embeddings first."
        )


def read_stream(
    data: Any,
    tokenizer: Any,
    max_tokens: int | None = None,
    *,
    name: str | None = None,
    token: str | bool | None = None,
    quiet: bool = False,
) -> tuple[torch.Tensor, str]:
    """Return a text in any of the forms of `pack` as one stream of tokens `[tokens]`, int32, and its name."""
    if isinstance(data, torch.Tensor):
        if data.dim() != 1:
            raise DataError(f"a stream of tokens must have one dimension, got {list(data.shape)}.")
        return data[:max_tokens].to(torch.int32), name or "text"
    data = as_source(data)
    if isinstance(data, TextSource):
        name = name or str(data.name)
        texts = documents(data, token)
    else:
        name = name or "text"
        texts = _given_documents(data, name)
    return encode(texts, tokenizer, max_tokens=max_tokens, name=name, quiet=quiet), name


def _given_documents(data: Any, name: str) -> Iterator[str]:
    """Yield documents that are given as strings, or as rows with a column of text."""
    if not isinstance(data, Iterable):
        raise DataError(
            "a text is Blocks, a stream of tokens, a TextSource or the name of one, documents, or rows with a column "
            f"of text; got {type(data).__name__}."
        )
    if isinstance(data, Mapping):
        raise DataError(
            f"one text is wanted here, and {', '.join(map(repr, data))} are names of texts: pass one of them."
        )
    items = iter(data)
    first = next(items, None)
    if isinstance(first, str) and os.path.isfile(first):
        raise DataError(f"{first!r} in a list is a document, not a file. Pass the name of one file, or of a folder.")
    items = itertools.chain([] if first is None else [first], items)
    if isinstance(first, Mapping):
        yield from row_documents(items, None, name)
        return
    for number, text in enumerate(items):
        if not isinstance(text, str):
            raise DataError(f"document {number} of {name} is a {type(text).__name__}, not a string.")
        yield text
