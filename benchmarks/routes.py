"""The ways to get a model with donor layers, each a function from folders to a model.

Every function returns what loads the model: what it needs is imported before, so that imports are not measured.
"""

from __future__ import annotations

import copy
import importlib
import tempfile
from collections.abc import Callable
from typing import Any

from models import Folders, ModelShape
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

__all__ = ["NEEDS", "REFERENCE", "ROUTES", "cannot_express", "import_model_code"]

Loader = Callable[[], Any]
REFERENCE = "whole"


def whole(shape: ModelShape, folders: Folders) -> Loader:
    """The same model saved whole, loaded by Transformers."""
    return lambda: AutoModelForCausalLM.from_pretrained(folders.whole)


def recipient(shape: ModelShape, folders: Folders) -> Loader:
    """The recipient alone."""
    return lambda: AutoModelForCausalLM.from_pretrained(folders.recipient)


def transplant(shape: ModelShape, folders: Folders) -> Loader:
    """Recipient and donor by name."""
    from transplant_hf import AutoModelWithTransplant

    donors = {str(folders.donor): shape.position}
    return lambda: AutoModelWithTransplant.from_pretrained(str(folders.recipient), donors=donors)


def thin(shape: ModelShape, folders: Folders) -> Loader:
    """A thin repo through the Auto class of Transformers."""
    from transplant_hf import AutoModelWithTransplant

    assert AutoModelWithTransplant  # imported before the clock starts; the package does so when it is first used
    return lambda: AutoModelForCausalLM.from_pretrained(folders.donor)


def naive(shape: ModelShape, folders: Folders) -> Loader:
    """Load the recipient, copy a layer for each of the donor's, load its weights, insert and renumber."""

    def load() -> Any:
        model = AutoModelForCausalLM.from_pretrained(folders.recipient)
        stack = model.get_submodule(f"{model.base_model_prefix}.{shape.stack.rpartition('.')[2]}")
        tensors = load_file(folders.donor / "donor.safetensors")
        for number in range(len(shape.layers)):
            layer = copy.deepcopy(stack[0])
            start = f"layers.{number}."
            layer.load_state_dict({k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)})
            stack.insert(shape.position + number, layer)
        model.config.num_hidden_layers = len(stack)
        _renumber(stack)
        return model

    return load


def _renumber(stack: nn.ModuleList) -> None:
    for number, layer in enumerate(stack):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number


def peft(shape: ModelShape, folders: Folders) -> Loader:
    """PEFT's layer replication: the recipient's own layers once more, sharing their memory, under a LoRA adapter."""
    from peft import LoraConfig, get_peft_model

    first, last = shape.layers[0], shape.layers[-1] + 1
    config = LoraConfig(
        r=1, target_modules=["q_proj"], layer_replication=[(0, last), (first, last), (last, shape.num_layers)]
    )
    return lambda: get_peft_model(AutoModelForCausalLM.from_pretrained(folders.recipient), config)


def mergekit(shape: ModelShape, folders: Folders) -> Loader:
    """A passthrough merge by mergekit to a new folder, loaded by Transformers."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    first, last = shape.layers[0], shape.layers[-1] + 1
    ranges = ([0, last], [first, last], [last, shape.num_layers])
    source = str(folders.recipient)
    slices = [{"sources": [{"model": source, "layer_range": part}]} for part in ranges]
    dtype = str(shape.dtype).removeprefix("torch.")
    config = MergeConfiguration.model_validate({"merge_method": "passthrough", "dtype": dtype, "slices": slices})
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, clone_tensors=True, quiet=True)

    def load() -> Any:
        with tempfile.TemporaryDirectory(dir=folders.root) as out:
            run_merge(config, out, options)
            # Mapped files outlive their names.
            return AutoModelForCausalLM.from_pretrained(out)

    return load


ROUTES: dict[str, Callable[[ModelShape, Folders], Loader]] = {
    "whole": whole,
    "whole-again": whole,  # the control: its ratio to `whole` is the noise of this machine
    "recipient": recipient,
    "transplant": transplant,
    "thin": thin,
    "naive": naive,
    "peft": peft,
    "mergekit": mergekit,
}
# The packages that a way needs, and that may be missing.
NEEDS = {"transplant": "transplant_hf", "thin": "transplant_hf", "peft": "peft", "mergekit": "mergekit"}


def import_model_code(shape: ModelShape) -> None:
    """Import what `from_pretrained` and the first forward would otherwise import while the clock runs."""
    name = shape.config["model_type"]
    importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    importlib.import_module("transformers.generation")


def cannot_express(route: str, shape: ModelShape) -> str | None:
    """Say why a way cannot load a model, if it cannot.

    Args:
        route: Its name.
        shape: The model.
    """
    if route == "peft" and shape.config["model_type"] == "gpt2":
        return "PEFT's layer replication does not know this architecture"
    return None
