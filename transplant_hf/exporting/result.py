"""What `export` returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig

from ..donor.record import FileStamp
from ..errors import ConfigurationError
from ..layer_map import LayerMap
from ..splice import Blueprint


@dataclasses.dataclass(frozen=True)
class Export:
    """What was exported.

    Args:
        folder: The folder, or the GGUF file.
        recipient: The recipient, with its commit if it has one, or its GGUF file.
        model_class: The class of Transformers that loads it.
        layer_map: Where each layer came from.
        dtype: The dtype of its weights; in a GGUF file, of the donors' matrices.
        files: sha256 and size of every weight file.
        verified: Whether the export was loaded again and its logits compared with the transplant's, or a GGUF file was
            read again and its tensors compared.
        difference: The largest difference of logits; where it is not 0, all weights were equal bit for bit.
        irregular: Whether the kinds of layers no longer repeat as in the recipient. Programs that derive the kind of a
            layer from its number, instead of reading `layer_types`, then compute something else.
        gguf: Whether it is a GGUF file.
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
    gguf: bool = False

    @property
    def size(self) -> int:
        """Bytes of all weight files."""
        return sum(stamp.size for stamp in self.files.values())

    def to_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return dataclasses.asdict(self) | {"layer_map": [list(layer) for layer in self.layer_map], "size": self.size}

    def __str__(self) -> str:
        count = len(self.files)
        kind = "a GGUF file" if self.gguf else "a plain checkpoint"
        dtype = f"donors in {self.dtype}" if self.gguf else self.dtype
        lines = [
            f"{self.folder}: {self.model_class} with {len(self.layer_map)} layers, {kind}",
            f"  recipient {self.recipient}",
            f"  {count} weight file{'s' if count > 1 else ''}, {self.size:,} bytes, {dtype}",
            f"  {self._verdict()}",
        ]
        if self.irregular:
            readers = (
                "llama.cpp reads them, Transformers derives them from the layer's number"
                if self.gguf
                else "Transformers reads them, vLLM and llama.cpp derive some kinds of layers from the layer's number"
            )
            lines.append(f"  its layer_types do not repeat as the recipient's do; {readers} (docs/export.md)")
        return "\n".join(lines)

    def _verdict(self) -> str:
        if not self.verified:
            return "not verified"
        if self.gguf:
            return "verified: all tensors equal, byte for byte"
        if self.difference:
            return f"verified: weights equal, logits within {self.difference:.2g}"
        return "verified: logits equal, bit for bit"


def refuse_beyond_layers(blueprint: Blueprint, output: str, otherwise: str = "") -> None:
    """Refuse strengths and donors side by side, which layers that run one after another cannot express."""
    for part in blueprint.parts:
        if part.spec.strength == 0:
            raise ConfigurationError(
                f"donor {part.name!r} has strength 0 and changes nothing: leave it out. If it is the only donor, use "
                "the recipient itself."
            )
        if part.spec.strength != 1:
            raise ConfigurationError(
                f"donor {part.name!r} has strength {part.spec.strength}, which {output} cannot express. Export it at "
                "strength 1: name the recipient and DONOR@POSITION, in Python DonorSpec(donor, position, strength=1)."
                f"{otherwise}"
            )
    if blueprint.side_by_side_groups:
        raise ConfigurationError(
            f"donors {', '.join(blueprint.side_by_side_groups[0])} run side by side at one position, and {output} runs "
            'one layer after another. Export them stacked (composition="stacked", --composition stacked), which is '
            f"another model.{otherwise}"
        )


def layer_types(config: PreTrainedConfig) -> list[str]:
    """Return the kind of each layer, where a configuration lists them."""
    return list(getattr(config.get_text_config(), "layer_types", None) or ())


def breaks_pattern(before: Sequence[str], after: Sequence[str]) -> bool:
    """Whether `after` does not continue the shortest period of `before`."""
    lengths = range(1, len(before) + 1)
    period = next((n for n in lengths if all(kind == before[i % n] for i, kind in enumerate(before))), 1)
    return bool(before) and any(kind != before[i % period] for i, kind in enumerate(after))
