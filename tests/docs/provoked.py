"""What users do that is refused: each entry of the FAQ, done on tiny models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Gemma3nTextConfig

from tests.helpers import edit_json, edit_weights, make_family, tiny_llama_model
from transplant_hf import (
    AutoModelWithTransplant,
    DonorSpec,
    DonorTrainer,
    DonorTrainingArguments,
)

__all__ = ["PROVOKED", "Desk", "make_desk"]

load = AutoModelWithTransplant.from_pretrained


@dataclasses.dataclass(frozen=True)
class Desk:
    """The current folder: `recipient/`, `law/` (a donor of it) and `llama/` (another model).

    Args:
        folder: Where they lie.
        hub: The stand-in Hub.
    """

    folder: Path
    hub: Any

    def model(self, mode: str = "insert", **kwargs: Any) -> Any:
        """Load the recipient with the donor at position 2."""
        return load("recipient", donors=[DonorSpec("law", position=2, mode=mode)], **kwargs)

    def config(self, **fields: Any) -> None:
        """Change fields of the donor repo's configuration."""
        edit_json(self.folder / "law" / "config.json", **fields)


def make_desk(folder: Path) -> Path:
    """Make the models; returns the folder."""
    make_family(folder, tiny_llama_model)
    (folder / "donor").rename(folder / "law")
    edit_json(folder / "law" / "donor_config.json", name="law")
    edit_json(folder / "law" / "config.json", recipient="../recipient")
    tiny_llama_model(seed=4, hidden_size=64).save_pretrained(folder / "llama")
    return folder


# -- Loading and places --------------------------------------------------------------------------------------------


def does_not_fit(desk: Desk) -> None:
    load("llama", donors={"law": 1})


def layers_depend_on_each_other(desk: Desk) -> None:
    Gemma3nTextConfig(num_hidden_layers=4).save_pretrained("gemma3n")
    load("gemma3n", donors={"law": 1})


# -- Files ---------------------------------------------------------------------------------------------------------


def size_changed(desk: Desk) -> None:
    path = desk.folder / "law" / "donor.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    load("law")


def not_finite(desk: Desk) -> None:
    edit_weights(desk.folder / "law", lambda tensors: tensors["layers.0.mlp.up_proj.weight"].fill_(float("nan")))
    load("law")


# -- A loaded model ------------------------------------------------------------------------------------------------


def cache_of_the_other_side(desk: Desk) -> None:
    model, ids = desk.model(), torch.tensor([[1, 2, 3]])
    cache = model(ids, use_cache=True).past_key_values
    with model.disable_transplants():
        model(ids[:, :1], past_key_values=cache)


def thin_of_a_changed_recipient(desk: Desk) -> None:
    model = desk.model()
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    model.save_pretrained("saved", thin=True)


# -- The Hub -------------------------------------------------------------------------------------------------------


def not_found(desk: Desk) -> None:
    load("alice/no-such-donor")


def gated(desk: Desk) -> None:
    desk.hub.add_repo("alice/faq-gated", desk.folder / "law", gated="manual")
    load("alice/faq-gated")


def offline(desk: Desk) -> None:
    load("alice/faq-never-loaded", local_files_only=True)


# -- Text ----------------------------------------------------------------------------------------------------------


def loss_not_finite(desk: Desk) -> None:
    Path("law.txt").write_text("The court holds that the contract is void. " * 40)
    sizes = {"per_device_train_batch_size": 2, "block_length": 16, "donor_layers": 2}
    args = DonorTrainingArguments("work", max_steps=2, learning_rate=1e38, disable_tqdm=True, **sizes)
    DonorTrainer("recipient", args, "law.txt").train()


PROVOKED: dict[str, Callable[[Desk], None]] = {
    name: value
    for name, value in list(globals().items())
    if not name.startswith("_")
    and callable(value)
    and getattr(value, "__module__", "") == __name__
    and name not in ("Desk", "make_desk")
}
