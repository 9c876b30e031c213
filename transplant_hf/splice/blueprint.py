"""A transplant on paper: every layer's origin and the configuration of every state, before any weight is read."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from ..architecture import Anatomy, LayerOrigin, SplicedConfig, splice_config, text_config
from ..architecture.exceptions import SEVERAL_STREAMS
from ..compatibility import CompatibilityReport, donor_anatomy, mismatches, refuse_unsupported
from ..config import DonorSpec, TransplantConfig, donor_specs
from ..donor import Donor
from ..errors import CompatibilityError, ConfigurationError
from ..layer_map import RECIPIENT, LayerMap, Placement, Splice, Stage
from ..numeric import finite_number

__all__ = ["Blueprint", "DonorPart", "draw_blueprint", "report_fit"]


@dataclasses.dataclass(frozen=True)
class DonorPart:
    """A donor in a blueprint.

    Args:
        spec: Where it goes.
        donor: Its layers.
        anatomy: Its source model, looked at.
    """

    spec: DonorSpec
    donor: Donor
    anatomy: Anatomy

    @property
    def name(self) -> str:
        """Its name in this transplant."""
        return str(self.spec.name)


@dataclasses.dataclass(frozen=True, eq=False)
class Blueprint:
    """What is going to run.

    It never changes: a model gets another one, so that copies of a model can share what is costly in it.

    Args:
        recipient: The recipient, looked at.
        parts: The donors, in the order they were given.
        config: The transplant's configuration, revisions resolved.
        keep_replaced: Whether layers that a donor replaces are kept, so that it can be switched off.
    """

    recipient: Anatomy
    parts: tuple[DonorPart, ...]
    config: TransplantConfig
    keep_replaced: bool = False

    def __deepcopy__(self, memo: dict[int, object]) -> Blueprint:
        # The configuration is the user's to change.
        return self._with(self.parts, copy.deepcopy(self.config, memo))

    @cached_property
    def splice(self) -> Splice:
        """The algebra of positions."""
        return Splice(self.recipient.num_layers, [_placement(part) for part in self.parts])

    @cached_property
    def built(self) -> tuple[Stage, ...]:
        """The layers the model is built with: those that run, and replaced ones that are kept."""
        return tuple(stage for stage in self.splice.stages if self.keep_replaced or stage.runs(()))

    @cached_property
    def built_config(self) -> SplicedConfig:
        """The configuration the model is built from."""
        return splice_config(self.recipient, self.origins(self.built))

    @cached_property
    def native(self) -> bool:
        """Whether the recipient's own class builds what runs."""
        return self.state(()).native and not self.scaled and not self.crowds

    @property
    def scaled(self) -> tuple[str, ...]:
        """Donors whose strength is not 1."""
        return tuple(part.name for part in self.parts if part.spec.strength != 1.0)

    @property
    def crowds(self) -> tuple[tuple[str, ...], ...]:
        """The donors that run side by side, by name."""
        return self.config.crowds

    @property
    def beyond_native(self) -> tuple[str, ...]:
        """Why no native checkpoint can say what runs, beyond what layers they are."""
        scaled = (f"strength of {', '.join(self.scaled)} is not 1",) if self.scaled else ()
        crowds = (f"{', '.join(names)} run side by side" for names in self.crowds)
        return (*scaled, *crowds)

    def refuse_scaling(self) -> None:
        """Refuse to keep a part of what donors add, where that is not one hidden state.

        Raises:
            ConfigurationError: With the reason.
        """
        model_type = text_config(self.recipient.config).config.model_type
        if model_type in SEVERAL_STREAMS:
            raise ConfigurationError(
                f"donors in a {model_type} model run at strength 1, one after another and in every call: "
                f"{SEVERAL_STREAMS[model_type]}. disable_transplants() switches them off."
            )

    def turned(self, strengths: Mapping[str, float], composition: str | None = None) -> Blueprint:
        """The same layers with other strengths, or composed in another way.

        Args:
            strengths: By the donors' names; those that are not named stay.
            composition: "stacked" or "side_by_side"; as it is by default.

        Raises:
            ConfigurationError: A strength that is not finite, or not 1 for a donor that replaces layers.
        """
        # Checked here too: to a spec, `None` is a strength that is not given.
        numbers = {name: finite_number(value, f"strength of donor {name!r}") for name, value in strengths.items()}
        parts = tuple(
            dataclasses.replace(part, spec=dataclasses.replace(part.spec, strength=numbers[part.name]))
            if part.name in numbers
            else part
            for part in self.parts
        )
        config = self.config.replaced(
            donors=[part.spec for part in parts], composition=composition or self.config.composition
        )
        made = self._with(parts, config)
        if made.beyond_native:
            self.refuse_scaling()
        return made

    def noted(self, notes: Mapping[str, Mapping[str, Any]]) -> Blueprint:
        """The same layers with more in the metadata that their donors are saved with.

        Args:
            notes: What to add, by the donors' names.
        """
        parts = tuple(
            dataclasses.replace(part, donor=_noted(part.donor, notes[part.name])) if part.name in notes else part
            for part in self.parts
        )
        return self._with(parts, self.config)

    def _with(self, parts: tuple[DonorPart, ...], config: TransplantConfig) -> Blueprint:
        """The same layers at the same positions."""
        made = dataclasses.replace(self, parts=parts, config=config)
        # None of these depends on what differs, and they are costly.
        known = vars(self).keys() & {"splice", "built", "built_config"}
        vars(made).update({name: vars(self)[name] for name in known})
        return made

    def redrawn(self, donors: Sequence[DonorPart | tuple[DonorSpec, Donor]], keep_replaced: bool) -> Blueprint:
        """The same recipient with other donors.

        Args:
            donors: All donors in their order; those that are not drawn yet are checked.
            keep_replaced: Keep the layers that donors replace.

        Raises:
            ConfigurationError: A position out of range, overlapping replacements, two donors of one name.
            CompatibilityError: A donor that does not fit, with every mismatch.
        """
        specs = donor_specs([one.spec if isinstance(one, DonorPart) else one[0] for one in donors])
        config = self.config.replaced(donors=specs)
        parts = tuple(one if isinstance(one, DonorPart) else _fitted(self.recipient, *one) for one in donors)
        return _checked(Blueprint(self.recipient, parts, config, keep_replaced))

    def check_name(self, name: str) -> None:
        """Refuse a name that no donor has.

        Raises:
            ConfigurationError: With the names there are.
        """
        if name not in self.splice.names:
            known = ", ".join(self.splice.names) or "none"
            raise ConfigurationError(f"no donor is named {name!r}; this model has {known}.")

    def part(self, name: str) -> DonorPart:
        """The donor of that name."""
        return next(part for part in self.parts if part.name == name)

    def running(self, disabled: Collection[str]) -> tuple[Stage, ...]:
        """The layers that run while some donors are switched off."""
        return self.splice.running(disabled)

    def state(self, disabled: Collection[str]) -> SplicedConfig:
        """The configuration while some donors are switched off."""
        stages = self.running(disabled)
        if stages == self.built:
            return self.built_config
        if all(stage.slot.source == RECIPIENT for stage in stages):
            return SplicedConfig(self.recipient.config, True)
        return splice_config(self.recipient, self.origins(stages))

    def layer_map(self, disabled: Collection[str] = ()) -> LayerMap:
        """What runs while some donors are switched off."""
        return self.splice.layer_map(disabled)

    def origins(self, stages: Sequence[Stage]) -> list[LayerOrigin]:
        """Where each layer was built."""
        anatomies = {part.name: part.anatomy for part in self.parts}
        return [LayerOrigin(anatomies.get(s.slot.source, self.recipient), s.slot.index) for s in stages]


def _noted(donor: Donor, note: Mapping[str, Any]) -> Donor:
    record = dataclasses.replace(donor.record, metadata={**donor.record.metadata, **note})
    return donor.replaced(record=record)


def _placement(part: DonorPart) -> Placement:
    return Placement(part.name, part.spec.position, part.donor.record.layer_indices, part.spec.mode == "replace")


def draw_blueprint(
    model_class: type[PreTrainedModel],
    recipient_config: PreTrainedConfig,
    donors: Sequence[tuple[DonorSpec, Donor]],
    config: TransplantConfig,
    keep_replaced: bool = False,
) -> Blueprint:
    """Check that donors fit a recipient at their positions, and draw what is going to run.

    Args:
        model_class: The recipient's own class.
        recipient_config: Its configuration.
        donors: The donors and their places.
        config: The transplant's configuration, for the record.
        keep_replaced: Keep the layers that donors replace.

    Returns:
        The blueprint.

    Raises:
        ConfigurationError: A position out of range, overlapping replacements.
        CompatibilityError: A donor that does not fit, with every mismatch.
    """
    recipient = Anatomy(model_class, recipient_config, f"recipient {config.recipient or model_class.__name__}")
    refuse_unsupported(recipient)
    parts = tuple(_fitted(recipient, spec, donor) for spec, donor in donors)
    return _checked(Blueprint(recipient, parts, config, keep_replaced))


def _checked(blueprint: Blueprint) -> Blueprint:
    _refuse_removing_shared(blueprint.recipient, blueprint.splice)
    if blueprint.beyond_native:
        blueprint.refuse_scaling()
    return blueprint


def _fitted(recipient: Anatomy, spec: DonorSpec, donor: Donor) -> DonorPart:
    chosen = donor.part(spec.layers) if spec.layers is not None else donor
    anatomy = donor_anatomy(chosen, recipient)
    found = tuple(mismatches(chosen, anatomy, recipient))
    CompatibilityReport(_named(recipient), str(spec.name), spec.position, found).raise_for_mismatches()
    return DonorPart(spec, chosen, anatomy)


def _refuse_removing_shared(recipient: Anatomy, splice: Splice) -> None:
    for placement in splice.placements:
        shared = sorted(recipient.sharing_layers & set(placement.replaced))
        if shared:
            raise CompatibilityError(
                f"donor {placement.name!r} would replace layers {shared} of {recipient.what}, which share weights with "
                'its other layers. Use mode="insert", or another position.'
            )


def _named(recipient: Anatomy) -> str:
    return recipient.what.removeprefix("recipient ")


def report_fit(
    model_class: type[PreTrainedModel], recipient_config: PreTrainedConfig, name: str, spec: DonorSpec, donor: Donor
) -> CompatibilityReport:
    """Like `draw_blueprint`, but every mismatch becomes a line of the report; nothing is raised for it."""
    recipient = Anatomy(model_class, recipient_config, f"recipient {name}")
    lines: list[str] = []
    theirs: Anatomy | None = None
    try:
        refuse_unsupported(recipient)
        theirs = donor_anatomy(donor, recipient)
        lines += mismatches(donor, theirs, recipient)
    except CompatibilityError as error:
        lines += error.mismatches or [str(error)]
    blueprint = Blueprint(
        recipient, (DonorPart(spec, donor, theirs or recipient),), TransplantConfig(recipient=name, donors=[spec])
    )
    try:
        layer_map = blueprint.layer_map()
    except (ConfigurationError, CompatibilityError) as error:
        lines.append(str(error))
    if lines:
        return CompatibilityReport(name, str(donor), spec.position, tuple(lines))
    state = blueprint.built_config
    return CompatibilityReport(
        name, str(donor), spec.position, native=state.native, notes=state.reasons[:8], layer_map=layer_map
    )
