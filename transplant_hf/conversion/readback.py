"""Read a written donor back, and compare it with what it was made from."""

from __future__ import annotations

import torch
from tqdm import tqdm

from ..donor.stream import pieces, size_of
from ..donor.tensors import TensorStore
from ..errors import CheckpointError

__all__ = ["compare_tensors"]

_PROGRESS_FROM = 1 << 28


def compare_tensors(source: TensorStore, written: TensorStore, source_name: str, written_name: str) -> None:
    """Compare two donors' tensors bit for bit, a piece at a time.

    Args:
        source: Where the tensors came from.
        written: Where they went.
        source_name: For messages.
        written_name: The same.

    Raises:
        CheckpointError: Names, shapes, types or any bit differ.
    """
    wanted, found = source.infos(), written.infos()
    if set(wanted) != set(found):
        strays = sorted(set(wanted) ^ set(found))
        raise CheckpointError(f"{written_name} and {source_name} hold other tensors, first {strays[0]!r}.")
    ours, theirs = source.slices(), written.slices()
    total = sum(map(size_of, wanted.values()))
    with tqdm(total=total, desc="Reading back", unit="B", unit_scale=True, disable=total < _PROGRESS_FROM) as progress:
        for name, info in wanted.items():
            if (info.shape, info.dtype) != (found[name].shape, found[name].dtype):
                raise CheckpointError(f"{written_name}: {name} became {found[name].dtype} {list(found[name].shape)}.")
            for one, other in zip(pieces(info, ours[name]), pieces(info, theirs[name]), strict=True):
                if not _same_bits(one, other):
                    raise CheckpointError(
                        f"{written_name}: {name} was read back with other bits than {source_name} has. The disk or "
                        "memory may be faulty; nothing was kept."
                    )
                progress.update(one.nbytes)


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    first, second = one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)
    even = first.numel() - first.numel() % 8
    return torch.equal(first[:even].clone().view(torch.int64), second[:even].clone().view(torch.int64)) and torch.equal(
        first[even:], second[even:]
    )
