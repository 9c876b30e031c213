"""From what a caller names to what a run needs: the model, its tokenizer, and text as blocks and rows."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel, TrainingArguments

from ..architecture import choose_block_length
from ..errors import ConfigurationError, DataError
from ..evaluation.models_and_texts import LoadedModel, find_tokenizer
from ..model.opening import load_model, pinned_commit
from ..sources import HubOptions
from ..texts import Blocks, TextSource, check_tokenizer, pack
from .rows import Rows, rows_needed

__all__ = ["as_blocks", "blocks_of_run", "model_and_tokenizer", "rows_of_run"]


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
        most: How many blocks are read; by default all.

    Raises:
        ConfigurationError: No tokenizer.
        DataError: Text that is missing or too short, or a tokenizer of another model.
    """
    if isinstance(data, Blocks):
        return data if most is None else data.part(0, most)
    if tokenizer is None:
        raise ConfigurationError(
            f"the {what} {data!r} must be packed into blocks: pass processing_class=, a tokenizer."
        )
    text = model.config.get_text_config(decoder=True)
    check_tokenizer(tokenizer, text.vocab_size, str(model.config.name_or_path or type(model).__name__))
    if isinstance(data, str):
        data = TextSource.parse(data)
    if _is_stream(data) and most is None:
        raise ConfigurationError(f"the {what} {data.data!r} is a stream, which has no end: say max_steps.")
    return pack(data, tokenizer, choose_block_length(model.config, block_length), most)


def _is_stream(data: Any) -> bool:
    return isinstance(data, TextSource) and data.streaming


def model_and_tokenizer(
    model: Any, tokenizer: Any, revision: str | None, kwargs: Mapping[str, Any] | None
) -> tuple[Any, Any, str | None]:
    """Load what is named, at one commit; what is loaded already stays as it is.

    Args:
        model: A model, or the Hub id or folder of one, of a transplant or of a donor.
        tokenizer: Its tokenizer; by default the one beside it, where it is named.
        revision: Its revision.
        kwargs: As in `from_pretrained`.

    Returns:
        The model, the tokenizer, and the commit where the model came from the Hub.
    """
    if isinstance(model, PreTrainedModel):
        return model, tokenizer, None
    reference, loading = os.fspath(model), dict(kwargs or {})
    commit = pinned_commit(reference, revision, loading)
    loaded = load_model(reference, revision=commit, keep_replaced=True, **loading)
    if tokenizer is None:
        hub, gguf_file = HubOptions.from_kwargs(loading), loading.get("gguf_file")
        tokenizer = find_tokenizer(LoadedModel(loaded, reference, commit, hub, gguf_file))
    return loaded, tokenizer, commit


def blocks_of_run(
    model: Any, tokenizer: Any, args: Any, domain: Any, replay: Any, evaluated: Any
) -> tuple[Blocks, Blocks | None, Blocks | dict[str, Blocks] | None]:
    """Pack the texts of a run: the one to learn, the general one, and those that are measured on.

    Args:
        model: The model it is for.
        tokenizer: Its tokenizer.
        args: With `block_length`, `held_out_blocks`, steps and batch sizes.
        domain: As in `as_blocks`.
        replay: The same, or `None`.
        evaluated: The same, or several by name, or `None`.

    Raises:
        DataError: There is no text to learn, or it cannot be read.
    """
    if domain is None:
        raise DataError("train_dataset is missing: say which text shall be learnt.")
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    most = args.max_steps * batch if args.max_steps > 0 else None

    def packed(data: Any, what: str, limit: int | None = None) -> Blocks:
        limit = most if limit is None and _is_stream(data) else limit
        return as_blocks(data, model, tokenizer, args.block_length, what, limit)

    general = None if replay is None else packed(replay, "general text")
    held: Any = None
    if isinstance(evaluated, Mapping):
        held = {name: packed(text, f"held-out text {name}", args.held_out_blocks) for name, text in evaluated.items()}
    elif evaluated is not None:
        held = packed(evaluated, "held-out text", args.held_out_blocks)
    return packed(domain, "text"), general, held


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
