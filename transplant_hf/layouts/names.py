"""The names of tensors in `.pt` files: taken apart where a layer's number stands."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

from ..architecture import Anatomy, LayerNames

__all__ = ["LayerPart", "NameReader", "is_adapted", "is_adapter"]

# What wrappers put into names: DataParallel, torch.compile, FSDP, activation checkpointing, PEFT.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"}
_NUMBER = re.compile(r"(.*?)([0-9]{1,9})")
# What older Transformers versions stored in layers besides weights, and computes today.
_COMPUTED = re.compile(
    r"(?:.*\.)?(?:masked_bias|inv_freq|original_inv_freq|cos_cached|sin_cached|attn\.bias|causal_mask)"
)
_PACKED = ("_blocks", "_scales")
_ADAPTER = re.compile(r"(?:^|\.)(?:lora_|ia3_|hada_|lokr_|oft_|boft_|vera_|adalora)")


@dataclasses.dataclass(frozen=True)
class LayerPart:
    """A file's name of a layer's tensor.

    Args:
        start: What all names of the layer's tensors start with.
        prefix: What stands before the layer's number.
        number: The number; 0 where the file holds one layer without any.
        rest: The name inside the layer, as a checkpoint has it.
        inside: The name inside the layer, as the model has it; `None` for what the layer computes itself.
        packed: "_blocks" or "_scales" for a part of an MXFP4 tensor.
    """

    start: str
    prefix: str
    number: int
    rest: str
    inside: str | None
    packed: str = ""


class NameReader:
    """Finds the layer's number in names of an architecture's tensors.

    Args:
        anatomy: The source model, looked at.
    """

    def __init__(self, anatomy: Anatomy) -> None:
        self.names = LayerNames(anatomy.model, anatomy.stack_path)
        self._path = anatomy.stack_path
        self._known = {name for layer in anatomy.layers for name in layer.state_dict()}

    def part(self, name: str) -> LayerPart | None:
        """Take a name apart; `None` when nothing after a number in it names a tensor of a layer."""
        pieces = name.split(".")
        places = []
        for at, piece in enumerate(pieces):
            match = _NUMBER.fullmatch(piece)
            if match is not None:
                prefix = ".".join([*pieces[:at], *([match[1]] if match[1] else [])])
                places.append((at + 1, prefix, int(match[2]), pieces[at + 1 :]))
        return self._first(pieces, places)

    def part_of_only_layer(self, name: str) -> LayerPart | None:
        """The same for a file that holds one layer, without a number."""
        pieces = name.split(".")
        # What else starts with "attn.", say, is of the layer too.
        return self._first(pieces, [(at + 1, ".".join(pieces[:at]), 0, pieces[at:]) for at in range(len(pieces))])

    def _first(self, pieces: list[str], places: list[tuple[int, str, int, list[str]]]) -> LayerPart | None:
        """The first place after which stands a layer's tensor, else one that layers compute."""
        for read in (self._weight, self._computed):
            for start, prefix, number, after in places:
                found = read(after)
                if found is not None:
                    return LayerPart(".".join(pieces[:start]) + ".", prefix, number, *found)
        return None

    def _weight(self, pieces: list[str]) -> tuple[str, str, str] | None:
        for rest in _unwrapped(pieces):
            packed = next((end for end in _PACKED if rest.endswith(end)), "")
            plain = rest.removesuffix(packed)
            inside = self.names.inside_layer(f"{self._path}.0.{plain}")
            if inside in self._known:
                return plain, inside, packed
        return None

    def _computed(self, pieces: list[str]) -> tuple[str, None] | None:
        if not any(piece.isdigit() for piece in pieces):  # else the layer's number may come later
            for rest in _unwrapped(pieces):
                if _COMPUTED.fullmatch(rest) or self.names.is_ignored(f"{self._path}.0.{rest}"):
                    return rest, None
        return None


def _unwrapped(pieces: list[str]) -> Iterator[str]:
    if pieces:
        yield ".".join(pieces)
        clean = [piece for piece in pieces if piece not in _WRAPPERS]
        if clean and clean != pieces:
            yield ".".join(clean)


def is_adapter(name: str) -> bool:
    """Whether a tensor belongs to an adapter that was not merged into the layers.

    Example:
        >>> is_adapter("base_model.model.h.0.attn.c_attn.lora_A.default.weight")
        True
    """
    return bool(_ADAPTER.search(name))


def is_adapted(name: str) -> bool:
    """Whether a tensor of a model in memory belongs to an adapter, or stands behind one under a name of PEFT's.

    Example:
        >>> is_adapted("h.0.attn.c_attn.base_layer.weight")
        True
    """
    return is_adapter(name) or "base_layer" in name.split(".")
