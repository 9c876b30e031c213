"""Find a donor's layers among the tensors of a file, or say what was seen and what was wanted."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from ..architecture import Anatomy
from ..archive import TensorRef
from ..errors import CheckpointError
from .names import LayerPart, NameReader, is_adapter
from .numbering import choose_layers

__all__ = ["Layout", "Packed", "match_layers"]

_MOST_LINES = 12


@dataclasses.dataclass(frozen=True)
class Packed:
    """The two tensors of a file that hold one in MXFP4.

    Args:
        blocks: The name of the packed values, two in a byte.
        scales: The name of their exponents.
    """

    blocks: str
    scales: str


@dataclasses.dataclass(frozen=True)
class Layout:
    """A donor found in a file.

    Args:
        layers: The layers' numbers in the source model.
        tensors: The file's names of the donor's tensors, by `layers.{i}.{name inside the layer}`.
        prefix: What stands before the layers' numbers in the file.
        dropped: Names in the file that belong to no layer of the donor.
    """

    layers: tuple[int, ...]
    tensors: Mapping[str, str | Packed]
    prefix: str
    dropped: tuple[str, ...]


@dataclasses.dataclass
class _Group:
    """Layers under one prefix: for each number, the parts of its tensors by the file's names."""

    prefix: str
    layers: dict[int, dict[str, LayerPart]]

    def weights(self, number: int) -> dict[str, LayerPart]:
        return {name: part for name, part in self.layers.get(number, {}).items() if part.inside is not None}


def match_layers(
    tensors: Mapping[str, TensorRef],
    anatomy: Anatomy,
    known: Sequence[int] | None,
    wanted: Sequence[int] | None,
    what: str,
) -> Layout:
    """Recognise a file's layout.

    Args:
        tensors: The file's tensors, by dotted name.
        anatomy: The source model, looked at.
        known: The layer indices that the author recorded, if any.
        wanted: The layer indices that are asked for; by default all that the file is for.
        what: The file, for messages.

    Returns:
        Which tensors make up which layers.

    Raises:
        CheckpointError: No layers of this architecture, other ones than recorded, or shapes that do not fit; the
            message lists what was seen and what was wanted.
    """
    reader = NameReader(anatomy)
    groups = _groups(tensors, reader, anatomy)
    if not groups:
        raise CheckpointError(
            f"{what} holds no layers of a {anatomy.config.model_type} model.\nSeen ({len(tensors)} tensors): "
            f"{_listed(_shown(tensors))}\nWanted, for each layer: {_listed(_wanted_lines(anatomy, 0))}"
        )
    group = _the_one(groups, tensors, what)
    chosen = choose_layers(sorted(group.layers), anatomy.num_layers, known, wanted, what)
    found = {source: group.weights(number) for number, source in chosen.items()}
    _refuse_misfits(found, tensors, anatomy, reader, what)
    _refuse_adapters(tensors, what)
    names: dict[str, str | Packed] = {}
    for place, (_, parts) in enumerate(sorted(found.items())):
        names.update({f"layers.{place}.{rest}": name for rest, name in _by_rest(parts).items()})
    used = {name for parts in found.values() for name in parts}
    _refuse_strangers(group, chosen, tensors, anatomy, what)
    return Layout(tuple(sorted(found)), names, group.prefix, tuple(name for name in tensors if name not in used))


def _groups(tensors: Mapping[str, TensorRef], reader: NameReader, anatomy: Anatomy) -> list[_Group]:
    """Collect layers by what stands before their number, the most complete first."""
    for take_apart in (reader.part, reader.part_of_only_layer):
        groups: dict[str, _Group] = {}
        for name in tensors:
            part = take_apart(name)
            if part is not None:
                group = groups.setdefault(part.prefix, _Group(part.prefix, {}))
                group.layers.setdefault(part.number, {})[name] = part
        for group in groups.values():
            group.layers = {number: parts for number, parts in group.layers.items() if group.weights(number)}
        wanted = min(len(layer.state_dict()) for layer in anatomy.layers)
        found = [group for group in groups.values() if group.layers]
        # A norm or a bias alone can look like anything; half of a layer's tensors cannot.
        found = [g for g in found if 2 * max(len(g.weights(n)) for n in g.layers) >= wanted] or found
        if found:
            return sorted(found, key=lambda g: -sum(len(parts) for parts in g.layers.values()))
    return []


def _the_one(groups: list[_Group], tensors: Mapping[str, TensorRef], what: str) -> _Group:
    first = groups[0]
    for other in groups[1:]:
        if _content(other, tensors) != _content(first, tensors):
            places = ", ".join(
                f"{group.prefix or 'the top'} (layers {', '.join(map(str, sorted(group.layers)))})" for group in groups
            )
            raise CheckpointError(
                f"{what} holds layers in several places: {places}. Save the ones that are meant in a file of their own."
            )
    return first


def _content(group: _Group, tensors: Mapping[str, TensorRef]) -> set[tuple[int, str, str, TensorRef]]:
    return {
        (number, part.rest, part.packed, tensors[name])
        for number, parts in group.layers.items()
        for name, part in parts.items()
    }


def _by_rest(parts: Mapping[str, LayerPart]) -> dict[str, str | Packed]:
    names: dict[str, str | Packed] = {part.rest: name for name, part in parts.items() if not part.packed}
    packed: dict[str, dict[str, str]] = {}
    for name, part in parts.items():
        if part.packed:
            packed.setdefault(part.rest, {})[part.packed] = name
    return names | {rest: Packed(pair["_blocks"], pair["_scales"]) for rest, pair in packed.items()}


def _refuse_misfits(
    found: Mapping[int, Mapping[str, LayerPart]],
    tensors: Mapping[str, TensorRef],
    anatomy: Anatomy,
    reader: NameReader,
    what: str,
) -> None:
    lines: list[str] = []
    for source, parts in found.items():
        wanted = anatomy.layers[source].state_dict()
        seen: dict[str, list[str]] = {}
        for name, part in parts.items():
            assert part.inside is not None
            seen.setdefault(part.inside, []).append(part.packed)
            if part.inside not in wanted:
                lines.append(f"{name}: unexpected; layer {source} of the source model has no {part.inside}")
                continue
            one_to_one = reader.names.is_one_to_one(f"{anatomy.stack_path}.0.{part.rest}")
            lines += _misfits(name, part, tensors[name], wanted[part.inside], one_to_one)
        for inside in sorted(wanted):
            kinds = sorted(seen.get(inside, []))
            one_to_one = reader.names.is_one_to_one(f"{anatomy.stack_path}.0.{inside}")
            if not kinds and not reader.names.may_be_converted(inside):
                lines.append(f"layer {source}: {inside} {list(wanted[inside].shape)} is missing")
            elif kinds in (["_blocks"], ["_scales"]):
                lines.append(f"layer {source}: {inside} has only its{kinds[0].replace('_', ' ')}")
            elif len(kinds) > 1 and kinds != ["_blocks", "_scales"] and one_to_one:
                lines.append(f"layer {source}: {inside} is there {len(kinds)} times")
    if lines:
        raise CheckpointError(
            f"{what} does not hold layers {sorted(found)} of this {anatomy.config.model_type} model:\n  - "
            + _listed(lines, "\n  - ")
            + "\nIs this the model that they came from, and are these the layers?"
        )


def _misfits(name: str, part: LayerPart, tensor: TensorRef, wanted: torch.Tensor, one_to_one: bool) -> list[str]:
    shape = tuple(wanted.shape)
    if part.packed:
        if not one_to_one or len(shape) != 3 or shape[1] % 32:
            return [f"{name}: seen a part of a tensor packed as MXFP4, wanted all of {list(shape)}"]
        if tensor.dtype != torch.uint8:
            return [f"{name}: seen {_plain(tensor.dtype)}, wanted uint8"]
        shape = _packed_shape(shape, part.packed)
    elif wanted.is_floating_point() and not tensor.dtype.is_floating_point:
        return [f"{name}: seen {_plain(tensor.dtype)}, wanted floating point numbers"]
    if one_to_one and tensor.shape != shape:
        return [f"{name}: seen {list(tensor.shape)}, wanted {list(shape)}"]
    return []


def _packed_shape(shape: tuple[int, ...], packed: str) -> tuple[int, ...]:
    """The shape of MXFP4 parts of `[experts, in, out]`: 32 values share a scale, and two share a byte."""
    experts, inner, out = shape
    scales = (experts, out, inner // 32)
    return (*scales, 16) if packed == "_blocks" else scales


def _refuse_adapters(tensors: Mapping[str, TensorRef], what: str) -> None:
    adapters = [name for name in tensors if is_adapter(name)]
    if adapters:
        raise CheckpointError(
            f"{what} holds an adapter that was not merged into its layers ({len(adapters)} tensors, first "
            f"{adapters[0]!r}); without it the layers are not what was trained. Merge it (merge_and_unload) and save."
        )


def _refuse_strangers(
    group: _Group, chosen: Mapping[int, int], tensors: Mapping[str, TensorRef], anatomy: Anatomy, what: str
) -> None:
    """Refuse tensors inside a chosen layer that its class knows nothing of: the layer is then another one."""
    placed = {name for parts in group.layers.values() for name in parts}
    starts = tuple({part.start for number in chosen for part in group.weights(number).values()})
    strangers = sorted(
        name for name in tensors if name not in placed and name.startswith(starts) and not is_adapter(name)
    )
    if strangers:
        raise CheckpointError(
            f"{what}: layers of a {anatomy.config.model_type} model have no such tensors: {_listed(strangers)}. "
            "Without them the layers are not what was trained; is this the model that they came from?"
        )


def _shown(tensors: Mapping[str, TensorRef]) -> list[str]:
    return [f"{name} {list(ref.shape)}" for name, ref in tensors.items()]


def _wanted_lines(anatomy: Anatomy, layer: int) -> list[str]:
    return [f"{name} {list(tensor.shape)}" for name, tensor in anatomy.layers[layer].state_dict().items()]


def _plain(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _listed(lines: Sequence[str], between: str = ", ") -> str:
    more = f"{between}... and {len(lines) - _MOST_LINES} more" if len(lines) > _MOST_LINES else ""
    return between.join(lines[:_MOST_LINES]) + more
