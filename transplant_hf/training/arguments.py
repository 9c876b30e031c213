"""What can be said about the training of a donor, beside what `TrainingArguments` says about any training."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from ..display import parse_size
from ..errors import ConfigurationError

__all__ = ["DonorTrainingArguments", "check_run"]

_METHODS, _MODES, _STARTS = ("in_place", "standalone"), ("insert", "replace"), ("identity", "copy")
_CACHES = ("auto", "memory", "disk", "off")


@dataclass
class DonorTrainingArguments(TrainingArguments):
    """`TrainingArguments` of Transformers, with what concerns donors and with defaults from the measurements.

    Args:
        method: "in_place" trains the donor inside the frozen recipient; "standalone" is the paper's wrapper: the donor
            alone between the frozen embeddings and the frozen head.
        mode: "insert" adds layers; "replace" trains the layers at the position themselves, at no extra cost when they
            run.
        position: How many recipient layers run before the donor, 0..L; by default L - 1, or L - k to replace.
        donor_layers: k.
        start_layers: The recipient layers it starts from; by default the k before the position, or the replaced ones.
        init: "identity" starts with output projections of zero, so that the recipient's output is as it was;
            "copy" starts as the layers are. A replacing donor always starts as a copy.
        donor_name: What to call the donor.
        block_length: Tokens in a block; by default what the recipient can read, at most 1024.
        held_out_blocks: Most blocks of each text that is measured on; by default all.
        replay_share: The share of each batch that is general text, where such text is given.
        distillation: Weight of KL(untouched recipient || model), on the rows of general text if there are any.
        cache_prefix: Whether the hidden states before the donor are computed once for each block: in "memory", on
            "disk", "off", or "auto": in memory up to a gibibyte, else on disk.
        prefix_cache_limit: Most bytes for that, such as "20GB" or "20GiB".
        prefix_cache_dir: Where to keep them on disk; by default in the output folder, removed after training.
        strength: The strength that the donor's repo recommends; by default 1, or 0.75 without general text.
        learning_rate: By default what did best for the method, in proportion to 1 / width.

    Raises:
        ConfigurationError: A value that is not known.

    Example:
        >>> DonorTrainingArguments(output_dir="law", mode="replace").lr_scheduler_type.value
        'cosine'
    """

    method: str = "in_place"
    mode: str = "insert"
    position: int | None = None
    donor_layers: int = 3
    start_layers: list[int] | None = None
    init: str = "identity"
    donor_name: str | None = None
    block_length: int | None = None
    held_out_blocks: int | None = None
    replay_share: float = 0.25
    distillation: float = 0.0
    cache_prefix: str = "auto"
    prefix_cache_limit: str = "20GB"
    prefix_cache_dir: str | None = None
    strength: float | None = None
    learning_rate: float | None = field(default=None)  # type: ignore[assignment]
    lr_scheduler_type: Any = field(default="cosine")
    warmup_steps: float = field(default=0.05)
    save_total_limit: int | None = field(default=2)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_run(self)
        for name, known in (("method", _METHODS), ("mode", _MODES), ("init", _STARTS), ("cache_prefix", _CACHES)):
            if getattr(self, name) not in known:
                raise ConfigurationError(f"{name} must be one of {known}, got {getattr(self, name)!r}.")
        if self.donor_layers < 1:
            raise ConfigurationError(f"donor_layers must be at least 1, got {self.donor_layers}.")
        if self.method == "standalone" and self.mode == "replace":
            raise ConfigurationError('method="standalone" trains layers alone; use mode="insert" with it.')
        if self.distillation and (self.mode == "replace" or self.method == "standalone"):
            raise ConfigurationError(
                "distillation compares the model with the untouched recipient layer by layer, which needs "
                'method="in_place" and mode="insert". Set distillation=0.'
            )


def check_run(args: Any) -> None:
    """Refuse numbers with which a run would fail, or do nothing, after hours of preparation.

    Args:
        args: Of a donor or of a recovery.

    Raises:
        ConfigurationError: A number out of range.
    """
    if args.max_steps != -1 and args.max_steps < 1:
        raise ConfigurationError(
            f"max_steps must be at least 1, or -1 for num_train_epochs; got {args.max_steps}. A donor that is not "
            "trained is made by extract."
        )
    if args.max_steps == -1 and not 0 < args.num_train_epochs < math.inf:
        raise ConfigurationError(f"num_train_epochs must be above 0, got {args.num_train_epochs}.")
    for name in ("learning_rate", "gate_learning_rate"):
        rate = getattr(args, name, None)
        if rate is not None and not 0 < rate < math.inf:
            raise ConfigurationError(f"{name} must be a finite number above 0, got {rate}.")
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "held_out_blocks"):
        count = getattr(args, name)
        if count is not None and count < 1:
            raise ConfigurationError(f"{name} must be at least 1, got {count}.")
    if not 0.0 <= args.replay_share < 1.0:
        raise ConfigurationError(f"replay_share must be at least 0 and below 1, got {args.replay_share}.")
    parse_size(args.prefix_cache_limit, "prefix_cache_limit")
