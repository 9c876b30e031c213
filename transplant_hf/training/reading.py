"""From what a caller names as text to blocks that a model can be trained on, and from blocks to the rows of a run."""

from __future__ import annotations

from typing import Any

from transformers import TrainingArguments

from ..errors import ConfigurationError
from ..texts import Blocks, TextSource, check_tokenizer, pack
from .rows import Rows, rows_needed

__all__ = ["as_blocks", "most_blocks", "rows_of_run"]

_LONGEST_BLOCK = 1024


def as_blocks(
    data: Any, model: Any, tokenizer: Any, block_length: int | None, what: str, most: int | None = None
) -> Blocks:
    """Pack text into blocks, unless it is packed already.

    Args:
        data: `Blocks`, a `TextSource`, a file or Hub id, or rows with a "text" column.
        model: The model it is for.
        tokenizer: Its tokenizer.
        block_length: Tokens in a block; by default what the model can read, at most 1024.
        what: What the text is for, for messages.
        most: Of a stream, how many blocks are read.

    Raises:
        ConfigurationError: No tokenizer.
        DataError: Text that is missing or too short, or a tokenizer of another model.
    """
    if isinstance(data, Blocks):
        return data
    if tokenizer is None:
        raise ConfigurationError(
            f"the {what} {data!r} must be packed into blocks: pass processing_class=, a tokenizer."
        )
    text = model.config.get_text_config(decoder=True)
    check_tokenizer(tokenizer, text.vocab_size, str(model.config.name_or_path or type(model).__name__))
    longest = getattr(text, "max_position_embeddings", None) or _LONGEST_BLOCK
    if isinstance(data, str):
        data = TextSource.parse(data)
    streamed = isinstance(data, TextSource) and data.streaming
    if streamed and most is None:
        raise ConfigurationError(f"the {what} {data.data!r} is a stream, which has no end: say max_steps.")
    return pack(data, tokenizer, block_length or min(longest, _LONGEST_BLOCK), most if streamed else None)


def most_blocks(args: TrainingArguments) -> int | None:
    """Return how many rows a run of so many steps reads; `None` where epochs decide."""
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return args.max_steps * batch if args.max_steps > 0 else None


def rows_of_run(
    domain: Blocks, replay: Blocks | None, args: TrainingArguments, share: float, mark: bool = False
) -> Rows:
    """Draw the rows of a run, and settle how many steps it has.

    Args:
        domain: Text to learn.
        replay: General text.
        args: Batch sizes, steps or epochs, and the seed; `max_steps` is filled in.
        share: The share of general text.
        mark: Whether rows say if they are general text.
    """
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    share = share if replay is not None else 0.0
    if args.max_steps <= 0:
        args.max_steps = max(1, rows_needed(len(domain), share, args.num_train_epochs) // batch)
    return Rows(domain, args.max_steps * batch, replay, share, args.seed, mark)
