"""How many threads small matrices are multiplied with."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

__all__ = ["quickest_threads"]

_TRIALS = 3


@contextmanager
def quickest_threads(work: Callable[[], object]) -> Iterator[int]:
    """Run a block with the number of threads that does some work soonest.

    Matrices as small as the demo's gain little from many threads; and where other programs keep the processor
    busy, threads that wait for each other take several times as long as one alone.

    Args:
        work: A sample of the work; called a few times for each number of threads.

    Yields:
        The number of threads, which is reset when the block ends.
    """
    before = torch.get_num_threads()
    times: dict[int, float] = {}
    try:
        for count in sorted({1, min(2, before), min(4, before), before}):
            torch.set_num_threads(count)
            work()
            start = time.perf_counter()
            for _ in range(_TRIALS):
                work()
            times[count] = time.perf_counter() - start
        quickest = min(times, key=lambda count: times[count])
        torch.set_num_threads(quickest)
        yield quickest
    finally:
        torch.set_num_threads(before)
