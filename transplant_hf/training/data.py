"""The data of a training run: the model, its tokenizer, texts as blocks, and the order of the rows."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import ConcatDataset, Dataset
from transformers import PreTrainedModel

from ..architecture import choose_block_length
from ..errors import ConfigurationError, DataError
from ..evaluation.losses import check_tokenizer_of
from ..evaluation.models_and_texts import LoadedModel, find_tokenizer, model_to_measure, read_windows
from ..evaluation.windows import Windows
from ..model.load_any_model import pinned_commit
from ..partial import PREFIX_STATES
from ..texts import Blocks, TextSource, pack
from ..texts.documents import check_texts

__all__ = ["REPLAYED", "Rows", "RunData", "as_blocks", "model_and_tokenizer", "read_run", "rows_per_step"]

# The key that marks rows of general text, for losses that treat them differently.
REPLAYED = "replayed"


@dataclass(frozen=True)
class RunData:
    """What a run starts from: a loaded model, its commit on the Hub, and texts as blocks."""

    model: Any
    tokenizer: Any
    commit: str | None
    domain: Blocks
    general: Blocks | None
    held_out: Windows | dict[str, Windows] | None

    def replay_share(self, args: Any) -> float:
        """Return the share of general text in a batch."""
        return float(args.replay_share) if self.general is not None else 0.0

    def rows(self, args: Any, mark: bool = False) -> Rows:
        """Return the rows of the run, in order."""
        share = self.replay_share(args)
        steps = args.max_steps
        if steps <= 0:
            steps = max(1, math.ceil(len(self.domain) * args.num_train_epochs / (1.0 - share)) // rows_per_step(args))
        return Rows(self.domain, steps * rows_per_step(args), self.general, share, args.seed, mark)


def read_run(
    model: Any,
    args: Any,
    domain: Any,
    general: Any = None,
    held_out: Any = None,
    tokenizer: Any = None,
    revision: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> RunData:
    """Load the model of a run, pack its texts into blocks, and cut held-out text as `evaluate` does."""
    if domain is None:
        raise DataError("train_dataset is missing: name the text to learn.")
    check_texts(domain, general, held_out)
    loaded, tokenizer, commit = model_and_tokenizer(model, tokenizer, revision, model_kwargs)
    rows_read = args.max_steps * rows_per_step(args) if args.max_steps > 0 else None

    def packed(data: Any, what: str) -> Blocks:
        return as_blocks(data, loaded, tokenizer, args.block_length, what, rows_read if _is_stream(data) else None)

    def cut(name: str | None, data: Any) -> Windows:
        limit = rows_read if args.held_out_blocks is None and _is_stream(data) else args.held_out_blocks
        if isinstance(data, Blocks):
            return Windows(data.part(0, limit), name=name)
        _check_can_pack(data, tokenizer, f"held-out text{f' {name}' if name else ''}", limit)
        length = choose_block_length(loaded.config, args.block_length)
        max_tokens, found = None if limit is None else limit * length, LoadedModel(loaded)
        (windows,) = read_windows(found, {name: data}, tokenizer, length, max_tokens=max_tokens)
        return windows

    held: Any = None
    if isinstance(held_out, Mapping):
        held = {name: cut(name, text) for name, text in held_out.items()}
    elif held_out is not None:
        held = cut(None, held_out)
    learned = packed(domain, "text")
    replayed = None if general is None else packed(general, "general text")
    return RunData(loaded, tokenizer, commit, learned, replayed, held)


def model_and_tokenizer(
    model: Any, tokenizer: Any, revision: str | None, kwargs: Mapping[str, Any] | None
) -> tuple[Any, Any, str | None]:
    """Load a model that is named, at one commit; a loaded model is returned unchanged."""
    if isinstance(model, PreTrainedModel):
        return model, tokenizer, None
    reference, loading = os.fspath(model), dict(kwargs or {})
    commit = pinned_commit(reference, revision, loading)
    loaded = model_to_measure(reference, commit, {**loading, "quantize_donors": False})
    return loaded.model, find_tokenizer(loaded) if tokenizer is None else tokenizer, commit


def as_blocks(
    data: Any, model: Any, tokenizer: Any, block_length: int | None, what: str, max_blocks: int | None = None
) -> Blocks:
    """Pack text into blocks, unless it is packed already."""
    if isinstance(data, Blocks):
        return data if max_blocks is None else data.part(0, max_blocks)
    _check_can_pack(data, tokenizer, what, max_blocks)
    check_tokenizer_of(model, tokenizer)
    return pack(data, tokenizer, choose_block_length(model.config, block_length), max_blocks)


def _check_can_pack(data: Any, tokenizer: Any, what: str, limit: int | None) -> None:
    if tokenizer is None:
        raise ConfigurationError(
            f"the {what} {data!r} must be packed into blocks: pass processing_class=, a tokenizer."
        )
    if _is_stream(data) and limit is None:
        raise ConfigurationError(f"the {what} {data.data!r} is a stream, which has no end: set max_steps (--steps).")


def _is_stream(data: Any) -> bool:
    return isinstance(data, TextSource) and data.streaming


def rows_per_step(args: Any) -> int:
    """Return how many rows all processes read in one optimizer step."""
    rows: int = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return rows


class Rows(Dataset[dict[str, Any]]):
    """All rows of a training run, in the order in which they are read.

    The order depends on the seed alone: a run that is resumed, or that has several processes, reads the same rows.
    General text is spread evenly, so that every batch has its share.

    Args:
        domain: Blocks of the text to learn.
        count: How many rows the run reads.
        replay: Blocks of general text, against forgetting.
        share: The share of rows that are general text, at least 0 and below 1.
        seed: The seed of the order.
        mark: Whether rows say if they are general text.

    Raises:
        ConfigurationError: A share out of range.
        DataError: Blocks of two lengths.
    """

    def __init__(
        self,
        domain: Blocks,
        count: int,
        replay: Blocks | None = None,
        share: float = 0.0,
        seed: int = 42,
        mark: bool = False,
    ) -> None:
        if not 0.0 <= share < 1.0:
            raise ConfigurationError(f"the share of general text must be at least 0 and below 1, got {share}.")
        if replay is not None and replay.block_length != domain.block_length:
            raise DataError(
                f"blocks of {domain.name!r} have {domain.block_length} tokens, those of {replay.name!r} "
                f"{replay.block_length}. Pack both with one block_length."
            )
        self.domain, self.replay = domain, replay
        self.share = share if replay is not None else 0.0
        self.prefix: Any = None  # hidden states by the number of a block
        # By number: blocks of the domain first, then those of the general text.
        texts = [domain] if replay is None else [domain, replay]
        self.blocks: ConcatDataset[dict[str, torch.Tensor]] = ConcatDataset(texts)
        self._mark = mark
        self._numbers = self._draw(count, seed)

    def _draw(self, count: int, seed: int) -> list[int]:
        # One generator for each text: the rows of a longer run begin with those of a shorter one.
        of_domain, of_general = (torch.Generator().manual_seed(number) for number in (seed, seed + 1))
        replayed = [math.floor((n + 1) * self.share + 1e-9) > math.floor(n * self.share + 1e-9) for n in range(count)]
        general = _shuffled(len(self.replay) if self.replay is not None else 1, sum(replayed), of_general)
        domain = _shuffled(len(self.domain), count - sum(replayed), of_domain)
        sources = {True: iter(general), False: iter(domain)}
        return [next(sources[is_general]) + (len(self.domain) if is_general else 0) for is_general in replayed]

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, row: int) -> dict[str, Any]:
        number = self._numbers[row]
        item: dict[str, Any] = dict(self.blocks[number])
        if self._mark:
            item[REPLAYED] = torch.tensor(number >= len(self.domain))
        if self.prefix is not None:
            item[PREFIX_STATES] = self.prefix[number]
        return item

    @property
    def used(self) -> list[int]:
        """The numbers of the blocks that the run reads, ascending."""
        return sorted(set(self._numbers))

    @property
    def used_by_text(self) -> tuple[list[int], list[int]]:
        """Those of the domain, and those of general text."""
        used, first = self.used, len(self.domain)
        return [number for number in used if number < first], [number for number in used if number >= first]

    @property
    def fingerprints(self) -> list[str]:
        """The fingerprints of the texts."""
        return [blocks.fingerprint for blocks in (self.domain, self.replay) if blocks is not None]

    def described(self) -> dict[str, Any]:
        """Return names and fingerprints of the texts, and the number of rows, as JSON."""
        described: dict[str, Any] = {
            "text": self.domain.name,
            "text_sha256": self.domain.fingerprint,
            "rows": len(self),
            "block_length": self.domain.block_length,
        }
        if self.replay is not None and self.share:
            described |= {
                "replay_text": self.replay.name,
                "replay_sha256": self.replay.fingerprint,
                "replay_share": self.share,
            }
        return described


def _shuffled(size: int, count: int, generator: torch.Generator) -> Sequence[int]:
    """Numbers below `size`, shuffled again for each pass."""
    numbers: list[int] = []
    while len(numbers) < count:
        numbers += torch.randperm(size, generator=generator).tolist()
    return numbers[:count]
