"""A transplant as a GGUF file: the recipient's tensors as they are in its file, and the donors' beside them."""

from __future__ import annotations

import copy
import dataclasses
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import ROPE_INIT_FUNCTIONS, AutoModelForCausalLM, PreTrainedConfig

from ..architecture import LayerNames, Recipient, check_gguf_reader, open_recipient, text_config
from ..compatibility import donor_anatomy
from ..display import some_of
from ..donor.record import FileStamp
from ..donor.tensors import layer_of
from ..errors import CheckpointError, CompatibilityError, ConfigurationError
from ..layer_map import RECIPIENT
from ..model.load_request import TransplantParts, find_parts, read_request
from ..numeric import is_finite
from ..sources import HubOptions
from ..splice import Blueprint, DonorPart
from ..storage import check_output_file, publish_file, sha256_of
from .gguf_file import GgufFile, GgufTensor, check_written, in_block, write_gguf
from .gguf_layers import ARCHITECTURES, READS_KINDS, RECOGNIZED_COUNTS, UNDERSTOOD
from .result import Export, breaks_pattern, layer_types, refuse_beyond_layers

_TYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "q8_0": "Q8_0"}
_SHORT = {"f16": "float16", "bf16": "bfloat16", "f32": "float32", "auto": "float16"}
_KINDS = "attention.sliding_window_pattern"
_RECORD = "transplant_hf.layer_map"  # in the metadata of every file written here
_SLIDING, _FULL = "sliding_attention", "full_attention"


def export_gguf(
    recipient_file: str | os.PathLike[str],
    output: str | os.PathLike[str],
    source: str | os.PathLike[str] | None,
    donors: Any,
    *,
    overwrite: bool,
    dtype: str | torch.dtype | None,
    verify: bool,
    composition: str | None,
    revision: str | None,
    hub: HubOptions,
) -> Export:
    """Write a GGUF file; see `export`. The donors are `donors`, or those of the transplant or donor `source`."""
    path, target = Path(recipient_file).expanduser().absolute(), Path(output).expanduser()
    check_gguf_reader(str(recipient_file))
    dtype_name = _checked_type(dtype)
    if not path.is_file():
        raise ConfigurationError(f"there is no GGUF file {recipient_file}; name a file on this machine.")
    check_output_file(target, overwrite)
    _refuse_foreign(target, path)
    file = GgufFile(path)
    _refuse_recipient(file)
    blueprint = _plan(file, source, donors, composition, revision, hub)
    _refuse_transplant(file, blueprint)
    for part in blueprint.parts:
        part.donor.verify()
    metadata, tensors = _metadata(file, blueprint), _tensors(file, blueprint, _TYPES[dtype_name])
    with publish_file(target) as staged:
        write_gguf(staged, file, metadata, tensors)
        if verify:
            check_written(staged, tensors)
        stamp = FileStamp(sha256_of(staged), staged.stat().st_size)
    before, after = blueprint.recipient.config, blueprint.state(()).config
    return Export(
        folder=str(output),
        recipient=str(recipient_file),
        model_class=blueprint.recipient.model_class.__name__,
        layer_map=blueprint.layer_map(),
        dtype=dtype_name,
        files={target.name: stamp},
        verified=verify,
        irregular=breaks_pattern(layer_types(before), layer_types(after)),
        gguf=True,
    )


def _checked_type(dtype: str | torch.dtype | None) -> str:
    name = str(dtype or "auto").removeprefix("torch.")
    name = _SHORT.get(name, name)
    if name not in _TYPES:
        raise ConfigurationError(f"dtype of donors in a GGUF file must be one of {', '.join(_TYPES)}, got {name!r}.")
    return name


# -- The plan -------------------------------------------------------------------------------------------------------


def _plan(
    file: GgufFile,
    source: str | os.PathLike[str] | None,
    donors: Any,
    composition: str | None,
    revision: str | None,
    hub: HubOptions,
) -> Blueprint:
    """Find the donors, and check that they fit the layers that the file declares."""
    with tempfile.TemporaryDirectory() as folder:
        recipient = _open_recipient(file, Path(folder), hub)
        if source is None:
            if revision is not None:
                raise ConfigurationError(
                    "a GGUF file has no revision: leave out revision= (--revision). In Python, those of donors go into "
                    "DonorSpec(revision=...)."
                )
            request = read_request(folder, donors=donors, gguf_file=file.path.name, composition=composition, hub=hub)
        else:
            request = read_request(source, composition=composition, revision=revision, hub=hub)
    if request.config.recipient_overrides:
        raise ConfigurationError(
            f"{request.source} changes fields of its recipient's configuration "
            f"({some_of(request.config.recipient_overrides)}), and {file.path} has its own. Name the donors instead."
        )
    if request.adapter is not None:
        raise ConfigurationError(f"{request.adapter} holds an adapter, which a GGUF file would leave out.")
    parts = find_parts(request, hub, recipient=recipient)
    _set_declared(file, recipient.config)
    _set_rope(file, parts)
    return parts.blueprint(AutoModelForCausalLM)


def _open_recipient(file: GgufFile, folder: Path, hub: HubOptions) -> Recipient:
    """Let Transformers read the configuration from a copy without tensors and vocabulary, which it reads slowly."""
    kept = ("tokenizer.ggml.tokens",) if file.architecture == "gpt2" else ()  # the size of its vocabulary is read there
    vocabulary = {f"{file.architecture}.vocab_size": file.count("tokenizer.ggml.tokens") or file.own("vocab_size") or 1}
    path = folder / file.path.name
    write_gguf(path, file, vocabulary, (), lambda key: key.startswith("tokenizer.") and key not in kept)
    recipient = open_recipient(folder, hub=hub, gguf_file=path.name)
    return dataclasses.replace(recipient, reference=str(file.path))


def _set_declared(file: GgufFile, config: PreTrainedConfig) -> None:
    """Set what a file declares of its layers and Transformers does not read."""
    for name, field in (("attention.key_length", "head_dim"), ("attn_logit_softcapping", "attn_logit_softcapping")):
        if file.own(name) is not None and hasattr(config, field):
            setattr(config, field, file.own(name))
    if file.architecture in READS_KINDS:
        count, kinds = config.num_hidden_layers, file.own(_KINDS)
        if not file.own("attention.sliding_window"):
            config.layer_types = [_FULL] * count
        elif isinstance(kinds, list):
            config.layer_types = [_SLIDING if kind else _FULL for kind in kinds]
        elif kinds is not None:
            config.layer_types = [_FULL if number % kinds == kinds - 1 else _SLIDING for number in range(count)]
        recognized = count == RECOGNIZED_COUNTS[file.architecture]
        config.query_pre_attn_scalar = (
            config.hidden_size // config.num_attention_heads if recognized else config.head_dim
        )


def _set_rope(file: GgufFile, parts: TransplantParts) -> None:
    """Set the scaling of RoPE, which a file stores as factors, where a donor's configuration gives these factors."""
    factors = next((tensor for tensor in file.outer if tensor.name == "rope_freqs.weight"), None)
    if factors is None:
        return
    stored, config = torch.frombuffer(bytearray(factors.read()), dtype=torch.float32), parts.recipient.config
    for _, donor in parts.donors:
        rope = text_config(donor_anatomy(donor, parts.recipient.anatomy()).config).rope_parameters
        candidate = copy.deepcopy(config)
        candidate.rope_parameters = {**rope, "rope_theta": config.rope_parameters["rope_theta"]}
        if rope["rope_type"] == "llama3":
            scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](candidate, torch.device("cpu"))
            exponents = torch.arange(len(scaled)) / len(scaled)
            if torch.allclose(candidate.rope_parameters["rope_theta"] ** -exponents / scaled, stored, rtol=1e-3):
                config.rope_parameters = candidate.rope_parameters
                return
    raise ConfigurationError(
        f"{file.path} scales RoPE (rope_freqs.weight), and no donor's configuration has a scaling with these factors: "
        "the donors are from another model."
    )


# -- What is refused ------------------------------------------------------------------------------------------------


def _refuse_foreign(target: Path, recipient_file: Path) -> None:
    """Refuse to replace the recipient, or a file that this package did not write."""
    if not target.exists():
        return
    if target.samefile(recipient_file):
        raise ConfigurationError(f"{target} is the recipient, which would be lost. Choose another name.")
    with target.open("rb") as file:
        is_gguf = file.read(4) == b"GGUF"
    if not is_gguf or not GgufFile(target).count(_RECORD):
        raise ConfigurationError(
            f"{target} is a file that transplant_hf has no record of writing and that would be lost. Choose another "
            "name, or move it away."
        )


def _refuse_recipient(file: GgufFile) -> None:
    """Refuse a file whose layers donors cannot be added to."""
    architecture, path = file.architecture, file.path
    if file.count(_RECORD):
        raise ConfigurationError(
            f"{path} is itself a transplant that transplant_hf wrote. Use its recipient's file and name all donors "
            "together: positions are in the untouched recipient's numbering."
        )
    advice = "Export a plain checkpoint and convert that with llama.cpp's convert_hf_to_gguf.py."
    if architecture not in ARCHITECTURES:
        raise ConfigurationError(
            f"{path} has the architecture {architecture!r}. Donors can be added to files of "
            f"{', '.join(ARCHITECTURES)}. {advice}"
        )
    if file.own("expert_count"):
        raise ConfigurationError(
            f"{path} has {file.own('expert_count')} experts in a layer, whose weights llama.cpp packs in ways that "
            f"are not known here. {advice}"
        )
    if unknown := set(file.own_names()) - UNDERSTOOD:
        raise ConfigurationError(
            f"{path} declares {some_of(unknown)} of {architecture}, which Transformers does not read, so donors cannot "
            f"be compared with its layers. {advice}"
        )
    for name in UNDERSTOOD - {_KINDS}:
        if isinstance(file.own(name), list):
            raise ConfigurationError(
                f"{path} declares {architecture}.{name} for each layer, {file.own(name)[:3]} and so on. Transformers "
                f"has one value for all layers of {architecture}, so donors cannot be compared with them. {advice}"
            )
    if file.own("block_count") != len(file.blocks):
        raise CheckpointError(f"{path} has {len(file.blocks)} blocks, and declares {file.own('block_count')}.")


def _refuse_transplant(file: GgufFile, blueprint: Blueprint) -> None:
    """Refuse what no GGUF file of the architecture can say."""
    refuse_beyond_layers(blueprint, "a GGUF file")
    state, architecture = blueprint.state(()), file.architecture
    if not state.native:
        raise ConfigurationError(f"no GGUF file of {architecture} describes these layers ({state.reasons[0]}).")
    kinds = set(layer_types(state.config)) - {_FULL}
    reads_kinds = architecture in READS_KINDS and file.own("attention.sliding_window")
    if kinds - {_SLIDING} or (kinds and not reads_kinds):
        raise ConfigurationError(
            f"the layers are of the kinds {', '.join(sorted({_FULL, *kinds}))}, and {file.path} "
            "cannot say which layer has which kind: llama.cpp uses one kind, or derives it from the layer's number."
        )
    recognized, counts = RECOGNIZED_COUNTS.get(architecture), (len(file.blocks), len(blueprint.built))
    if recognized in counts and counts[0] != counts[1]:
        raise ConfigurationError(
            f"llama.cpp recognizes a model of {architecture} by its {recognized} layers, and scales its attention "
            f"differently. The recipient has {counts[0]} layers and the transplant {counts[1]}. Use mode='replace' "
            "(--mode replace), or another number of layers."
        )


# -- What is written ------------------------------------------------------------------------------------------------


def _metadata(file: GgufFile, blueprint: Blueprint) -> dict[str, int | Sequence[Any]]:
    """Return the metadata that differs from the recipient's."""
    count, architecture = len(blueprint.built), file.architecture
    changed: dict[str, int | Sequence[Any]] = {f"{architecture}.block_count": count}
    kinds = layer_types(blueprint.state(()).config)
    if architecture in READS_KINDS and _SLIDING in kinds:
        changed[f"{architecture}.{_KINDS}"] = [kind == _SLIDING for kind in kinds]
    changed[_RECORD] = [f"{source} {index}" for source, index in blueprint.layer_map()]
    return changed


def _tensors(file: GgufFile, blueprint: Blueprint, type_name: str) -> list[GgufTensor]:
    """Return what is written: tensors outside the layers, then the layers in the order in which they run."""
    layers: dict[int, list[GgufTensor]] = {}
    for number, stage in enumerate(blueprint.built):
        if stage.slot.source == RECIPIENT:
            layers[number] = file.blocks[stage.slot.index]
    for part in blueprint.parts:
        places = [number for number, stage in enumerate(blueprint.built) if stage.slot.source == part.name]
        layers.update(zip(places, _donor_blocks(file, part, type_name), strict=True))
    return file.outer + [in_block(number, tensor) for number in sorted(layers) for tensor in layers[number]]


def _donor_blocks(file: GgufFile, part: DonorPart, type_name: str) -> list[list[GgufTensor]]:
    """Return the tensors of each of a donor's layers, under their names inside a block."""
    from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, get_tensor_name_map

    architecture = next(key for key, name in MODEL_ARCH_NAMES.items() if name == file.architecture)
    known = get_tensor_name_map(architecture, 1)
    path = part.anatomy.stack_path
    names = LayerNames(part.anatomy.model, path)
    blocks: list[list[GgufTensor]] = [[] for _ in range(part.donor.num_layers)]
    for name, lazy in part.donor.store.slices().items():
        number, rest = layer_of(name)
        inside = names.inside_layer(f"{path}.{number}.{rest}") or rest
        found = known.get_name(f"{path}.0.{inside}", try_suffixes=(".weight", ".bias"))
        if found is None:
            if names.is_ignored(f"{path}.{number}.{rest}"):
                continue
            raise ConfigurationError(
                f"{name} of donor {part.name!r} has no name in GGUF files of {file.architecture}: its layers hold "
                "weights that llama.cpp does not have."
            )
        local = found.removeprefix("blk.0.")
        shape = tuple(_convert(file, part, local, torch.empty(part.donor.infos()[name].shape, device="meta")).shape)
        stored = GGMLQuantizationType[type_name if len(shape) > 1 else "F32"]  # llama.cpp computes with these
        read = _reader(file, part, f"{name} of donor {part.name!r}", local, lazy, stored)
        blocks[number].append(GgufTensor(local, stored, shape, read))
    for number, block in enumerate(blocks):
        _compare_shapes(file, part, number, block)
    return blocks


def _convert(file: GgufFile, part: DonorPart, local: str, tensor: torch.Tensor) -> torch.Tensor:
    return ARCHITECTURES[file.architecture](local, tensor.float(), text_config(part.anatomy.config))


def _reader(file: GgufFile, part: DonorPart, what: str, local: str, lazy: Any, stored: Any) -> Callable[[], memoryview]:
    """Return a function that reads a donor's tensor and lays it out as the file has it."""
    from gguf import quants

    def read() -> memoryview:
        tensor = lazy[...]
        if not is_finite(tensor):
            raise CheckpointError(f"{what} holds NaN or infinity; nothing was exported.")
        values = _convert(file, part, local, tensor).contiguous()
        if stored.name == "F16" and not is_finite(values.half()):
            raise CheckpointError(
                f"{what} holds numbers that are too large for float16; nothing was exported. Use bfloat16 or float32."
            )
        packed: memoryview = quants.quantize(values.numpy(), stored).reshape(-1).view("uint8").data
        return packed

    return read


def _compare_shapes(file: GgufFile, part: DonorPart, number: int, block: Sequence[GgufTensor]) -> None:
    """Compare the tensors of a donor's layer with those of a recipient's, and check that they can be quantized."""
    from gguf import GGML_QUANT_SIZES

    ours = {tensor.name: tensor.shape for tensor in file.blocks[0]}
    theirs = {tensor.name: tensor.shape for tensor in block}
    lines = [
        f"{name}: donor {list(theirs[name]) if name in theirs else 'has none'}, recipient "
        f"{list(ours[name]) if name in ours else 'has none'}"
        for name in sorted({*ours, *theirs})
        if ours.get(name) != theirs.get(name)
    ]
    if lines:
        text = "\n  - ".join(lines)
        raise CompatibilityError(
            f"layer {number} of donor {part.name!r} does not have the tensors of a block of {file.path}:\n  - {text}",
            lines,
        )
    for tensor in block:
        length = GGML_QUANT_SIZES[tensor.type][0]
        if tensor.shape[-1] % length:
            raise ConfigurationError(
                f"{tensor.name} of donor {part.name!r} has rows of {tensor.shape[-1]} numbers, and {tensor.type.name} "
                f"stores them in groups of {length}. Use another dtype, such as float16."
            )
