"""The models that `gpu.py` measures: random bf16 weights in real shapes, written shard by shard.

No model is built with memory of its own, so a checkpoint of 42 GB needs the memory of one layer. The donor is a copy of
three of the recipient's layers, inserted at L-1. The model saved whole is put together here by renaming tensors, not by
the package that is measured; shards that it shares with the recipient are hard links.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from models import Folders
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GptOssConfig, LlamaConfig, PreTrainedConfig

__all__ = ["SHAPES", "GpuShape", "prepare"]

DTYPE = torch.bfloat16
_READY = "ready.json"
_INDEX = "model.safetensors.index.json"
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


@dataclasses.dataclass(frozen=True)
class GpuShape:
    """A model to measure.

    Args:
        name: What it is called on the command line.
        title: What it is called in the report.
        kind: The class of its configuration.
        fields: Fields of the configuration.
        attentions: The attention implementations that it can run with, the usual one first.
        layers: The layers that the donor is a copy of.
    """

    name: str
    title: str
    kind: type[PreTrainedConfig]
    fields: dict[str, Any]
    attentions: tuple[str, ...]
    layers: tuple[int, ...] = (4, 5, 6)

    @property
    def num_layers(self) -> int:
        """L, the recipient's layers."""
        return int(self.fields["num_hidden_layers"])

    @property
    def position(self) -> int:
        """Where the donor goes, and is trained."""
        return self.num_layers - 1

    def whole_order(self) -> list[int]:
        """The recipient's layers in the order in which they run, the copies included."""
        return [*range(self.position), *self.layers, *range(self.position, self.num_layers)]

    def build_config(self) -> PreTrainedConfig:
        """The recipient's configuration."""
        return self._config(**self.fields)

    def whole_config(self) -> PreTrainedConfig:
        """The configuration of the model saved whole: kinds of layers go along with the layers."""
        order, own = self.whole_order(), getattr(self.build_config(), "layer_types", None)
        kinds = {} if own is None else {"layer_types": [own[layer] for layer in order]}
        return self._config(**{**self.fields, "num_hidden_layers": len(order), **kinds})

    def _config(self, **fields: Any) -> PreTrainedConfig:
        config = self.kind(**fields)
        with torch.device("meta"):
            config.architectures = [type(AutoModelForCausalLM.from_config(config)).__name__]
        config.dtype = DTYPE
        return config


_LLAMA = {
    "hidden_size": 2048,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "intermediate_size": 5632,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
}
_TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 260,
}
_GPT_OSS = {"num_hidden_layers": 24, "num_local_experts": 32}  # all else is the class's default, 120B's and 20B's alike
_TINY_GPT_OSS = {**_TINY, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}
_ATTENTION = ("sdpa", "flash_attention_2", "eager")
# GPT-OSS adds a learned term to the softmax, which of the FlashAttention packages only the fourth takes.
_WITH_SINKS = ("eager", "flash_attention_4")

SHAPES = {
    shape.name: shape
    for shape in (
        GpuShape("llama", "TinyLlama shape, 1.1B, bf16, 22 + 3 layers", LlamaConfig, _LLAMA, _ATTENTION),
        GpuShape("gpt-oss", "GPT-OSS-20B shape, bf16, 24 + 3 layers", GptOssConfig, _GPT_OSS, _WITH_SINKS),
        GpuShape("tiny", "a toy Llama, to try the benchmark", LlamaConfig, _TINY, _ATTENTION),
        GpuShape("tiny-gpt-oss", "a toy GPT-OSS, to try the benchmark", GptOssConfig, _TINY_GPT_OSS, _WITH_SINKS),
    )
}


def prepare(shape: GpuShape, folder: Path, device: str) -> Folders:
    """Write a model's recipient, donor and whole checkpoint, unless they are there.

    Args:
        shape: The model.
        folder: The work folder.
        device: Where random numbers are drawn.
    """
    folders = Folders(folder / shape.name)
    wanted = {"config": json.loads(shape.build_config().to_json_string()), "layers": list(shape.layers)}
    ready = folders.root / _READY
    if ready.exists() and json.loads(ready.read_text()) == wanted:
        return folders
    if folders.root.exists():
        shutil.rmtree(folders.root)
    folders.root.mkdir(parents=True)
    _check_space(shape, folders.root)
    _write_recipient(shape, folders.recipient, device)
    _write_donor(shape, folders)
    _write_whole(shape, folders)
    ready.write_text(json.dumps(wanted))
    return folders


def _shapes_of_tensors(config: PreTrainedConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPE)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _check_space(shape: GpuShape, folder: Path) -> None:
    """Refuse to begin what the disk cannot hold: the recipient, the donor, and the copies of the whole model."""
    needed = 0
    order = shape.whole_order()
    for name, size in _shapes_of_tensors(shape.build_config()).items():
        layer = _layer_of(name)
        written = 1 if layer is None else 1 + (layer in shape.layers)
        if layer is not None:
            written += sum(origin == layer and number != layer for number, origin in enumerate(order))
        needed += written * size.numel() * DTYPE.itemsize
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise SystemExit(
            f"{shape.title}: its files take {needed / 2**30:.1f} GiB and {folder} has {free / 2**30:.1f} GiB left; "
            "name another work folder with --folder."
        )


def _layer_of(name: str) -> int | None:
    match = _LAYER.fullmatch(name)
    return int(match[1]) if match else None


def _write_recipient(shape: GpuShape, folder: Path, device: str) -> None:
    folder.mkdir()
    config = shape.build_config()
    config.save_pretrained(folder)
    sizes = _shapes_of_tensors(config)
    shards: list[tuple[str, list[str]]] = []
    names_of = [[name for name in sizes if _layer_of(name) == layer] for layer in range(shape.num_layers)]
    names_of.append([name for name in sizes if _layer_of(name) is None])
    bar = tqdm(names_of, desc=f"{shape.name}: random weights", unit="shard", file=sys.stderr)
    for number, names in enumerate(bar):
        file = _shard(number, len(names_of))
        save_file({name: _drawn(name, sizes[name], device) for name in names}, folder / file, {"format": "pt"})
        shards.append((file, names))
    _write_index(folder, shards)


def _drawn(name: str, size: torch.Size, device: str) -> torch.Tensor:
    """Values of the scale that training gives: what a layer adds is neither lost nor all there is."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    values = torch.empty(size, dtype=DTYPE, device=device).normal_(generator=generator)
    if len(size) > 1:
        values.mul_(size[-1] ** -0.5)
    else:
        values.mul_(0.1).add_(1.0 if "norm" in name else 0.0)
    return values.cpu()


def _shard(number: int, count: int) -> str:
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _write_index(folder: Path, shards: Iterable[tuple[str, list[str]]]) -> None:
    placed = {name: file for file, names in shards for name in names}
    (folder / _INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}, indent=2) + "\n")


def _write_donor(shape: GpuShape, folders: Folders) -> None:
    from transplant_hf.model.extracting import extract

    layers = list(shape.layers)
    extract(folders.recipient, folders.donor, layers=layers, position=shape.position, name="copy")


def _write_whole(shape: GpuShape, folders: Folders) -> None:
    folders.whole.mkdir()
    shape.whole_config().save_pretrained(folders.whole)
    for path in folders.recipient.glob("generation_config.json"):
        shutil.copy(path, folders.whole)
    order = shape.whole_order()
    shards = []
    for number, origin in enumerate([*order, shape.num_layers]):
        source = folders.recipient / _shard(origin, shape.num_layers + 1)
        target = folders.whole / _shard(number, len(order) + 1)
        if origin in (number, shape.num_layers):
            os.link(source, target)
            names = list(_names_in(source))
        else:
            names = _write_renumbered(source, target, number)
        shards.append((target.name, names))
    _write_index(folders.whole, shards)


def _names_in(path: Path) -> Iterator[str]:
    with safe_open(path, framework="pt") as file:
        yield from file.keys()


def _write_renumbered(source: Path, target: Path, number: int) -> list[str]:
    tensors = {}
    with safe_open(source, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - no mapping
            match = _LAYER.fullmatch(name)
            assert match is not None, f"{name} in {source} is of no layer"
            tensors[f"model.layers.{number}.{match[2]}"] = file.get_tensor(name)
    save_file(tensors, target, {"format": "pt"})
    return list(tensors)
