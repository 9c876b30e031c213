"""The rows of a whole training run, in order: which block of text comes when, and what goes along with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from ..errors import ConfigurationError, DataError
from ..partial import PREFIX_STATES, PrefixCache
from ..texts import Blocks

__all__ = ["REPLAYED", "Rows", "rows_needed"]

# The key that marks rows of general text, for losses that treat them differently.
REPLAYED = "replayed"


def rows_needed(blocks: int, share: float, epochs: float) -> int:
    """Return how many rows show `blocks` blocks of the domain `epochs` times beside a share of general text."""
    return math.ceil(blocks * epochs / (1.0 - share))


class Rows(Dataset[dict[str, Any]]):
    """Every row that a training run reads, in the order in which it reads them.

    The order is drawn when the run begins, from its seed alone: a run that is resumed, or that runs in several
    processes, reads the same rows. General text is spread evenly, so that every batch holds its share.

    Args:
        domain: Blocks of the text to learn.
        count: How many rows the run reads.
        replay: Blocks of general text, against forgetting.
        share: The share of rows that are general text, 0 to 1.
        seed: Of the order.
        mark: Whether rows say if they are general text.

    Raises:
        ConfigurationError: A share outside 0..1.
        DataError: Blocks of two lengths, or none at all.
    """

    def __init__(
        self,
        domain: Blocks,
        count: int,
        replay: Blocks | None = None,
        share: float = 0.0,
        seed: int = 0,
        mark: bool = False,
    ) -> None:
        if not 0.0 <= share < 1.0:
            raise ConfigurationError(f"the share of general text must be at least 0 and below 1, got {share}.")
        if replay is not None and replay.tokens.shape[1] != domain.tokens.shape[1]:
            raise DataError(
                f"blocks of {domain.name!r} have {domain.tokens.shape[1]} tokens, those of {replay.name!r} "
                f"{replay.tokens.shape[1]}. Pack both with one block_length."
            )
        if not len(domain) or (replay is not None and not len(replay)):
            raise DataError("there is no block of text to train on.")
        self.domain, self.replay = domain, replay
        self.share = share if replay is not None else 0.0
        self.prefix: PrefixCache | None = None
        self._mark = mark
        self._plan = self._drawn(count, seed)

    def _drawn(self, count: int, seed: int) -> list[int]:
        # A generator for each text: the rows of a longer run begin with those of a shorter one.
        of_domain, of_general = (torch.Generator().manual_seed(number) for number in (seed, seed + 1))
        replayed = [math.floor((n + 1) * self.share + 1e-9) > math.floor(n * self.share + 1e-9) for n in range(count)]
        general = _order(len(self.replay) if self.replay is not None else 1, sum(replayed), of_general)
        domain = _order(len(self.domain), count - sum(replayed), of_domain)
        sources = {True: iter(general), False: iter(domain)}
        return [next(sources[general]) + (len(self.domain) if general else 0) for general in replayed]

    def __len__(self) -> int:
        return len(self._plan)

    def __getitem__(self, row: int) -> dict[str, Any]:
        number = self._plan[row]
        item: dict[str, Any] = dict(self.block(number))
        if self._mark:
            item[REPLAYED] = torch.tensor(number >= len(self.domain))
        if self.prefix is not None:
            item[PREFIX_STATES] = self.prefix[number]
        return item

    def block(self, number: int) -> dict[str, torch.Tensor]:
        """Return a block by its number: those of the domain first, then those of the general text.

        Args:
            number: From 0; the first block of the general text follows the last of the domain.
        """
        if number < len(self.domain):
            return self.domain[number]
        assert self.replay is not None
        return self.replay[number - len(self.domain)]

    @property
    def used(self) -> list[int]:
        """The numbers of the blocks that the run reads, ascending."""
        return sorted(set(self._plan))

    @property
    def fingerprints(self) -> list[str]:
        """The fingerprints of the texts."""
        return [blocks.fingerprint for blocks in (self.domain, self.replay) if blocks is not None]

    def described(self) -> dict[str, Any]:
        """Say what the rows are, by fingerprints."""
        described: dict[str, Any] = {
            "text": self.domain.name,
            "text_sha256": self.domain.fingerprint,
            "rows": len(self),
            "block_length": int(self.domain.tokens.shape[1]),
        }
        if self.replay is not None and self.share:
            described |= {
                "replay_text": self.replay.name,
                "replay_sha256": self.replay.fingerprint,
                "replay_share": self.share,
            }
        return described


class Numbered:
    """Blocks by their number in a run; what `fill_cache` reads."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        return self._rows.block(number)


def _order(size: int, count: int, generator: torch.Generator) -> Sequence[int]:
    """Shuffle again for every time around."""
    order: list[int] = []
    while len(order) < count:
        order += torch.randperm(size, generator=generator).tolist()
    return order[:count]
