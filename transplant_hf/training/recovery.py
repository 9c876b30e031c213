"""Bridge fine-tuning: after transplantation, let chosen parts grow together for a few steps.

Recipient layers that are trained become donors of one layer that replace them: the thin artefact holds these layers
and no others, and its recipient stays pinned.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from ..display import parse_size
from ..donor import Donor
from ..errors import ConfigurationError
from ..layer_map import RECIPIENT
from ..model.gates import attach_gate, detach_gate
from ..model.memory import transplant
from ..partial import stack_of
from .arguments import check_run
from .making import note_in_donors, versions
from .part_trainer import CachePlan, Part, PartTrainer
from .reading import blocks_of_run, model_and_tokenizer, rows_of_run

__all__ = ["RecoveryArguments", "RecoveryTrainer"]

_PARTS = ("donor", "neighbours", "norms", "gate")
_PREFIX = "recovered-"


@dataclass
class RecoveryArguments(TrainingArguments):
    """`TrainingArguments` of Transformers, with what concerns recovery.

    Args:
        parts: What is trained: "donor" (all of its layers), "neighbours" (the recipient's layers next to it), "norms"
            (only the norms of both), "gate" (the donor's strength); several may be named.
        neighbours: How many recipient layers on either side count as neighbours.
        donors: The donors to recover, by name; all that are inserted by default.
        block_length: Tokens in a block; by default what the recipient can read, at most 1024.
        held_out_blocks: As in `DonorTrainingArguments`.
        replay_share: The share of each batch that is general text, where such text is given.
        cache_prefix: As in `DonorTrainingArguments`.
        prefix_cache_limit: The same.
        learning_rate: Of everything but the gate.
        gate_learning_rate: Of the gate.

    Raises:
        ConfigurationError: A part that is not known.
    """

    parts: list[str] = field(default_factory=lambda: ["donor", "neighbours"])
    neighbours: int = 1
    donors: list[str] | None = None
    block_length: int | None = None
    held_out_blocks: int | None = None
    replay_share: float = 0.25
    cache_prefix: str = "auto"
    prefix_cache_limit: str = "20GB"
    learning_rate: float = field(default=1e-3)
    gate_learning_rate: float = 3e-2
    lr_scheduler_type: Any = field(default="cosine")
    warmup_steps: float = field(default=0.05)
    save_total_limit: int | None = field(default=2)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_run(self)
        unknown = sorted(set(self.parts) - set(_PARTS))
        if unknown or not self.parts:
            raise ConfigurationError(f"parts must be among {_PARTS}, got {self.parts!r}.")
        if self.neighbours < 0:
            raise ConfigurationError(f"neighbours must be at least 0, got {self.neighbours}.")


class RecoveryTrainer(PartTrainer):
    """Trains chosen parts of a transplant for a few steps.

    Args:
        model: A transplanted model, or the Hub id or folder of a transplant or donor.
        args: What to do.
        train_dataset: As in `DonorTrainer`.
        replay_dataset: The same.
        eval_dataset: The same.
        processing_class: The same.
        revision: The transplant's revision, where it is named.
        model_kwargs: Further arguments for loading it.
        **kwargs: As in `Trainer`.

    Raises:
        ConfigurationError: No transplant, or nothing to train.
    """

    def __init__(
        self,
        model: PreTrainedModel | str | os.PathLike[str],
        args: RecoveryArguments,
        train_dataset: Any,
        replay_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        revision: str | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        loaded, processing_class, _ = model_and_tokenizer(model, processing_class, revision, model_kwargs)
        grown: Any = _with_neighbours(loaded, args)
        self.recovered = _chosen(grown, args)
        self._gates = [name for name in self.recovered if "gate" in args.parts]
        _choose_trained(grown, args, self.recovered)
        gates = [attach_gate(grown, name) for name in self._gates]
        first = min(_first_trained(grown))
        domain, replay, evaluated = blocks_of_run(
            grown, processing_class, args, train_dataset, replay_dataset, eval_dataset
        )
        self._gate_names = {name for name, value in grown.named_parameters() if any(value is gate for gate in gates)}
        super().__init__(
            grown,
            args,
            rows_of_run(domain, replay, args, args.replay_share),
            part=Part(range(first, len(grown.layer_map))),
            cache=CachePlan(args.cache_prefix, parse_size(args.prefix_cache_limit)),
            run={
                "recipient": grown.transplant_config.recipient,
                "parts": sorted(args.parts),
                "donors": self.recovered,
                "learning_rate": args.learning_rate,
            },
            eval_dataset=evaluated,
            processing_class=processing_class,
            **kwargs,
        )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; afterwards gates are strengths again."""
        output = super().train(*args, **kwargs)
        model = self.accelerator.unwrap_model(self.model)
        while self._gates:
            detach_gate(model, self._gates.pop())
        self.note_measured({})
        return output

    def note_measured(self, held_out: Mapping[str, Mapping[str, float | None]]) -> None:
        """Record what was done, and what was measured on held-out text, in the donors that were trained.

        Args:
            held_out: `{text: {state of the model: perplexity}}`.
        """
        model = self.accelerator.unwrap_model(self.model)
        made = {**self._made(), **({"held_out_perplexity": held_out} if held_out else {})}
        note_in_donors(model, {name: {"recovered": made} for name in [*self.recovered, *_grown_by(model)]})

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Give gates a learning rate of their own: one number must go farther than each of many."""
        if self.optimizer is None and self._gate_names:
            rest = [p for name, p in self.model.named_parameters() if p.requires_grad and name not in self._gate_names]
            gates = [p for name, p in self.model.named_parameters() if name in self._gate_names]
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            groups = [{"params": gates, "lr": self.args.gate_learning_rate, "weight_decay": 0.0}]
            groups += [{"params": rest, "weight_decay": self.args.weight_decay}] if rest else []
            self.optimizer = kind(groups, **options)
        return super().create_optimizer(*args, **kwargs)

    def save_transplant(self, folder: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write the thin artefact: donors, recovered layers of the recipient, and the pinned reference to it.

        Args:
            folder: The folder.
            **kwargs: As in the model's `save_pretrained`.
        """
        if self.args.should_save:
            self.accelerator.unwrap_model(self.model).save_pretrained(folder, thin=True, **kwargs)

    def _made(self) -> dict[str, Any]:
        return {
            "parts": sorted(self.args.parts),
            "steps": self.state.global_step,
            "learning_rate": self.args.learning_rate,
            **self.rows.described(),
            "versions": versions(),
        }


def _donors_of(model: Any) -> Sequence[Any]:
    config = getattr(model, "transplant_config", None)
    if config is None:
        raise ConfigurationError(
            f"{type(model).__name__} holds no transplant: recovery is for a recipient with donors in it. Load it with "
            "AutoModelWithTransplant.from_pretrained(recipient, donors=...)."
        )
    return list(config.donors)


def _chosen(model: Any, args: RecoveryArguments) -> list[str]:
    """The donors that are recovered, by name."""
    known = [str(spec.name) for spec in _donors_of(model) if not str(spec.name).startswith(_PREFIX)]
    chosen = known if args.donors is None else args.donors
    strays = sorted(set(chosen) - set(known))
    if strays or not chosen:
        raise ConfigurationError(f"no donor is named {', '.join(strays)}; this model has {', '.join(known)}.")
    return list(chosen)


def _with_neighbours(model: Any, args: RecoveryArguments) -> Any:
    """Let recipient layers next to the donors be donors themselves, so that they can be trained and saved."""
    if not {"neighbours", "norms"} & set(args.parts):
        _donors_of(model)
        return model
    for index in sorted(_neighbours(model, _chosen(model, args), args.neighbours)):
        number = list(model.layer_map).index((RECIPIENT, index))
        layer = Donor.from_model(model, [number], name=f"{_PREFIX}{index}")
        model = transplant(model, layer, position=index, mode="replace", name=f"{_PREFIX}{index}")
    return model


def _neighbours(model: Any, donors: Sequence[str], reach: int) -> set[int]:
    layer_map = model.layer_map
    found: set[int] = set()
    for name in donors:
        own = layer_map.layers_of(name)
        near = [*range(max(own[0] - reach, 0), own[0]), *range(own[-1] + 1, min(own[-1] + 1 + reach, len(layer_map)))]
        found |= {layer_map[number].index for number in near if layer_map[number].source == RECIPIENT}
    return found


def _choose_trained(model: Any, args: RecoveryArguments, donors: Sequence[str]) -> None:
    model.requires_grad_(False)
    stack, layer_map = stack_of(model), model.layer_map
    mine = [number for name in donors for number in layer_map.layers_of(name)]
    near = [number for number, slot in enumerate(layer_map) if slot.source.startswith(_PREFIX)]
    for part, numbers in (("donor", mine), ("neighbours", near)):
        if part in args.parts:
            for number in numbers:
                stack[number].requires_grad_(True)
    if "norms" in args.parts:
        for number in [*mine, *near]:
            for norm in _norms(stack[number]):
                norm.requires_grad_(True)


def _norms(layer: nn.Module) -> Iterator[nn.Module]:
    """Modules that hold no more than gains and biases."""
    for module in layer.modules():
        own = list(module.parameters(recurse=False))
        if own and all(parameter.dim() == 1 for parameter in own) and not list(module.children()):
            yield module


def _grown_by(model: Any) -> list[str]:
    """The recipient's layers that became donors, by name."""
    return [str(spec.name) for spec in _donors_of(model) if str(spec.name).startswith(_PREFIX)]


def _first_trained(model: Any) -> list[int]:
    trained = [
        number
        for number, layer in enumerate(stack_of(model))
        if any(parameter.requires_grad for parameter in layer.parameters())
    ]
    if not trained:
        raise ConfigurationError("there is nothing to train: no layer next to the donors, or no norm in them.")
    return trained
