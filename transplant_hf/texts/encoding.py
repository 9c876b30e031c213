"""From documents to one stream of tokens."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from tqdm import tqdm

from ..errors import DataError

__all__ = ["check_tokenizer", "encode", "starting_token"]

_QUICK = 1.0  # seconds, below which no progress bar is shown
# Characters that are tokenised at once: enough for every core, little enough to see the bar move.
_MOST_CHARACTERS = 1 << 21


def encode(
    documents: Iterable[str],
    tokenizer: Any,
    *,
    max_tokens: int | None = None,
    name: str = "text",
    quiet: bool = False,
) -> torch.Tensor:
    """Turn documents into one stream of tokens, an end-of-text token between them where the tokenizer has one.

    Args:
        documents: The documents.
        tokenizer: The model's tokenizer.
        max_tokens: Stop reading as soon as there are so many.
        name: What to call the text in messages.
        quiet: Show no progress bar.

    Returns:
        `[tokens]`, int32.

    Raises:
        DataError: There is not one token.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> words = Tokenizer(models.WordLevel({"?": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="?"))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> encode(["a b", "b"], PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")).tolist()
        [2, 3, 1, 3]
    """
    end = tokenizer.eos_token_id
    stream = array("i")
    waiting = iter(documents)
    characters = 0
    with tqdm(total=max_tokens, desc=f"Reading {name}", unit="token", delay=_QUICK, disable=quiet, leave=False) as bar:
        while max_tokens is None or len(stream) < max_tokens:
            # By the characters that a token took so far, so that a text is read no further than needed.
            a_token = characters / len(stream) if stream else 1.0
            missing = math.inf if max_tokens is None else (max_tokens - len(stream)) * a_token
            batch = _next_batch(waiting, min(missing, _MOST_CHARACTERS))
            if not batch:
                break
            before = len(stream)
            characters += sum(map(len, batch))
            # verbose=False: the stream is longer than the model reads on purpose, and is cut into blocks later.
            for ids in tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)[
                "input_ids"
            ]:
                if stream and ids and end is not None:
                    stream.append(end)
                stream.extend(ids)
            bar.update(len(stream) - before)
    if not stream:
        raise DataError(f"{name} is empty: there is no token in it.")
    return torch.frombuffer(stream, dtype=torch.int32)[:max_tokens].clone()


def _next_batch(documents: Iterator[str], enough: float) -> list[str]:
    batch: list[str] = []
    characters = 0
    while characters < enough and (document := next(documents, None)) is not None:
        batch.append(document)
        characters += len(document)
    return batch


def starting_token(tokenizer: Any) -> int | None:
    """Return the token that a tokenizer puts before every text by default, if it does.

    Args:
        tokenizer: The tokenizer; it is asked, not its settings.
    """
    start = tokenizer.bos_token_id
    if start is None:
        return None
    own, bare = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    return start if own[:1] == [start] and len(own) > len(bare) else None


def check_tokenizer(tokenizer: Any, vocab_size: int, what: str) -> None:
    """Refuse a tokenizer whose tokens a model does not know.

    Args:
        tokenizer: The tokenizer.
        vocab_size: How many tokens the model knows.
        what: The model, for the message.

    Raises:
        DataError: A token's number is not below `vocab_size`.
    """
    token, highest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if highest >= vocab_size:
        raise DataError(
            f"the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} does not belong to {what}: its token "
            f"{token!r} has number {highest}, the model knows {vocab_size} tokens, 0..{vocab_size - 1}. Use the "
            "model's own tokenizer, or call model.resize_token_embeddings first."
        )
