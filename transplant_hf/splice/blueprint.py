"""The plan of a transplant, before any weight is read: the origin of every layer, and the configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from ..architecture import Anatomy, LayerOrigin, text_config
from ..architecture.exceptions import SEVERAL_STREAMS
from ..architecture.native import SplicedConfig, candidates, splice_config
from ..compatibility import CompatibilityReport, donor_anatomy, mismatches, refuse_unsupported
from ..config import SIDE_BY_SIDE, STACKED, DonorSpec, TransplantConfig, donor_specs
from ..donor import Donor
from ..donor.record import DonorRecord
from ..donor.tensors import MemoryTensors
from ..errors import CompatibilityError, ConfigurationError
from ..layer_map import RECIPIENT, LayerMap, Placement, Slot, Splice, Stage
from ..numeric import finite_number


@dataclasses.dataclass(frozen=True)
class DonorPart:
    """A donor in a blueprint."""

    spec: DonorSpec
    donor: Donor
    anatomy: Anatomy

    @property
    def name(self) -> str:
        """Its name in this transplant."""
        return str(self.spec.name)


@dataclasses.dataclass(frozen=True, eq=False)
class Blueprint:
    """What runs. It never changes: a change gives another blueprint, so that copies of a model can share it."""

    recipient: Anatomy
    config: TransplantConfig
    donors: tuple[Donor, ...] = ()
    anatomies: tuple[Anatomy, ...] = ()
    keep_replaced: bool = False

    def __deepcopy__(self, memo: dict[int, object]) -> Blueprint:
        return self

    @cached_property
    def parts(self) -> tuple[DonorPart, ...]:
        """The donors with their specs."""
        return tuple(map(DonorPart, self.config.donors, self.donors, self.anatomies))

    @cached_property
    def splice(self) -> Splice:
        """The algebra of positions."""
        placements = [Placement.of(part.spec, part.donor.record.layer_indices) for part in self.parts]
        return Splice(self.recipient.num_layers, placements)

    @cached_property
    def built(self) -> tuple[Stage, ...]:
        """The layers that the model is built with: those that run, and replaced ones that are kept."""
        return tuple(stage for stage in self.splice.stages if self.keep_replaced or stage.runs(()))

    @cached_property
    def built_config(self) -> SplicedConfig:
        """The configuration that the model is built from."""
        return splice_config(self.recipient, self.origins(self.built))

    def native_candidate(self) -> PreTrainedConfig | None:
        """The configuration that most likely builds the layers; `None` if the right one is known."""
        if "built_config" in vars(self):
            return None
        return next(candidates(self.recipient, self.origins(self.built)), None)

    def with_built_config(self, config: PreTrainedConfig | None, rejected: Sequence[str] = ()) -> Blueprint:
        """The same blueprint with a configuration that builds the layers; `None` for another than the candidate."""
        origins, blueprint = self.origins(self.built), self._with()
        found = SplicedConfig(config, True) if config is not None else splice_config(self.recipient, origins, rejected)
        vars(blueprint)["built_config"] = found
        return blueprint

    @cached_property
    def native(self) -> bool:
        """Whether a plain checkpoint of the recipient's class can describe the model."""
        return self.state(()).native and not self.beyond_native

    @property
    def scaled(self) -> tuple[str, ...]:
        """Donors whose strength is not 1."""
        return tuple(part.name for part in self.parts if part.spec.strength != 1.0)

    @property
    def strengths(self) -> tuple[Any, ...]:
        """The composition, and the name and strength of each donor: equal for blueprints that compute the same."""
        return (self.config.composition, *((part.name, part.spec.strength) for part in self.parts))

    @property
    def side_by_side_groups(self) -> tuple[tuple[str, ...], ...]:
        """The donors that run side by side, by name."""
        return self.config.side_by_side_groups

    @property
    def beyond_native(self) -> tuple[str, ...]:
        """Why a plain checkpoint cannot describe the model, apart from its layers."""
        scaled = (f"strength of {', '.join(self.scaled)} is not 1",) if self.scaled else ()
        return (*scaled, *(f"{', '.join(names)} run side by side" for names in self.side_by_side_groups))

    def check_strengths(self) -> None:
        """Refuse strengths and a composition that these donors cannot run with."""
        spread = [part.name for part in self.parts if isinstance(part.spec.position, tuple)]
        if spread and self.config.composition == SIDE_BY_SIDE:
            raise ConfigurationError(
                f"donor {spread[0]!r} is spread over several positions, and cannot run side by side with others. Use "
                f'composition="{STACKED}" (--composition {STACKED}).'
            )
        if self.beyond_native:
            self.refuse_scaling()

    def refuse_scaling(self) -> None:
        """Refuse to scale donors in a model whose layers pass on more than one hidden state."""
        model_type = text_config(self.recipient.config).model_type
        if model_type in SEVERAL_STREAMS:
            raise ConfigurationError(
                f"donors in a {model_type} model run at strength 1, one after another and in every call: "
                f"{SEVERAL_STREAMS[model_type]}. disable_transplants() switches them off."
            )

    def with_strengths(self, strengths: Mapping[str, float], composition: str | None = None) -> Blueprint:
        """The same layers with other strengths by donor name, or with another composition; checks the strengths."""
        # Checked here, too: in a spec, `None` means that no strength is given.
        numbers = {name: finite_number(value, f"strength of donor {name!r}") for name, value in strengths.items()}
        specs = [
            dataclasses.replace(spec, strength=numbers.get(str(spec.name), spec.strength))
            for spec in self.config.donors
        ]
        config = self.config.replaced(donors=specs, composition=composition or self.config.composition)
        blueprint = self._with(config=config)
        blueprint.check_strengths()
        return blueprint

    def with_metadata(self, metadata: Mapping[str, Mapping[str, Any]]) -> Blueprint:
        """The same layers with more metadata by donor name, which the donors are saved with."""
        donors = []
        for part in self.parts:
            merged = {**part.donor.record.metadata, **metadata.get(part.name, {})}
            donors.append(part.donor.replaced(record=dataclasses.replace(part.donor.record, metadata=merged)))
        return self._with(donors=tuple(donors))

    def _with(self, **changes: Any) -> Blueprint:
        """The same layers at the same positions."""
        blueprint = dataclasses.replace(self, **changes)
        # They are costly and do not depend on what differs.
        same = vars(self).keys() & {"splice", "built", "built_config"}
        vars(blueprint).update({name: vars(self)[name] for name in same})
        return blueprint

    def without_tensors(self, name: str) -> Blueprint:
        """The same layers; of a donor in memory only the headers are kept, where the model has its weights."""
        part = self.part(name)
        headers = MemoryTensors({key: tensor.to("meta") for key, tensor in part.donor.tensors().items()})
        described = part.donor.replaced(store=headers)
        return self._with(donors=tuple(described if donor is part.donor else donor for donor in self.donors))

    def with_donors(self, donors: Sequence[DonorPart | tuple[DonorSpec, Donor]], keep_replaced: bool) -> Blueprint:
        """The same recipient with these donors; checks that those which are not parts yet fit."""
        specs = donor_specs([one.spec if isinstance(one, DonorPart) else one[0] for one in donors])
        config = self.config.replaced(donors=specs)
        parts = [one if isinstance(one, DonorPart) else _fit(self.recipient, *one) for one in donors]
        return _blueprint_of(self.recipient, config, parts, keep_replaced)

    def check_name(self, name: str) -> None:
        """Refuse a name that no donor has."""
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
        """The layers that run while some donors are switched off, by source."""
        return self.splice.layer_map(disabled)

    def origins(self, stages: Sequence[Stage]) -> list[LayerOrigin]:
        """Where each layer was built."""
        anatomies = {part.name: part.anatomy for part in self.parts}
        return [LayerOrigin(anatomies.get(s.slot.source, self.recipient), s.slot.index) for s in stages]

    def record_of(
        self, slots: Sequence[Slot], numbers: Sequence[int], name: str | None
    ) -> tuple[DonorRecord, DonorSpec | None]:
        """The record of a donor made of running layers, and its spec if the layers are a donor's."""
        source, indices = slots[0].source, tuple(slot.index for slot in slots)
        if {slot.source for slot in slots} != {source}:
            raise ConfigurationError(
                f"layers {list(numbers)} come from {', '.join(map(str, map(tuple, slots)))}; a donor is made of layers "
                "of one source."
            )
        recipient, commit = self.config.recipient or None, self.config.recipient_revision
        if source == RECIPIENT:
            about: dict[str, Any] = {"source_id": recipient, "source_revision": commit, "name": name}
            return DonorRecord.of_layers(self.recipient.config, layer_indices=indices, **about), None
        part = self.part(source)
        known, source_id = part.donor.record, part.donor.record.source_id or recipient
        record = dataclasses.replace(known, layer_indices=indices, source_id=source_id, name=name or source, files={})
        placement = next(one for one in self.splice.placements if one.name == source)
        position = placement.position_of([placement.layer_indices.index(index) for index in indices])
        return record, None if position is None else dataclasses.replace(part.spec, position=position)


def draw_blueprint(
    model_class: type[PreTrainedModel],
    recipient_config: PreTrainedConfig,
    donors: Sequence[tuple[DonorSpec, Donor]],
    config: TransplantConfig,
    keep_replaced: bool = False,
) -> Blueprint:
    """Check that donors fit a recipient at their positions, and return what is going to run."""
    recipient = Anatomy(model_class, recipient_config, f"recipient {config.recipient or model_class.__name__}")
    refuse_unsupported(recipient)
    return _blueprint_of(recipient, config, [_fit(recipient, spec, donor) for spec, donor in donors], keep_replaced)


def _blueprint_of(
    recipient: Anatomy, config: TransplantConfig, parts: Sequence[DonorPart], keep_replaced: bool
) -> Blueprint:
    donors, anatomies = tuple(part.donor for part in parts), tuple(part.anatomy for part in parts)
    blueprint = Blueprint(recipient, config, donors, anatomies, keep_replaced)
    for placement in blueprint.splice.placements:
        shared = sorted(recipient.sharing_layers & set(placement.replaced))
        if shared:
            raise CompatibilityError(
                f"donor {placement.name!r} would replace layers {shared} of {recipient.what}, which share weights with "
                'its other layers. Use mode="insert" (--mode insert), or another position.'
            )
    blueprint.check_strengths()
    return blueprint


def _fit(recipient: Anatomy, spec: DonorSpec, donor: Donor) -> DonorPart:
    selected = donor.part(spec.layers) if spec.layers is not None else donor
    anatomy = donor_anatomy(selected, recipient)
    found = tuple(mismatches(selected, anatomy, recipient))
    name = recipient.what.removeprefix("recipient ")
    CompatibilityReport(name, str(spec.name), spec.position, found).raise_for_mismatches()
    return DonorPart(spec, selected, anatomy)


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
    config = TransplantConfig(recipient=name, donors=[spec])
    blueprint = Blueprint(recipient, config, (donor,), (theirs or recipient,))
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
