"""The tensors of a donor that is still a `.pt` file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..archive import PtFile
from ..layouts import Layout, Packed
from .dtypes import stored_dtype
from .tensors import TensorInfo

__all__ = ["PtTensors"]


class PtTensors:
    """Tensors of a `.pt` file under a donor's names, read on demand.

    Args:
        file: The file.
        layout: Which of its tensors they are.
    """

    def __init__(self, file: PtFile, layout: Layout) -> None:
        self.path: Path = file.path
        self._parts = {name: _part(file, found) for name, found in layout.tensors.items()}

    def infos(self) -> Mapping[str, TensorInfo]:
        """Describe every tensor."""
        return {
            name: TensorInfo(tuple(part.get_shape()), stored_dtype(part.dtype, name))
            for name, part in self._parts.items()
        }

    def slices(self) -> Mapping[str, Any]:
        """Return the tensors, to be read by `[...]` or by slices of the first dimension."""
        return dict(self._parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)


def _part(file: PtFile, found: str | Packed) -> Any:
    if isinstance(found, Packed):
        return _Unpacked(file, found)
    file.region(found)  # refuses a tensor that claims more than the file holds
    return file[found]


class _Unpacked:
    """An MXFP4 tensor in bf16, as Transformers dequantises it, some experts at a time."""

    dtype = torch.bfloat16

    def __init__(self, file: PtFile, found: Packed) -> None:
        for name in (found.blocks, found.scales):
            file.region(name)
        self._blocks, self._scales = file[found.blocks], file[found.scales]

    def get_shape(self) -> list[int]:
        """Experts, inputs, outputs."""
        experts, outputs, groups, half = self._blocks.get_shape()
        return [experts, groups * half * 2, outputs]

    def __getitem__(self, index: Any) -> torch.Tensor:
        # Late: Transformers' quantisation code is slow to import, and few donors need it.
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        if isinstance(index, slice):
            blocks, scales = self._blocks[index], self._scales[index]
            return convert_moe_packed_tensors(blocks, scales, dtype=self.dtype).contiguous()
        return self[0 : self.get_shape()[0]][index]
