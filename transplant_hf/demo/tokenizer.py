"""The demo's tokenizer: a small byte-level BPE vocabulary trained on its own texts."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..texts import encode

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"


def train_tokenizer(texts: Iterable[str], vocabulary_size: int, context: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer.

    Args:
        texts: Training texts.
        vocabulary_size: Number of tokens, the two special ones and the 256 bytes included.
        context: Longest input the recipient is trained for, in tokens.

    Returns:
        The tokenizer with end-of-text and padding tokens; any text decodes to itself.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END_OF_TEXT, PADDING],
        # All 256 bytes are tokens, so that no text needs an unknown token.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        model_max_length=context,
        # Cleaning would glue " ." and "(" to the words before, which is wrong for source code.
        clean_up_tokenization_spaces=False,
    )


def encode_stream(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> torch.Tensor:
    """Encode texts as one stream with an end-of-text token before each text and after the last one.

    Args:
        tokenizer: Tokenizer with an end-of-text token.
        texts: Texts in order.

    Returns:
        Token numbers of shape (tokens,), int64.
    """
    end = torch.tensor([tokenizer.eos_token_id])
    return torch.cat([end, encode(texts, tokenizer, quiet=True), end])
