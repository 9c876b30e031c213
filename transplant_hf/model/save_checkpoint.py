"""The files that `Trainer` reads from a checkpoint in the transplant format.

That format stores recipient and donors under their own names. `Trainer` loads the weights at the root of its checkpoint
into the running model, to resume or to load the best model, and needs them under the names of that model.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..storage import write_json

_TRAINERS_FOLDER = re.compile(r"checkpoint-\d+")
_WEIGHTS = "model-00001-of-00001.safetensors"
_INDEX = "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class TrainerCheckpoint:
    """The weights that training changes.

    Args:
        names: The names of all weights.
        tensors: The trained weights, and buffers.
    """

    names: tuple[str, ...]
    tensors: Mapping[str, torch.Tensor]

    @classmethod
    def of(
        cls, model: Any, folder: str | os.PathLike[str], state: Mapping[str, torch.Tensor] | None
    ) -> TrainerCheckpoint | None:
        """Collect the weights, if `Trainer` names its checkpoints like the folder; else return `None`."""
        if not _TRAINERS_FOLDER.fullmatch(Path(folder).name):
            return None
        own: Mapping[str, torch.Tensor] = model.state_dict() if state is None else state
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        # Of tied weights, the first.
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        wanted = [name for name in own if (name in trained or name not in parameters) and not own[name].is_meta]
        return cls(tuple(own), {name: own[name] for name in wanted})

    def write(self, staging: Path) -> None:
        """Write the weights where `Trainer` looks.

        Frozen weights do not change in training and are not written again. The index lists them, or `Trainer` would
        warn that they are missing.
        """
        tensors = {name: tensor.detach().contiguous() for name, tensor in self.tensors.items()}
        save_file(tensors, staging / _WEIGHTS, metadata={"format": "pt"})
        size = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": dict.fromkeys(self.names, _WEIGHTS)}
        write_json(staging / _INDEX, index)
