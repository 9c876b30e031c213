"""Cut a text into the windows that a model reads, so that each token is predicted once."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.utils.data import Dataset

from ..errors import ConfigurationError, DataError
from ..partial.streaming import Text
from ..texts import Blocks

__all__ = ["IGNORED", "Batch", "Windows"]

# The target of a token that does not count, as in the losses of torch and Transformers.
IGNORED = -100
_DEFAULT_LENGTH = 1024


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of equal length, `[batch, tokens]`."""

    input_ids: torch.Tensor
    targets: torch.Tensor  # the token after each input; `IGNORED` where it does not count
    attention_mask: torch.Tensor | None = None  # where rows are padded


class _Window(NamedTuple):
    """Inputs are tokens `begin` to `end`; targets are one token later and count from `counted`."""

    begin: int
    end: int
    counted: int


class Windows(Dataset[dict[str, torch.Tensor]]):
    """The windows of one text; also a dataset for `Trainer`, of those windows that have the full length.

    A stream is read in windows of `block_length` tokens, each `stride` tokens after the last one. A token counts in
    the first window that predicts it, so each token except the first is predicted once, and outside the first window
    from at least `block_length - stride` tokens before it. In blocks, all tokens except each block's first count.
    A token `start` is put before each window of a stream; the stream's first token is then predicted too.
    """

    def __init__(
        self,
        text: Blocks | torch.Tensor,
        block_length: int | None = None,
        stride: int | None = None,
        start: int | None = None,
        name: str | None = None,
    ) -> None:
        self.name = name or (text.name if isinstance(text, Blocks) else "the text")
        self._start: int | None = None
        self._in_blocks = isinstance(text, Blocks)
        if isinstance(text, Blocks):
            if stride is not None or block_length not in (None, text.block_length):
                raise ConfigurationError(
                    f"{text!r} is cut into blocks already: block_length={block_length} and stride={stride} are for "
                    "streams of tokens. Pass the stream, or pack the text again."
                )
            self.block_length = text.block_length
            self._stream, step = text.tokens.flatten(), text.block_length
            begins = range(0, len(self._stream), step)
            self._windows = [_Window(begin, begin + step - 1, begin) for begin in begins]
        else:
            self.block_length = length = _DEFAULT_LENGTH if block_length is None else block_length
            step = length if stride is None else stride
            if length < 1 or not 1 <= step <= length:
                raise ConfigurationError(
                    "block_length (--block-length) must be at least 1, and stride (--stride) in 1..block_length; got "
                    f"block_length={length} and stride={step}."
                )
            self._start = start
            self._stream = text if start is None else torch.cat([text.new_tensor([start]), text])
            self._windows = _cut(self._stream, length, step)
        if self._stream.min() < 0:
            raise DataError(f"{self.name} contains the token number {int(self._stream.min())}; they start at 0.")

    def __len__(self) -> int:
        return len(self.equal_lengths()[0])

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        """Return a window as an example of training; blocks with the token that is predicted last."""
        begin, end, _ = self._windows[number]
        ids = self._stream[begin : end + self._in_blocks].long()
        if self._start is not None:
            ids[0] = self._start
        return {"input_ids": ids, "labels": ids.clone()}

    def equal_lengths(self) -> list[range]:
        """Return the numbers of the windows that have one length; a shorter last one stands alone."""
        first, last, count = self._windows[0], self._windows[-1], len(self._windows)
        shorter = last.end - last.begin < first.end - first.begin
        return [range(count - 1), range(count - 1, count)] if shorter else [range(count)]

    def texts(self) -> list[Text]:
        """Return them as texts that pass through layers, windows of one length together."""
        return [Text(self, numbers) for numbers in self.equal_lengths()]

    @property
    def fingerprint(self) -> str:
        """sha256 of the tokens and of how they are cut."""
        digest = hashlib.sha256(repr((self._start, self._windows)).encode())
        digest.update(self._stream.to(torch.int32).contiguous().numpy().astype("<i4", copy=False).data)
        return digest.hexdigest()

    @property
    def highest(self) -> int:
        """The highest token number in the text."""
        return int(self._stream.max())

    @property
    def num_predicted(self) -> int:
        """How many tokens are predicted."""
        return sum(window.end - window.counted for window in self._windows)

    def num_batches(self, batch_size: int) -> int:
        """How many batches `batches` yields."""
        return len(self._groups(batch_size))

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Yield the windows in batches; a shorter last window is a batch of its own."""
        for windows in self._groups(batch_size):
            ids = torch.stack([self._stream[begin:end] for begin, end, _ in windows]).long()
            targets = torch.stack([self._stream[begin + 1 : end + 1] for begin, end, _ in windows]).long()
            for row, window in enumerate(windows):
                targets[row, : window.counted - window.begin] = IGNORED
            if self._start is not None:
                ids[:, 0] = self._start
            yield Batch(ids, targets)

    def _groups(self, batch_size: int) -> list[list[_Window]]:
        return [
            self._windows[numbers[0] : numbers[-1] + 1]
            for equal in self.equal_lengths()
            for numbers in (equal[begin : begin + batch_size] for begin in range(0, len(equal), batch_size))
        ]


def _cut(stream: torch.Tensor, length: int, stride: int) -> list[_Window]:
    predicted = len(stream) - 1
    if stream.dim() != 1 or predicted < 1:
        raise DataError(f"perplexity needs a stream of at least 2 tokens, got {list(stream.shape)}.")
    windows: list[_Window] = []
    counted = 0
    for begin in range(0, predicted, stride):
        end = min(begin + length, predicted)
        windows.append(_Window(begin, end, counted))
        counted = end
        if end == predicted:
            break
    return windows
