"""Find a donor's layers among the tensors of a file, or say what the file holds and what was expected."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence

import torch

from ..architecture import Anatomy, LayerNames
from ..architecture.names import is_adapter
from ..display import dtype_name
from ..errors import CheckpointError, ConfigurationError
from ..numeric import consecutive_layers
from .pt_file import PtTensor

_MAX_LISTED = 12
# What wrappers add to names: DataParallel, torch.compile, FSDP, activation checkpointing, PEFT.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"}
_NUMBER = re.compile(r"(.*?)([0-9]{1,9})")
# What older versions of Transformers stored in layers besides weights, and compute today.
_COMPUTED = re.compile(
    r"(?:.*\.)?(?:masked_bias|inv_freq|original_inv_freq|cos_cached|sin_cached|attn\.bias|causal_mask)"
)
_PACKED = ("_blocks", "_scales")


@dataclasses.dataclass(frozen=True)
class Layout:
    """A donor found in a file."""

    layers: tuple[int, ...]
    tensors: Mapping[str, Sequence[str]]  # names in the file by the donor's names; blocks and scales of MXFP4
    prefix: str
    dropped: tuple[str, ...]  # names in the file that belong to no layer of the donor


@dataclasses.dataclass(frozen=True)
class _Stack:
    """Layers with one prefix: for each number, what is known of its tensors, by their names in the file."""

    prefix: str
    layers: Mapping[int, Mapping[str, LayerTensor]]

    def weights(self, number: int) -> dict[str, LayerTensor]:
        return {name: found for name, found in self.layers.get(number, {}).items() if found.inside is not None}


def match_layers(
    tensors: Mapping[str, PtTensor],
    anatomy: Anatomy,
    recorded: Sequence[int] | None,
    wanted: Sequence[int] | None,
    file: str,
) -> Layout:
    """Recognize the layout of a file."""
    reader = NameReader(anatomy)
    stack = _find_stack(tensors, reader, anatomy, file)
    chosen = choose_layers(sorted(stack.layers), anatomy.num_layers, recorded, wanted, file)
    found = {source: stack.weights(number) for number, source in sorted(chosen.items(), key=lambda item: item[1])}
    problems = [line for source, layer in found.items() for line in _misfits(source, layer, tensors, anatomy, reader)]
    if problems:
        raise CheckpointError(
            f"{file} does not hold layers {sorted(found)} of this {anatomy.config.model_type} model:\n  - "
            + _listed(problems, "\n  - ")
            + "\nIs this the model that they came from, and are these the layers?"
        )
    if adapters := [name for name in tensors if is_adapter(name)]:
        raise CheckpointError(
            f"{file} holds an adapter that was not merged into its layers ({len(adapters)} tensors, first "
            f"{adapters[0]!r}); without it the layers are not what was trained. Merge it (merge_and_unload) and save."
        )
    _refuse_unknown(stack, chosen, tensors, anatomy, file)
    names: dict[str, list[str]] = {}
    for place, layer in enumerate(found.values()):
        for name in sorted(layer, key=lambda name: layer[name].packed):  # blocks before scales
            plain = f"layers.{place}.{layer[name].rest}"
            names[plain] = [*names.get(plain, []), name] if layer[name].packed else [name]
    used = {name for layer in found.values() for name in layer}
    return Layout(tuple(found), names, stack.prefix, tuple(name for name in tensors if name not in used))


def choose_layers(
    numbers: Sequence[int], num_layers: int, recorded: Sequence[int] | None, wanted: Sequence[int] | None, file: str
) -> dict[int, int]:
    """Choose layers of a file, and say which layers of the source model they are."""
    if recorded is not None:
        recorded = consecutive_layers(recorded, f"{file}: the metadata's layer_indices", count=num_layers)
    if wanted is not None:
        wanted = consecutive_layers(wanted, f"{file}: layers", count=num_layers)
    sources = _source_numbers(list(numbers), num_layers, recorded, wanted, file)
    asked = wanted if wanted is not None else recorded
    chosen = {number: source for number, source in sources.items() if asked is None or source in asked}
    missing = sorted(set(asked or ()) - set(chosen.values()))
    if missing:
        raise CheckpointError(
            f"{file} holds layers {sorted(sources.values())} of the source model, asked for {list(asked or ())}: "
            f"{missing} are missing."
        )
    consecutive_layers(sorted(chosen.values()), f"{file}: the file's layer numbers", count=num_layers)
    return chosen


def _source_numbers(
    numbers: list[int], num_layers: int, recorded: Sequence[int] | None, wanted: Sequence[int] | None, file: str
) -> dict[int, int]:
    whole_model = numbers == list(range(num_layers))
    from_zero = numbers == list(range(len(numbers)))
    if recorded is not None:
        if numbers == list(recorded) or (whole_model and len(recorded) < num_layers):
            return {number: number for number in numbers}
        if from_zero and len(numbers) == len(recorded):
            return dict(zip(numbers, recorded, strict=True))
        raise CheckpointError(
            f"{file} holds {len(numbers)} layers numbered {numbers}, the metadata records {len(recorded)}: "
            f"{list(recorded)}. Pass the right metadata, or a file with those layers alone."
        )
    if from_zero and not whole_model:
        if wanted is not None and len(wanted) == len(numbers):
            return dict(zip(numbers, wanted, strict=True))
        example = [str(number) for number in range(4, 4 + len(numbers))]
        raise ConfigurationError(
            f"{file} numbers its {len(numbers)} layers from 0 and no metadata says which of the source model's "
            f"{num_layers} they are; pass layers=[{', '.join(example)}] (--layers {' '.join(example)}), or others."
        )
    if whole_model and wanted is None and num_layers > 1:
        raise ConfigurationError(
            f"{file} holds all {num_layers} layers of the model; say which make the donor, such as layers=[4, 5, 6] "
            "(--layers 4 5 6)."
        )
    return {number: number for number in numbers}


def _find_stack(tensors: Mapping[str, PtTensor], reader: NameReader, anatomy: Anatomy, file: str) -> _Stack:
    stacks = _stacks(tensors, reader, anatomy)
    if not stacks:
        seen = [f"{name} {list(tensor.shape)}" for name, tensor in tensors.items()]
        wanted = [f"{name} {list(tensor.shape)}" for name, tensor in anatomy.layers[0].state_dict().items()]
        raise CheckpointError(
            f"{file} holds no layers of a {anatomy.config.model_type} model.\nIn the file ({len(seen)} tensors): "
            f"{_listed(seen)}\nExpected for each layer: {_listed(wanted)}"
        )
    first, *others = stacks
    if any(_content(other, tensors) != _content(first, tensors) for other in others):
        places = ", ".join(
            f"{stack.prefix or 'the top'} (layers {', '.join(map(str, sorted(stack.layers)))})" for stack in stacks
        )
        raise CheckpointError(
            f"{file} holds layers in several places: {places}. Save the donor's layers in a file of their own."
        )
    return first


def _stacks(tensors: Mapping[str, PtTensor], reader: NameReader, anatomy: Anatomy) -> list[_Stack]:
    """Group layers by their prefix, the stack with the most tensors first."""
    for read_name in (reader.read_numbered, reader.read_unnumbered):
        layers: dict[str, dict[int, dict[str, LayerTensor]]] = {}
        for name in tensors:
            found = read_name(name)
            if found is not None:
                layers.setdefault(found.prefix, {}).setdefault(found.number, {})[name] = found
        groups = [_Stack(prefix, numbered) for prefix, numbered in layers.items()]
        stacks = [_Stack(g.prefix, {n: layer for n, layer in g.layers.items() if g.weights(n)}) for g in groups]
        stacks = [stack for stack in stacks if stack.layers]
        # A norm or a bias alone can look like anything; half of a layer's tensors cannot.
        half = min(len(layer.state_dict()) for layer in anatomy.layers) / 2
        stacks = [s for s in stacks if max(len(s.weights(number)) for number in s.layers) >= half] or stacks
        if stacks:
            return sorted(stacks, key=lambda stack: -sum(map(len, stack.layers.values())))
    return []


def _content(stack: _Stack, tensors: Mapping[str, PtTensor]) -> dict[tuple[int, str, str], PtTensor]:
    return {
        (number, found.rest, found.packed): tensors[name]
        for number, layer in stack.layers.items()
        for name, found in layer.items()
    }


def _misfits(
    source: int,
    layer: Mapping[str, LayerTensor],
    tensors: Mapping[str, PtTensor],
    anatomy: Anatomy,
    reader: NameReader,
) -> Iterator[str]:
    wanted = anatomy.layers[source].state_dict()
    seen: dict[str, list[str]] = {}
    for name, found in layer.items():
        assert found.inside is not None
        seen.setdefault(found.inside, []).append(found.packed)
        if found.inside not in wanted:
            yield f"{name}: unexpected; layer {source} of the source model has no {found.inside}"
            continue
        one_to_one = reader.names.is_one_to_one(f"{anatomy.stack_path}.0.{found.rest}")
        yield from _wrong_shape(name, found, tensors[name], wanted[found.inside], one_to_one)
    for inside, tensor in sorted(wanted.items()):
        kinds = sorted(seen.get(inside, []))
        one_to_one = reader.names.is_one_to_one(f"{anatomy.stack_path}.0.{inside}")
        if not kinds and not reader.names.may_be_converted(inside):
            yield f"layer {source}: {inside} {list(tensor.shape)} is missing"
        elif kinds in (["_blocks"], ["_scales"]):
            yield f"layer {source}: {inside} has only its{kinds[0].replace('_', ' ')}"
        elif len(kinds) > 1 and kinds != ["_blocks", "_scales"] and one_to_one:
            yield f"layer {source}: {inside} is there {len(kinds)} times"


def _wrong_shape(
    name: str, found: LayerTensor, tensor: PtTensor, wanted: torch.Tensor, one_to_one: bool
) -> Iterator[str]:
    shape = tuple(wanted.shape)
    dtype = dtype_name(tensor.dtype)
    if found.packed:
        if not one_to_one or len(shape) != 3 or shape[1] % 32:
            yield f"{name}: found a part of a tensor packed as MXFP4, expected all of {list(shape)}"
            return
        if tensor.dtype != torch.uint8:
            yield f"{name}: found {dtype}, expected uint8"
            return
        experts, inputs, outputs = shape  # 32 values share a scale, and two share a byte
        shape = (experts, outputs, inputs // 32, *((16,) if found.packed == "_blocks" else ()))
    elif wanted.is_floating_point() and not tensor.dtype.is_floating_point:
        yield f"{name}: found {dtype}, expected floating-point numbers"
        return
    if one_to_one and tensor.shape != shape:
        yield f"{name}: found {list(tensor.shape)}, expected {list(shape)}"


def _refuse_unknown(
    stack: _Stack, chosen: Mapping[int, int], tensors: Mapping[str, PtTensor], anatomy: Anatomy, file: str
) -> None:
    """Refuse tensors inside a chosen layer that its class does not have: it is then another layer."""
    known = {name for layer in stack.layers.values() for name in layer}
    starts = tuple({found.start for number in chosen for found in stack.weights(number).values()})
    unknown = sorted(name for name in tensors if name not in known and name.startswith(starts))
    if unknown:
        raise CheckpointError(
            f"{file}: layers of a {anatomy.config.model_type} model have no such tensors: {_listed(unknown)}. "
            "Without them the layers are not what was trained; is this the model that they came from?"
        )


def _listed(lines: Sequence[str], between: str = ", ") -> str:
    more = f"{between}... and {len(lines) - _MAX_LISTED} more" if len(lines) > _MAX_LISTED else ""
    return between.join(lines[:_MAX_LISTED]) + more


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
