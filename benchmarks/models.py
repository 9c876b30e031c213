"""The models that are measured: random weights in real shapes, written once into a work folder.

The donor is a copy of three of the recipient's own layers. Layer replication (PEFT, mergekit) can express that too,
so every way of loading must give the same logits. The model saved whole is put together here by renaming tensors, not
by the package that is measured.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig

__all__ = ["MODELS", "Folders", "ModelShape", "prepare"]

_READY = "ready.json"


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """A model to measure.

    Args:
        name: What it is called on the command line.
        title: What it is called in the report.
        config: Fields of its configuration, `model_type` included.
        dtype: The type of its weights.
        stack: What stands before a layer's number in its checkpoint.
        base_model: Whether its checkpoint is written by the model without head: GPT-2's has no `transformer.`.
        layers: The layers that the donor is a copy of; it is inserted after the last of them.
    """

    name: str
    title: str
    config: dict[str, Any]
    dtype: torch.dtype
    stack: str
    base_model: bool = False
    layers: tuple[int, ...] = (4, 5, 6)

    @property
    def position(self) -> int:
        """Where the donor goes."""
        return self.layers[-1] + 1

    @property
    def num_layers(self) -> int:
        """L, the recipient's layers."""
        return int(self.config["num_hidden_layers"])

    def build_config(self) -> PreTrainedConfig:
        """The recipient's configuration."""
        kind = {"gpt2": GPT2Config, "llama": LlamaConfig}[self.config["model_type"]]
        return kind(**{name: value for name, value in self.config.items() if name != "model_type"})

    def whole_order(self) -> list[int]:
        """The recipient's layers in the order in which they run, the copies included."""
        return [*range(self.position), *self.layers, *range(self.position, self.num_layers)]


_LLAMA = {
    "model_type": "llama",
    "hidden_size": 2048,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "intermediate_size": 5632,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
}
_SMALL_LLAMA = {"hidden_size": 64, "num_hidden_layers": 8, "num_attention_heads": 4, "intermediate_size": 128}

MODELS = {
    shape.name: shape
    for shape in (
        ModelShape(
            "gpt2",
            "GPT-2, 124M, fp32, 12 + 3 layers",
            {"model_type": "gpt2", "num_hidden_layers": 12},
            torch.float32,
            "h",
            base_model=True,
        ),
        ModelShape("llama", "TinyLlama shape, 1.1B, bf16, 22 + 3 layers", _LLAMA, torch.bfloat16, "model.layers"),
        ModelShape(
            "tiny",
            "a toy Llama, to try the benchmark",
            {**_LLAMA, **_SMALL_LLAMA},
            torch.bfloat16,
            "model.layers",
        ),
    )
}


@dataclasses.dataclass(frozen=True)
class Folders:
    """Where one model's files are."""

    root: Path

    @property
    def recipient(self) -> Path:
        """The untouched recipient."""
        return self.root / "recipient"

    @property
    def donor(self) -> Path:
        """The donor, which is a thin transplant as it stands."""
        return self.root / "donor"

    @property
    def whole(self) -> Path:
        """The same transplant as one native checkpoint."""
        return self.root / "whole"


def prepare(shape: ModelShape, folder: Path) -> Folders:
    """Write a model's recipient, donor and whole checkpoint, unless they are there.

    Args:
        shape: The model.
        folder: The work folder.
    """
    folders = Folders(folder / shape.name)
    wanted = {"config": shape.config, "dtype": str(shape.dtype), "layers": list(shape.layers)}
    ready = folders.root / _READY
    if ready.exists() and json.loads(ready.read_text()) == wanted:
        return folders
    print(f"Writing random weights: {shape.title}", file=sys.stderr)
    if folders.root.exists():
        shutil.rmtree(folders.root)
    _write_recipient(shape, folders.recipient)
    _write_donor(shape, folders)
    _write_whole(shape, folders)
    ready.write_text(json.dumps(wanted))
    return folders


def _write_recipient(shape: ModelShape, folder: Path) -> None:
    torch.manual_seed(0)
    config = shape.build_config()
    model = AutoModelForCausalLM.from_config(config, dtype=shape.dtype)
    (model.base_model if shape.base_model else model).save_pretrained(folder)
    _edit_config(folder, architectures=[type(model).__name__])


def _write_donor(shape: ModelShape, folders: Folders) -> None:
    from transplant_hf import Donor

    model = AutoModelForCausalLM.from_pretrained(folders.recipient)
    donor = Donor.from_model(model, layers=shape.layers, name="copy")
    donor.save_pretrained(folders.donor, position=shape.position, recipient=str(folders.recipient))


def _write_whole(shape: ModelShape, folders: Folders) -> None:
    tensors = load_file(folders.recipient / "model.safetensors")
    layer = re.compile(rf"{re.escape(shape.stack)}\.(\d+)\.(.+)")
    whole = {name: tensor for name, tensor in tensors.items() if not layer.fullmatch(name)}
    for number, origin in enumerate(shape.whole_order()):
        for name, tensor in tensors.items():
            match = layer.fullmatch(name)
            if match and int(match[1]) == origin:
                whole[f"{shape.stack}.{number}.{match[2]}"] = tensor.clone()
    shutil.copytree(folders.recipient, folders.whole, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(whole, folders.whole / "model.safetensors", metadata={"format": "pt"})
    name = "n_layer" if shape.config["model_type"] == "gpt2" else "num_hidden_layers"
    _edit_config(folders.whole, **{name: len(shape.whole_order())})


def _edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}, indent=2, sort_keys=True) + "\n")
