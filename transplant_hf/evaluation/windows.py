"""What a model reads at once, and which tokens it is asked for: each token of a text once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch

from ..errors import ConfigurationError, DataError
from ..texts import Blocks

__all__ = ["IGNORED", "Batch", "Windows"]

# The target of a place that does not count; the losses of torch and Transformers know it.
IGNORED = -100
_LONGEST_BLOCK = 1024


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of equal length.

    Args:
        input_ids: `[batch, tokens]`.
        targets: `[batch, tokens]`, the token after each place; `IGNORED` where it does not count.
        attention_mask: `[batch, tokens]`, where rows are padded.
    """

    input_ids: torch.Tensor
    targets: torch.Tensor
    attention_mask: torch.Tensor | None = None


class Windows:
    """A text, cut into what a model reads at once.

    A stream is read in windows of `block_length` tokens, the next one `stride` tokens on; only tokens that no window
    before had as targets count. So each token but the first is predicted once, from at least `block_length - stride`
    tokens before it, save at the start. The shorter last window is read by itself.

    Args:
        text: `Blocks`, or a stream `[tokens]`.
        block_length: Tokens in a window of a stream.
        stride: How far windows are apart; by default `block_length`: they do not overlap.
        start: A token to put before each window of a stream; the stream's first token is then predicted too.
        name: What to call the text in messages.

    Raises:
        ConfigurationError: A stride outside 1..block_length, or a window for blocks, which have their own.
        DataError: There is no token to predict.
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
        self._rest: Batch | None = None
        self._start: int | None = None
        if isinstance(text, Blocks):
            if stride is not None or block_length not in (None, text.block_length):
                raise ConfigurationError(
                    f"{text!r} is cut into blocks already: block_length={block_length} and stride={stride} are for "
                    "streams of tokens. Pass the stream, or pack the text anew."
                )
            self.block_length = self.stride = text.block_length - 1
            self._rows, self._targets = text.tokens[:, :-1], text.tokens[:, 1:]
        else:
            self.block_length, self.stride = _checked(block_length, stride)
            self._cut(text, start)
        self._check_numbers()

    def _cut(self, stream: torch.Tensor, start: int | None) -> None:
        if start is not None:
            stream = torch.cat([stream.new_tensor([start]), stream])
        predicted = len(stream) - 1
        if stream.dim() != 1 or predicted < 1:
            raise DataError(f"perplexity needs a stream of at least 2 tokens, got {list(stream.shape)}.")
        self._start = start
        length, inputs, targets = min(self.block_length, predicted), stream[:-1], stream[1:]
        self._rows, self._targets = inputs.unfold(0, length, self.stride), targets.unfold(0, length, self.stride)
        ended = (len(self._rows) - 1) * self.stride + length
        begin = len(self._rows) * self.stride
        if ended < predicted:
            rest, wanted = _copied(inputs[begin:][None]), _copied(targets[begin:][None])
            wanted[:, : ended - begin] = IGNORED
            self._rest = Batch(self._started(rest), wanted)

    def _check_numbers(self) -> None:
        if self._rows.min() < 0:
            raise DataError(f"{self.name} holds the token number {int(self._rows.min())}; they start at 0.")

    @property
    def highest(self) -> int:
        """The highest token number in the text."""
        parts = [self._rows, self._targets, *([self._rest.input_ids, self._rest.targets] if self._rest else [])]
        return max(int(part.max()) for part in parts)

    @property
    def num_predicted(self) -> int:
        """How many tokens are predicted."""
        first, others = self._targets.shape[1], (len(self._targets) - 1) * min(self.stride, self._targets.shape[1])
        return first + others + (int((self._rest.targets != IGNORED).sum()) if self._rest else 0)

    def num_batches(self, rows: int) -> int:
        """How many batches `batches` yields."""
        return math.ceil(len(self._rows) / rows) + (self._rest is not None)

    def batches(self, rows: int) -> Iterator[Batch]:
        """Yield the windows in batches.

        Args:
            rows: Windows in a batch; what is left over makes a smaller one, and the shorter last window one by itself.
        """
        overlap = max(self._rows.shape[1] - self.stride, 0)
        for begin in range(0, len(self._rows), rows):
            ids = _copied(self._rows[begin : begin + rows])
            targets = _copied(self._targets[begin : begin + rows])
            if overlap:
                targets[1 if begin == 0 else 0 :, :overlap] = IGNORED
            yield Batch(self._started(ids), targets)
        if self._rest is not None:
            yield self._rest

    def _started(self, ids: torch.Tensor) -> torch.Tensor:
        if self._start is not None:
            ids[:, 0] = self._start
        return ids


def _copied(tokens: torch.Tensor) -> torch.Tensor:
    # Always: targets are masked in place, and the text is the caller's.
    return tokens.to(torch.long, copy=True, memory_format=torch.contiguous_format)


def _checked(block_length: int | None, stride: int | None) -> tuple[int, int]:
    length = _LONGEST_BLOCK if block_length is None else block_length
    step = length if stride is None else stride
    if length < 1 or not 1 <= step <= length:
        raise ConfigurationError(
            f"block_length must be at least 1 and stride in 1..block_length, got block_length={length} and "
            f"stride={step}."
        )
    return length, step
