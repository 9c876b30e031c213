"""Train chosen parts of a transplant together for a few steps.

Recipient layers that are trained become donors of one layer that replace them, so the saved transplant stays thin and
its recipient stays pinned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from ..architecture import is_packed, is_quantized, quantization_fields, quantization_method
from ..donor import Donor
from ..errors import ConfigurationError
from ..layer_map import RECIPIENT
from ..model.active_donors import state_of
from ..model.in_memory import transplant
from ..model.strength import attach_gate, detach_gate
from ..partial import stack_of
from .arguments import RecoveryArguments
from .data import RunData
from .part_trainer import Part
from .records import note_in_donors, quantization_record, run_settings, versions
from .transplant_trainer import TransplantTrainer

__all__ = ["RecoveryTrainer"]

_PREFIX = "recovered-"


class RecoveryTrainer(TransplantTrainer):
    """Trains chosen parts of a transplant for a few steps.

    Args:
        model: A transplanted model, or the Hub id or folder of a transplant or donor.
        args: `RecoveryArguments`; not changed.
        **kwargs: As in `DonorTrainer`.

    Raises:
        ConfigurationError: Not a transplant, or nothing to train.
    """

    arguments_class = RecoveryArguments
    save_transplant = TransplantTrainer.save
    push_transplant = TransplantTrainer.push

    def prepare(self, data: RunData, args: Any) -> tuple[Any, Part, dict[str, Any]]:
        """Return the transplant with neighbors as donors, the part that runs, and what identifies the run."""
        self.recovered = _donors_to_recover(data.model, args)
        model = data.model
        for name in state_of(model).hooks.gates():  # of a trainer that was made and did not train
            detach_gate(model, name)
        chosen = ", ".join(part for part in args.parts if part in ("neighbors", "norms"))
        if chosen and is_quantized(model):
            raise ConfigurationError(
                f"the recipient is quantized ({quantization_method(model)}), and its layers cannot be trained: parts "
                f'{chosen} need them in full precision. Recover the parts "donor" and "gate", or load the recipient '
                "without quantization."
            )
        if chosen:
            model = _with_neighbors(model, self.recovered, args.neighbors)
        _require_gradients(model, args.parts, self.recovered)
        self._gates = list(self.recovered) if "gate" in args.parts else []
        gates = {id(attach_gate(model, name)) for name in self._gates}
        self._gate_names = {name for name, value in model.named_parameters() if id(value) in gates}
        run = {
            "recipient": model.transplant_config.recipient,
            "parts": sorted(args.parts),
            "donors": self.recovered,
            "gate_learning_rate": args.gate_learning_rate,
        }
        layers = list(enumerate(stack_of(model)))
        trained = [number for number, layer in layers if any(one.requires_grad for one in layer.parameters())]
        if not trained:
            raise ConfigurationError("there is nothing to train: no layer next to the donors, or no norm in them.")
        return model, Part(range(trained[0], len(layers))), run

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; afterwards gates are strengths again, also after an exception."""
        for name in self._gates:
            if name not in state_of(self.transplant).hooks.gates():  # it has trained before
                attach_gate(self.transplant, name)
                self.optimizer = self.lr_scheduler = None
        try:
            output = super().train(*args, **kwargs)
        finally:
            for name in self._gates:
                detach_gate(self.transplant, name)
        self.note_measured({})
        return output

    def states_before(self) -> Iterator[tuple[str, AbstractContextManager[Any]]]:
        """Yield the recipient, and the transplant before it is trained."""
        yield from super().states_before()
        yield "before", nullcontext()

    def note_measured(self, held_out: Mapping[str, Mapping[str, float | None]]) -> None:
        """Record in the trained donors what was done, and what was measured on held-out text."""
        record = {
            "parts": sorted(self.args.parts),
            "steps": self.state.global_step,
            **run_settings(self.args),
            **self.rows.described(),
            **quantization_record(quantization_fields(self.transplant)),
            "versions": versions(),
            **({"held_out_perplexity": held_out} if held_out else {}),
        }
        names = [name for name in _donor_names(self.transplant) if name in self.recovered or name.startswith(_PREFIX)]
        note_in_donors(self.transplant, {name: {"recovered": record} for name in names})

    def _trained_alone(self) -> list[tuple[nn.Parameter, dict[str, float]]]:
        """Return the gates: one number must change more than each of many."""
        options = {"lr": self.args.gate_learning_rate, "weight_decay": 0.0}
        return [(value, options) for name, value in self.model.named_parameters() if name in self._gate_names]


def _donor_names(model: Any) -> list[str]:
    config = getattr(model, "transplant_config", None)
    if config is None:
        raise ConfigurationError(
            f"{type(model).__name__} has no donors: recovery is for a recipient with donors in it. Name a transplant "
            "or a donor, or load one with AutoModelWithTransplant.from_pretrained(recipient, donors=...)."
        )
    return [str(spec.name) for spec in config.donors]


def _donors_to_recover(model: Any, args: RecoveryArguments) -> list[str]:
    known = [name for name in _donor_names(model) if not name.startswith(_PREFIX)]
    chosen = known if args.donors is None else list(args.donors)
    unknown = sorted(set(chosen) - set(known))
    if unknown or not chosen:
        raise ConfigurationError(f"no donor is named {', '.join(unknown)}; this model has {', '.join(known)}.")
    return chosen


def _with_neighbors(model: Any, donors: Sequence[str], reach: int) -> Any:
    """Turn recipient layers next to the donors into donors, so that they can be trained and saved."""
    layer_map, indices = model.layer_map, set()
    for name in donors:
        for own in layer_map.layers_of(name):  # a spread donor has neighbors at each of its places
            near = layer_map[max(own - reach, 0) : own + reach + 1]
            indices |= {slot.index for slot in near if slot.source == RECIPIENT}
    for index in sorted(indices):
        number = list(model.layer_map).index((RECIPIENT, index))
        layer = Donor.from_model(model, [number], name=f"{_PREFIX}{index}")
        model = transplant(model, layer, position=index, mode="replace", name=f"{_PREFIX}{index}")
    return model


def _require_gradients(model: Any, parts: Sequence[str], donors: Sequence[str]) -> None:
    model.requires_grad_(False)
    stack, layer_map = stack_of(model), model.layer_map
    of_donors = [number for name in donors for number in layer_map.layers_of(name)]
    neighbors = [number for number, slot in enumerate(layer_map) if slot.source.startswith(_PREFIX)]
    packed = [number for number in of_donors if any(map(is_packed, stack[number].parameters()))]
    if packed and is_quantized(model) and {"donor", "norms"} & set(parts):
        raise ConfigurationError(
            f"layers {', '.join(map(str, packed))} of the donors were quantized with the recipient, and only layers in "
            "full precision can be trained. Name the transplant instead of passing a loaded model: its donors then "
            "stay in full precision."
        )
    for number in [*of_donors, *neighbors]:
        if ("donor" if number in of_donors else "neighbors") in parts:
            stack[number].requires_grad_(True)
        elif "norms" in parts:
            for module in stack[number].modules():
                own = list(module.parameters(recurse=False))
                if all(parameter.dim() == 1 for parameter in own) and not list(module.children()):
                    module.requires_grad_(True)  # it has only gains and biases
