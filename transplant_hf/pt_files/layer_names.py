"""The names of tensors in `.pt` files, split at the number of the layer."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

from ..architecture import Anatomy, LayerNames

# What wrappers add to names: DataParallel, torch.compile, FSDP, activation checkpointing, PEFT.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"}
_NUMBER = re.compile(r"(.*?)([0-9]{1,9})")
# What older versions of Transformers stored in layers besides weights, and compute today.
_COMPUTED = re.compile(
    r"(?:.*\.)?(?:masked_bias|inv_freq|original_inv_freq|cos_cached|sin_cached|attn\.bias|causal_mask)"
)
_PACKED = ("_blocks", "_scales")


@dataclasses.dataclass(frozen=True)
class LayerTensor:
    """A tensor of a layer, by its name in a file."""

    start: str  # the names of all tensors of the layer begin with it
    prefix: str  # before the layer's number
    number: int  # 0 in a file of one layer without a number
    rest: str  # inside the layer, as checkpoints name it
    inside: str | None  # as the model names it; `None` for what the layer computes itself
    packed: str = ""  # "_blocks" or "_scales" for a part of an MXFP4 tensor


class NameReader:
    """Finds the number of the layer in the names of an architecture's tensors."""

    def __init__(self, anatomy: Anatomy) -> None:
        self.names = LayerNames(anatomy.model, anatomy.stack_path)
        self._path = anatomy.stack_path
        self._known = {name for layer in anatomy.layers for name in layer.state_dict()}

    def read_numbered(self, name: str) -> LayerTensor | None:
        """Split a name; `None` when no tensor of a layer follows a number in it."""
        return self._first_match(name.split("."), list(numbers_in(name)))

    def read_unnumbered(self, name: str) -> LayerTensor | None:
        """Split a name in a file that holds one layer, without a number."""
        pieces = name.split(".")
        return self._first_match(pieces, [(at, ".".join(pieces[:at]), 0) for at in range(len(pieces))], 1)

    def _first_match(
        self, pieces: list[str], splits: list[tuple[int, str, int]], shared: int = 0
    ) -> LayerTensor | None:
        """The first split after which a tensor of a layer stands, else the first with one that layers compute."""
        for read in (self._weight, self._computed):
            for at, prefix, number in splits:
                found = read(pieces[at:])
                if found is not None:
                    return LayerTensor(".".join(pieces[: at + shared]) + ".", prefix, number, *found)
        return None

    def _weight(self, pieces: list[str]) -> tuple[str, str, str] | None:
        for rest in _without_wrappers(pieces):
            packed = next((end for end in _PACKED if rest.endswith(end)), "")
            plain = rest.removesuffix(packed)
            inside = self.names.inside_layer(f"{self._path}.0.{plain}")
            if inside in self._known:
                return plain, inside, packed
        return None

    def _computed(self, pieces: list[str]) -> tuple[str, None] | None:
        if not any(piece.isdigit() for piece in pieces):  # else the number of the layer may come later
            for rest in _without_wrappers(pieces):
                if _COMPUTED.fullmatch(rest) or self.names.is_ignored(f"{self._path}.0.{rest}"):
                    return rest, None
        return None


def numbers_in(name: str) -> Iterator[tuple[int, str, int]]:
    """Yield each number in a dotted name: how many pieces end with it, what stands before it, and the number."""
    pieces = name.split(".")
    for at, piece in enumerate(pieces):
        match = _NUMBER.fullmatch(piece)
        if match is not None:
            yield at + 1, ".".join([*pieces[:at], *([match[1]] if match[1] else [])]), int(match[2])


def _without_wrappers(pieces: list[str]) -> Iterator[str]:
    if pieces:
        yield ".".join(pieces)
        clean = [piece for piece in pieces if piece not in _WRAPPERS]
        if clean and clean != pieces:
            yield ".".join(clean)
