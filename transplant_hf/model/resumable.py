"""What `Trainer` reads from a checkpoint in the transplant format: the weights under the names they have while running.

In that format the recipient and the donors lie side by side under their own names. `Trainer` loads what it finds at the
root of its checkpoint into the model at hand, to go on or to take the best model, and finds nothing there.
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

__all__ = ["Resumable"]

_TRAINERS_FOLDER = re.compile(r"checkpoint-\d+")
_WEIGHTS = "model-00001-of-00001.safetensors"
_INDEX = "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class Resumable:
    """The weights that a run changes.

    Args:
        names: The names of all weights.
        tensors: What is trained, and buffers.
    """

    names: tuple[str, ...]
    tensors: Mapping[str, torch.Tensor]

    @classmethod
    def of(
        cls, model: Any, folder: str | os.PathLike[str], state: Mapping[str, torch.Tensor] | None
    ) -> Resumable | None:
        """Collect them for a folder that is named as `Trainer` names its checkpoints; `None` for another.

        Args:
            model: The transplanted model.
            folder: Where it is saved.
            state: Gathered weights, where the model itself holds shards.
        """
        if not _TRAINERS_FOLDER.fullmatch(Path(folder).name):
            return None
        own: Mapping[str, torch.Tensor] = model.state_dict() if state is None else state
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        # Of tied ones the first.
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        wanted = [name for name in own if (name in trained or name not in parameters) and not own[name].is_meta]
        return cls(tuple(own), {name: own[name] for name in wanted})

    def write(self, staging: Path) -> None:
        """Write them where `Trainer` looks.

        Frozen weights are as they were when the run began, and are not written a second time. The index names them
        nevertheless, or `Trainer` would warn that they are missing.
        """
        tensors = {name: tensor.detach().contiguous() for name, tensor in self.tensors.items()}
        save_file(tensors, staging / _WEIGHTS, metadata={"format": "pt"})
        size = sum(tensor.nbytes for tensor in tensors.values())
        write_json(
            staging / _INDEX,
            {"metadata": {"total_size": size}, "weight_map": dict.fromkeys(self.names, _WEIGHTS)},
        )
