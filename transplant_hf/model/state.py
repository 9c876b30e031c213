"""What a transplanted model knows about itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..architecture import decoder_stack
from ..config import DonorSpec
from ..donor.record import DonorRecord
from ..errors import ConfigurationError
from ..layer_map import RECIPIENT, LayerMap, Stage
from ..splice import Blueprint, renumber, use_config
from .requests import Requests, Wanted, read_request
from .strength import Dials
from .switch import Switch

__all__ = ["TransplantState", "finish", "record_of_layers", "state_of"]


@dataclasses.dataclass(eq=False)
class TransplantState:
    """A model's transplant.

    Args:
        blueprint: What runs, and what it was made of.
        layers: Every layer the model holds, running or not.
        switch: Turns donors off and on.
        dials: What donors do with what they add.
        local_only: Whether the model was loaded without asking the Hub.
        cache_dir: The download cache it was loaded with.
    """

    blueprint: Blueprint
    layers: dict[Stage, nn.Module]
    switch: Switch
    dials: Dials
    local_only: bool = False
    cache_dir: str | None = None

    def turn(self, strengths: Mapping[str, float], composition: str | None = None) -> None:
        """Give donors other strengths, or compose them in another way, in the record and in what runs.

        Raises:
            ConfigurationError: A strength that is not finite, or not 1 for a donor that replaces layers.
        """
        what = "set_composition()" if composition else "set_strength()"
        with self.switch.calls.turn(what):
            blueprint = self.blueprint.turned(strengths, composition)
            with self.switch.calls.alone(what):
                self.blueprint = blueprint
                self.dials.use(blueprint)
                self.switch.watch()

    def off(self, names: Sequence[str] | None) -> AbstractContextManager[None]:
        """Make a block in which donors are switched off; `None` for all that there are then.

        Raises:
            ConfigurationError: No such donor, or one that replaced layers that were not kept.
        """
        chosen = self.blueprint.splice.names if names is None else names
        self.switch.check(chosen)
        return self.switch.off(chosen)

    def request(self, donors: Any, rows: Sequence[Any] | None) -> tuple[Requests, Wanted]:
        """Read what a call asks for, and make the model ready to answer.

        Raises:
            ConfigurationError: As `read_request`; or a donor that is switched off.
        """
        wanted = read_request(self.blueprint, donors, rows)
        if self.switch.calls.overdue:
            with self.switch.calls.turn("using()"):  # which settles it
                pass
        replacing = frozenset(part.name for part in self.blueprint.parts if part.spec.mode == "replace")
        wanted = dataclasses.replace(wanted, replacing=replacing - self.switch.disabled)
        for name in wanted.strengths:
            if name in self.switch.disabled & wanted.named:
                raise ConfigurationError(
                    f"donor {name!r} is switched off by disable_transplants(), so that no call can use it meanwhile."
                )
        self.switch.check_stack()
        if not self.dials.open:
            # What calls of several passes compute stays as it is: only the pass that each is in has to end.
            with self.switch.calls.alone("using()", generations=False):
                self.dials.open_up()
                self.switch.watch()
        return self.dials.requests, wanted

    def check_name(self, name: str) -> None:
        """Refuse a name that no donor has.

        Raises:
            ConfigurationError: With the names there are.
        """
        self.blueprint.check_name(name)


def state_of(model: Any) -> TransplantState:
    """Return a model's transplant.

    Raises:
        ConfigurationError: It has none.
    """
    state = getattr(model, "_transplant", None)
    if state is None:
        raise ConfigurationError("this model holds no transplant: it was built or loaded without donors.")
    return state


def finish(model: PreTrainedModel, blueprint: Blueprint, **where: Any) -> TransplantState:
    """Number inserted layers, set strengths, put kept layers aside, and give the model its state.

    Args:
        model: A model with all its layers and weights.
        blueprint: What it was built from.
        **where: How it was loaded.
    """
    stack = decoder_stack(model, blueprint.recipient.stack_path)
    if not blueprint.built_config.native:
        renumber(stack, blueprint.origins(blueprint.built))
        use_config(model, blueprint.recipient, blueprint.built_config)
    layers = dict(zip(blueprint.built, stack, strict=True))
    dials = Dials(blueprint, layers)
    state = TransplantState(blueprint, layers, Switch(model, blueprint, layers, dials), dials, **where)
    state.switch.settle()
    return state


def record_of_layers(
    state: TransplantState, layer_map: LayerMap, numbers: Sequence[int], name: str | None
) -> tuple[DonorRecord, DonorSpec | None]:
    """Return the record of a donor made of running layers, and its place if it is one of the model's donors."""
    slots = [layer_map[number] for number in numbers]
    source = slots[0].source
    indices = tuple(slot.index for slot in slots)
    if {slot.source for slot in slots} != {source} or indices != tuple(range(indices[0], indices[0] + len(indices))):
        raise ConfigurationError(
            f"layers {list(numbers)} come from {', '.join(map(str, map(tuple, slots)))}; a donor is made of "
            "consecutive layers of one source."
        )
    blueprint = state.blueprint
    part = None if source == RECIPIENT else blueprint.part(source)
    anatomy = part.anatomy if part else blueprint.recipient
    record = part.donor.record if part else None
    found = record.source_id if record else blueprint.config.recipient
    revision = record.source_revision if record else blueprint.config.recipient_revision
    metadata = dict(record.metadata) if record else {}
    fields = anatomy.config.to_dict()
    fields.pop("_name_or_path", None)
    made = DonorRecord(
        model_type=anatomy.config.model_type,
        source_config=fields,
        layer_indices=indices,
        source_id=found or blueprint.config.recipient or None,
        source_revision=revision,
        name=name or (source if source != RECIPIENT else None),
        metadata=metadata,
    )
    return made, part.spec if part else None
