"""Arguments of training a donor and of recovering a transplant, beside those of `TrainingArguments`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from ..config import DonorSpec
from ..display import parse_size
from ..errors import ConfigurationError
from .checkpoints import ZERO_3

__all__ = [
    "LEARNING_RATES",
    "REPLACED_STEP",
    "DonorTrainingArguments",
    "PartTrainingArguments",
    "RecoveryArguments",
    "default_init",
    "default_learning_rate",
]

_CHOICES = {
    "method": ("in_place", "standalone"),
    "mode": ("insert", "replace"),
    "init": ("identity", "copy"),
    "cache_prefix": ("auto", "memory", "disk", "off"),
}
_PARTS = ("donor", "neighbors", "norms", "gate")
# The best of three on a validation split, for Llamas of width 192 (docs/toy_model.md).
_MEASURED_WIDTH = 192
LEARNING_RATES = {"in_place": 1e-2, "standalone": 3e-3}
# Of replaced layers, as a part of the root mean square of their weights: 3e-4 was the best for SmolLM2-135M (0.19), and
# 6e-5 for Gemma 3 270M (0.035).
REPLACED_STEP = 1.6e-3


@dataclass
class PartTrainingArguments(TrainingArguments):
    """The fields of both kinds of training, described in `DonorTrainingArguments`."""

    block_length: int | None = None
    held_out_blocks: int | None = None
    replay_share: float = 0.25
    cache_prefix: str = "auto"
    prefix_cache_limit: str = "20GB"
    prefix_cache_dir: str | None = None
    distillation: float = 0.0
    loss_chunk: int | None = None
    lr_scheduler_type: Any = field(default="cosine")
    warmup_steps: float = field(default=0.05)
    save_total_limit: int | None = field(default=2)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.deepspeed and self.hf_deepspeed_config.is_zero3():
            raise ConfigurationError(ZERO_3)
        for name, known in _CHOICES.items():
            if getattr(self, name, known[0]) not in known:
                raise ConfigurationError(f"{name} must be one of {known}, got {getattr(self, name)!r}.")
        if self.max_steps != -1 and self.max_steps < 1:
            raise ConfigurationError(
                f"max_steps must be at least 1, or -1 for num_train_epochs; got {self.max_steps}. A donor that is not "
                "trained is made by extract."
            )
        if self.max_steps == -1:
            self._require("num_train_epochs", _is_positive, "above 0")
        for name in ("learning_rate", "gate_learning_rate"):
            self._require(name, _is_positive, "a finite number above 0")
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "held_out_blocks"):
            self._require(name, lambda count: count >= 1, "at least 1")
        self._require("distillation", lambda weight: 0 <= weight < math.inf, "a finite number from 0")
        self._require("replay_share", lambda share: 0 <= share < 1, "at least 0 and below 1")
        self._require("loss_chunk", lambda tokens: tokens >= 0, "at least 0")
        parse_size(self.prefix_cache_limit, "prefix_cache_limit")
        if self.prefix_cache_dir is not None and self.cache_prefix == "auto":
            self.cache_prefix = "disk"
        if self.prefix_cache_dir is not None and self.cache_prefix != "disk":
            raise ConfigurationError(
                f"prefix_cache_dir (--prefix-cache-dir) is for a cache on disk, and cache_prefix (--cache-prefix) is "
                f"{self.cache_prefix!r}. Leave out one of them."
            )

    def _require(self, name: str, holds: Callable[[Any], bool], what: str) -> None:
        value = getattr(self, name, None)
        if value is not None and not holds(value):
            raise ConfigurationError(f"{name} must be {what}, got {value}.")


@dataclass
class DonorTrainingArguments(PartTrainingArguments):
    """`TrainingArguments` of Transformers with fields for donors, and with defaults from measurements.

    Args:
        method: "in_place" trains the donor inside the frozen recipient; "standalone" is the paper's wrapper: the donor
            alone between the frozen embeddings and the frozen head.
        mode: "insert" adds layers; "replace" trains the layers at the position, and adds no cost at run time.
        position: How many recipient layers run before the donor, 0..L. Several, such as `(10, 20, 29)`, spread the
            donor through the recipient, in parts of one size. By default spread evenly, with one layer in each place,
            if the recipient has at least 12 layers; L - 1, or L - k to replace, in others, for "standalone", and where
            the layers before the donor are streamed.
        donor_layers: k; by default as many as `start_layers`, one for each of several positions, or 3.
        start_layers: The recipient layers it starts from; by default the k before the position, or the replaced ones.
        init: "identity", the default, starts with output projections of zero, or with silent norms after them, so that
            the recipient's output is unchanged; "copy" starts with copies of the layers, as "replace" always does.
        donor_name: The donor's name; by default the text's.
        block_length: Tokens in a block; by default what the recipient can read, at most 1024.
        held_out_blocks: The largest number of blocks of each held-out text; by default all.
        replay_share: The share of each batch that is general text, if there is general text.
        distillation: Weight of KL(untouched recipient || model), on the rows of general text if there are any.
        cache_prefix: Whether the hidden states before the donor are computed once for each block: in "memory", on
            "disk", "off", or "auto": in memory up to one GiB, otherwise on disk.
        prefix_cache_limit: The largest size of that cache, such as "20GB" or "20GiB".
        prefix_cache_dir: Keep the cache on disk, in this folder. Without it, a cache on disk is in the output folder,
            and removed after training.
        loss_chunk: Tokens whose logits are in memory at one time; by default as many as take 128 MiB in float32, if the
            model's loss can be computed in chunks; 0 for the model's own loss.
        stream_prefix: Whether the layers before the donor stay in their files: each is read once, for the cache, and
            takes no memory while the donor is trained. By default if the recipient does not fit into free memory.
        strength: The strength that the donor's repo recommends; by default 1, or 0.75 without general text. With
            mode="replace", the donor's weights are interpolated when training ends: 0 for those before it, 1 (the
            default) for the trained ones.
        learning_rate: By default the best measured for the method, in proportion to 1 / width, or with "replace" to
            the root mean square of the replaced layers' weights.

    Raises:
        ConfigurationError: An unknown value.

    Example:
        >>> DonorTrainingArguments(output_dir="law", mode="replace").lr_scheduler_type.value
        'cosine'
    """

    method: str = "in_place"
    mode: str = "insert"
    position: Any = None
    donor_layers: int = None  # type: ignore[assignment]
    start_layers: list[int] | None = None
    init: str = None  # type: ignore[assignment]
    stream_prefix: bool | None = None
    donor_name: str | None = None
    strength: float | None = None
    learning_rate: float | None = field(default=None)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        self.init = self.init or default_init(self.mode)
        super().__post_init__()
        # The specification checks both.
        self.position = DonorSpec("donor", self.position, name=self.donor_name).position
        if self.donor_layers is None:
            counted = self.start_layers or (self.position if isinstance(self.position, tuple) else range(3))
            self.donor_layers = len(counted)
        if self.donor_layers < 1:
            raise ConfigurationError(f"donor_layers (--count) must be at least 1, got {self.donor_layers}.")
        if self.start_layers is not None and len(self.start_layers) != self.donor_layers:
            raise ConfigurationError(
                f"start_layers (--start-layers) names {len(self.start_layers)} layers, {list(self.start_layers)}, but "
                f"the donor has {self.donor_layers} (donor_layers, --count). Leave out one of them."
            )
        if self.mode == "replace" and self.init == "identity":
            raise ConfigurationError('layers that replace others start as copies of them: use init="copy" (--init).')
        if self.mode == "replace" and self.strength is not None and not 0 <= self.strength <= 1:
            raise ConfigurationError(
                f'strength (--strength) must be from 0 to 1 with mode="replace" (--mode), got {self.strength}: weights '
                "are interpolated between those before training and the trained ones."
            )
        if self.method == "standalone" and self.mode == "replace":
            raise ConfigurationError(
                'method="standalone" (--method) trains layers alone; use mode="insert" (--mode) with it.'
            )
        if self.distillation and (self.mode == "replace" or self.method == "standalone"):
            raise ConfigurationError(
                "distillation (--distillation) compares the model with the untouched recipient layer by layer, which "
                'needs method="in_place" (--method) and mode="insert" (--mode). Set it to 0.'
            )


@dataclass
class RecoveryArguments(PartTrainingArguments):
    """`TrainingArguments` of Transformers with fields for recovery; others are as in `DonorTrainingArguments`.

    Args:
        parts: What is trained: "donor" (all of its layers), "neighbors" (the recipient's layers next to it), "norms"
            (only the norms of both), "gate" (the donor's strength); one or several.
        neighbors: How many recipient layers on either side are neighbors.
        donors: The donors to recover, by name; by default all that are inserted.
        learning_rate: The learning rate of all parts except gates.
        gate_learning_rate: The learning rate of gates.
        neighbours: The old name of `neighbors`.

    Raises:
        ConfigurationError: An unknown part.
    """

    parts: list[str] = field(default_factory=lambda: ["donor", "neighbors"])
    neighbors: int = 1
    donors: list[str] | None = None
    learning_rate: float = field(default=1e-3)
    gate_learning_rate: float = 3e-2
    neighbours: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.neighbours is not None or "neighbours" in self.parts:
            message = "neighbours is deprecated and will be removed in the next release: use neighbors."
            warnings.warn(message, FutureWarning, stacklevel=3)
            self.neighbors = self.neighbors if self.neighbours is None else self.neighbours
            self.parts = [part.replace("neighbours", "neighbors") for part in self.parts]
        if not self.parts or set(self.parts) - set(_PARTS):
            raise ConfigurationError(f"parts must be among {_PARTS}, got {self.parts!r}.")
        self._require("neighbors", lambda layers: layers >= 0, "at least 0")
        if self.neighbors != type(self).neighbors and not {"neighbors", "norms"} & set(self.parts):
            raise ConfigurationError(
                f"neighbors (--neighbors) is {self.neighbors}, and the parts (--parts) {self.parts} have none. Add "
                '"neighbors" or "norms" to the parts, or leave it out.'
            )
        if self.distillation:
            raise ConfigurationError("distillation is for training a donor. Set distillation=0.")


def _is_positive(number: float) -> bool:
    return 0 < number < math.inf


def default_learning_rate(
    args: DonorTrainingArguments, width: int, trained: Iterable[torch.Tensor], normed: bool = False
) -> float:
    """Return the best measured learning rate, for a recipient's width or for the weights that are trained.

    Args:
        args: How the donor is trained.
        width: The recipient's hidden size.
        trained: The weights that are trained.
        normed: Whether norms follow the output projections.

    Example:
        >>> default_learning_rate(DonorTrainingArguments("law"), 192, [])
        0.01
        >>> default_learning_rate(DonorTrainingArguments("law", mode="replace"), 768, [torch.full((2, 2), 0.25)])
        0.0004
    """
    if args.mode == "replace":
        return REPLACED_STEP * root_mean_square(trained)
    # A third of the rate was better for Gemma 3 270M (docs/results.md), in which norms follow the projections.
    return width_scaled(LEARNING_RATES[args.method], width) / (3 if normed else 1)


@torch.no_grad()
def root_mean_square(tensors: Iterable[torch.Tensor]) -> float:
    """Return the root mean square of all numbers in matrices; tensors of one dimension do not count."""
    matrices = [tensor for tensor in tensors if tensor.dim() > 1]
    squares = sum(torch.linalg.vector_norm(tensor, dtype=torch.float32).item() ** 2 for tensor in matrices)
    return math.sqrt(squares / sum(tensor.numel() for tensor in matrices))


def width_scaled(rate: float, width: int) -> float:
    """Return a learning rate for a model of another width than the measured one.

    The proportion is the rule of maximal update parametrization (arXiv 2203.03466) for Adam and hidden matrices; it
    was not measured here.
    """
    return rate * min(1.0, _MEASURED_WIDTH / width)


def default_init(mode: str) -> str:
    """Return how a donor starts: layers that replace others are those layers at first."""
    return "copy" if mode == "replace" else "identity"
