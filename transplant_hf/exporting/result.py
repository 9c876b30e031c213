"""What `export` returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..donor.record import FileStamp
from ..layer_map import LayerMap


@dataclasses.dataclass(frozen=True)
class Export:
    """What was exported.

    Args:
        folder: The folder.
        recipient: The recipient, with its commit if it has one.
        model_class: The class of Transformers that loads it.
        layer_map: Where each layer came from.
        dtype: The dtype of its weights.
        files: sha256 and size of every weight file.
        verified: Whether the export was loaded again and its logits compared with the transplant's.
        difference: The largest difference of logits; where it is not 0, all weights were equal bit for bit.
        irregular: Whether the kinds of layers no longer repeat as in the recipient. Programs that derive the kind of a
            layer from its number, instead of reading `layer_types`, then compute something else.
    """

    folder: str
    recipient: str
    model_class: str
    layer_map: LayerMap
    dtype: str
    files: Mapping[str, FileStamp]
    verified: bool
    difference: float = 0.0
    irregular: bool = False

    @property
    def size(self) -> int:
        """Bytes of all weight files."""
        return sum(stamp.size for stamp in self.files.values())

    def to_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return dataclasses.asdict(self) | {"layer_map": [list(layer) for layer in self.layer_map], "size": self.size}

    def __str__(self) -> str:
        count = len(self.files)
        difference = f"weights equal, logits within {self.difference:.2g}"
        equal = difference if self.difference else "logits equal, bit for bit"
        verdict = f"verified: {equal}" if self.verified else "not verified"
        lines = [
            f"{self.folder}: {self.model_class} with {len(self.layer_map)} layers, a plain checkpoint",
            f"  recipient {self.recipient}",
            f"  {count} weight file{'s' if count > 1 else ''}, {self.size:,} bytes, {self.dtype}",
            f"  {verdict}",
        ]
        if self.irregular:
            lines.append(
                "  its layer_types do not repeat as the recipient's do; Transformers reads them, vLLM and llama.cpp "
                "derive some kinds of layers from the layer's number (docs/export.md)"
            )
        return "\n".join(lines)
