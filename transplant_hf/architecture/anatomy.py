"""The structure of a model: where its decoder layers are, and what each consists of."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import BUILD_ERRORS, CompatibilityError
from .build import build_on_meta
from .fingerprint import Fingerprint, fingerprint
from .stack import decoder_stack, find_stack


@dataclasses.dataclass(frozen=True)
class Anatomy:
    """The structure of a model, built on the meta device."""

    model_class: Any
    config: PreTrainedConfig
    what: str = "model"  # "recipient X" or "donor Y" in messages

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model on the meta device."""
        try:
            return build_on_meta(self.model_class, self.config)
        except BUILD_ERRORS as error:
            raise CompatibilityError(
                f"{self.what}: {self.model_class.__name__} cannot be built from its configuration "
                f"({self.config.model_type}): {type(error).__name__}: {error}"
            ) from error

    @cached_property
    def stack_path(self) -> str:
        """Path of the list of decoder layers, such as `"model.layers"`."""
        return find_stack(self.model, self.what)

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, on the meta device."""
        return decoder_stack(self.model, self.stack_path)

    @cached_property
    def num_layers(self) -> int:
        """L."""
        return len(self.layers)

    @cached_property
    def sharing_layers(self) -> set[int]:
        """The layers that share weights with each other."""
        tied = self.model.all_tied_weights_keys
        names = [name for name in (*tied, *tied.values()) if name.startswith(f"{self.stack_path}.")]
        return {int(name.removeprefix(f"{self.stack_path}.").partition(".")[0]) for name in names}

    @cached_property
    def fingerprints(self) -> list[Fingerprint]:
        """The fingerprint of each layer."""
        return [fingerprint(layer) for layer in self.layers]

    def kind(self, index: int) -> Any:
        """A value that is equal for two layers of one kind."""
        return {name: value for name, value in self.fingerprints[index].items() if value != index}


@dataclasses.dataclass(frozen=True)
class LayerOrigin:
    """The source model of one running layer, and the layer's number there."""

    anatomy: Anatomy
    index: int
