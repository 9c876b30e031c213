"""Which donors run: the state of a model's transplant, and switching donors off and on.

A donor that is switched off leaves the stack of layers. What else depends on the layers is set by `structure`. The
model is then exactly the model without that donor; no weight is copied.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from ..architecture import decoder_stack
from ..errors import ConfigurationError
from ..layer_map import Slot, Stage
from ..numeric import finite_number
from ..sources import HubOptions
from ..splice import Blueprint, renumber, use_config
from .cache_guard import CacheGuard, Setting
from .calls import BLOCK_END
from .choice import Choice, parse_choice
from .routing import AUTO, routed_choice
from .strength import StrengthHooks
from .structure import Attributes, Structure, structure_of
from .using import CallChoices

logger = logging.get_logger(__name__)

Names = frozenset[str]
_NONE: Names = frozenset()


class TransplantState:
    """The donors of one model: the layers that it holds, running or not. It is `model._transplant`.

    It is made while all layers are in the stack.
    """

    def __init__(self, model: PreTrainedModel, blueprint: Blueprint, layers: Mapping[Stage, nn.Module]) -> None:
        # Weak, because the model owns this object: its memory is released with the last reference to it.
        self._weak_model = weakref.ref(model)
        self.blueprint, self.layers = blueprint, layers
        self.hub = HubOptions()  # how the recipient was reached
        # The recipient's weights as they were loaded by name; `None` where it was in memory before.
        self.as_loaded: Any = None
        # The donors that each open block switches off. Blocks may end in another order than they began.
        self._blocks: dict[object, Names] = {}
        # The disabled donors that the live model is set up for; `None` while all layers are in the stack.
        self._set_for: Names | None = None
        self._structures: dict[Names | None, Structure] = {}
        # The attributes that were last set on layers, if they are not those that the layers were built with.
        self._attributes: dict[Stage, Attributes] = {}
        decoder = model.get_submodule(blueprint.recipient.stack_path.rpartition(".")[0])
        self.guard = CacheGuard.of(decoder) or CacheGuard(decoder)
        self.guard.model = self._weak_model
        self.calls, self.choices = self.guard.calls, self.guard.choices
        # Whether calls may choose donors: the hooks of all inserted donors are then active.
        self._choices_by_call = False
        # Whether donors choose themselves in calls outside `using`.
        self._routed = False
        self.hooks = StrengthHooks(blueprint, layers, self.choices)
        self.update(new_layers=True)
        if blueprint.running(_NONE) == blueprint.built:
            self._set_for = _NONE
        else:
            self._switch(_NONE, "the load")

    @property
    def _model(self) -> PreTrainedModel:
        model = self._weak_model()
        if model is None:
            raise ConfigurationError("the model was garbage-collected; keep a reference to it while you use it.")
        return model

    @property
    def current_choice(self) -> Choice | None:
        """What applies to the code that runs now: the choice of its block, or that of donors that choose themselves."""
        return self.choices.current() or self.guard.find_default()

    @property
    def disabled(self) -> Names:
        """The donors that are switched off now."""
        return self._set_for or _NONE

    def update(self, new_layers: bool = False) -> None:
        """Apply the current setting to the strength hooks and the cache guard."""
        routed = self._routed and not self.disabled.issuperset(self.blueprint.splice.names)
        self.hooks.set(self.blueprint, self.disabled, self._choices_by_call, routed)
        replacing = frozenset(part.name for part in self.blueprint.parts if part.spec.mode == "replace")
        inserted = frozenset(self.blueprint.splice.names) - replacing
        generation = self.guard.setting.generation + new_layers
        setting = Setting(generation, self.disabled, self.blueprint.strengths, inserted, replacing)
        default = functools.partial(routed_choice, self.blueprint, self.disabled) if routed else None
        self.guard.use(setting, self._choices_by_call, default)

    # -- Strengths and choices by call -----------------------------------------------------------------------------

    def set_strengths(self, strengths: Mapping[str, float], composition: str | None = None) -> None:
        """Set strengths by donor name, and the composition."""
        for name in strengths:
            self.blueprint.check_name(name)
        self.hooks.refuse_gates(list(strengths))
        what = "set_composition()" if composition else "set_strength()"
        with self.calls.turn(what):
            blueprint = self.blueprint.with_strengths(strengths, composition)
            with self.calls.alone(what):
                self.blueprint = blueprint
                self.update()

    def route(self) -> None:
        """Let donors choose themselves in calls outside `using`."""
        routed_choice(self.blueprint, self.disabled)  # refuses donors that cannot
        with self.calls.alone('strength="auto"', generations=False):
            self._choices_by_call = self._routed = True
            self.update()

    def choose(self, donors: Any, rows: Sequence[Any] | None, threshold: float) -> tuple[CallChoices, Choice]:
        """Read the arguments of `using`, and prepare the model for choices by call."""
        self.hooks.refuse_gates()
        auto = isinstance(donors, str) and donors == AUTO and rows is None and AUTO not in self.blueprint.splice.names
        if threshold and not auto:
            raise ConfigurationError(f'threshold={threshold} is for using("auto"); a donor that is named is used.')
        if auto:
            choice = routed_choice(self.blueprint, self.disabled, finite_number(threshold, "the threshold"))
        else:
            choice = parse_choice(self.blueprint, donors, rows)
        if self.calls.overdue:
            with self.calls.turn("using()"):  # makes the overdue change
                pass
        choice = dataclasses.replace(choice, replacing=self.guard.setting.replacing - self.disabled)
        if off := sorted(self.disabled & choice.chosen):
            raise ConfigurationError(
                f"donor {off[0]!r} is switched off by disable_transplants(), so that no call can use it meanwhile."
            )
        self.check_stack()
        if not self._choices_by_call:
            # Only the pass in progress has to end: the results of calls of several passes do not change.
            with self.calls.alone("using()", generations=False):
                self._choices_by_call = True
                self.update()
        return self.choices, choice

    # -- Off and on ------------------------------------------------------------------------------------------------

    def off(self, names: Collection[str] | None = None) -> AbstractContextManager[None]:
        """Return a block in which donors are switched off; by default all."""
        selected = self.blueprint.splice.names if names is None else names
        self.check_removable(selected)
        return self._off(frozenset(selected))

    def check_removable(self, names: Collection[str]) -> None:
        """Refuse names that no donor has, and donors whose replaced layers were not loaded."""
        for name in names:
            self.blueprint.check_name(name)
            if self.blueprint.part(name).spec.mode == "replace" and not self.blueprint.keep_replaced:
                raise ConfigurationError(
                    f"donor {name!r} replaced recipient layers, which were not loaded. Load the model with "
                    "keep_replaced=True to be able to switch it off."
                )

    @contextmanager
    def _off(self, names: Names) -> Iterator[None]:
        block, what, began, completed = object(), "disable_transplants()", False, False
        try:
            with self.calls.turn(what):
                self._blocks[block] = names
                self._switch(self._disabled_by_blocks, what)
            began = True
        finally:
            if not began:
                self._forget(block)
        try:
            yield
            completed = True
        finally:
            try:
                self._end(block)
            except ConfigurationError as error:
                if completed:
                    raise
                logger.warning(str(error))  # the caller has to see the error of the block

    def _end(self, block: object) -> None:
        """End a block. If that is not possible now, the next call or change does it."""
        try:
            del self._blocks[block]
            with self.calls.turn(BLOCK_END):
                self._switch_back()
        finally:
            self._forget(block)

    def _forget(self, block: object) -> None:
        self._blocks.pop(block, None)
        if self._disabled_by_blocks != self._set_for:
            self.calls.overdue = self._switch_back

    def _switch_back(self) -> None:
        self._switch(self._disabled_by_blocks, BLOCK_END)

    @property
    def _disabled_by_blocks(self) -> Names:
        return _NONE.union(*self._blocks.values())

    def _switch(self, disabled: Names, what: str) -> None:
        if disabled == self._set_for:
            return
        self.check_stack()
        # Building a structure is slow the first time: calls need not wait for it.
        old, _ = self.structure(self._set_for), self.structure(disabled)
        with self.calls.alone(what):
            self._set(old, disabled)

    def _set(self, old: Structure, disabled: Names) -> None:
        """Set up the live model for donors that are switched off."""
        new = self.structure(disabled)
        for stage, attributes in new.layers.items():
            new.apply_inside(self.layers[stage], stage, self.attributes_of(stage))
            self._attributes[stage] = attributes
        new.apply_outside(self._model, self.blueprint.recipient.stack_path, old)
        layers = [self.layers[stage] for stage in self.blueprint.running(disabled)]
        self._record(layers)
        self._fill(layers)
        self._set_for = disabled
        self.update()

    def _fill(self, layers: Sequence[nn.Module]) -> None:
        """Put exactly these layers into the stack."""
        stack = decoder_stack(self._model, self.blueprint.recipient.stack_path)
        present = set(stack)
        # A new mapping: a pass of this thread may be iterating over the old one, if a hook switches donors.
        stack._modules = {str(number): layer for number, layer in enumerate(layers)}
        for layer in layers:
            # It missed train() and eval() on the stack while it was out.
            if layer not in present and layer.training != stack.training:
                layer.train(stack.training)

    def structure(self, disabled: Names | None) -> Structure:
        """The structure of the model while donors are switched off; `None` for all layers."""
        if disabled is not None and self.blueprint.running(disabled) == self.blueprint.built:
            disabled = None
        if disabled not in self._structures:
            self._structures[disabled] = structure_of(self.blueprint, disabled)
        return self._structures[disabled]

    def attributes_of(self, stage: Stage) -> Attributes:
        """The attributes of a layer now, or when it last ran."""
        return self._attributes[stage] if stage in self._attributes else self.structure(None).layers[stage]

    def idle_layers(self) -> list[nn.Module]:
        """The layers that the model holds and that do not run now."""
        running = self._stages_in_stack()
        return [layer for stage, layer in self.layers.items() if stage not in running]

    def _stages_in_stack(self) -> tuple[Stage, ...]:
        return self.blueprint.built if self._set_for is None else self.blueprint.running(self._set_for)

    def check_stack(self) -> None:
        """Refuse a model whose layers were changed by hand."""
        expected = [self.layers[stage] for stage in self._stages_in_stack()]
        found = list(decoder_stack(self._model, self.blueprint.recipient.stack_path))
        # A layer may be inside a wrapper, as of torch.compile.
        pairs = itertools.zip_longest(found, expected)
        if any(one is not other and (one is None or other not in set(one.modules())) for one, other in pairs):
            raise ConfigurationError(
                f"the decoder layers of this model were changed by hand: the transplant put {len(expected)} there, and "
                f"there are {len(found)} now, or other ones. Donors cannot be switched, changed or saved. Restore the "
                "layers of the transplant. To edit the recipient, delete or insert its layers first, save it and load "
                "it, and add donors after that."
            )

    def _record(self, layers: Sequence[nn.Module]) -> None:
        """Put the hooks with which Transformers records hidden states on layers that lack them, if others have them."""
        path = self.blueprint.recipient.stack_path.split(".")
        # The innermost model around the layers, whose forward records hidden states.
        owners = (self._model.get_submodule(".".join(path[:length])) for length in reversed(range(len(path))))
        recorder = next(owner for owner in owners if isinstance(owner, PreTrainedModel))
        if not getattr(recorder, "_output_capturing_hooks_installed", False):
            return
        missing = [layer for layer in layers if not _is_recorded(layer)]
        if missing:
            # Transformers finds the layers in a model of the same class that holds nothing else.
            kind: Any = type(recorder)
            shell = kind.__new__(kind)
            nn.Module.__init__(shell)
            shell.add_module(path[-1], nn.ModuleList(missing))
            maybe_install_capturing_hooks(shell)

    # -- Other donors ----------------------------------------------------------------------------------------------

    def replace_donors(
        self,
        blueprint: Blueprint,
        layers: Mapping[Slot, nn.Module],
        structure: Structure,
        attributes: Mapping[Slot, Attributes],
    ) -> None:
        """Let the live model run with other donors, all of them switched on."""
        old = self.structure(self._set_for)
        known = {stage.slot: self.attributes_of(stage) for stage in self.layers} | dict(attributes)
        self.blueprint, self.layers = blueprint, {stage: layers[stage.slot] for stage in blueprint.built}
        self._attributes = {stage: known[stage.slot] for stage in self.layers}
        self._structures = {None if blueprint.running(_NONE) == blueprint.built else _NONE: structure}
        self.hooks.remove()
        self.hooks = StrengthHooks(blueprint, self.layers, self.choices)
        self._set_for = None
        self.update(new_layers=True)
        self._set(old, _NONE)

    def remove(self) -> None:
        """Leave only the recipient's layers in the model, for good. Older caches are refused from then on."""
        what = "remove_transplants()"
        with self.calls.alone(what):
            self._switch(frozenset(self.blueprint.splice.names), what)
            self.hooks.remove()
            self.guard.use(Setting(self.guard.setting.generation + 1), always=False)

    # -- Copies ----------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        if self.disabled:
            raise ConfigurationError("a model cannot be copied inside disable_transplants(); copy it outside.")
        if self.choices.current() is not None:
            raise ConfigurationError(
                "a model cannot be copied inside using(...), which would not apply to the copy; copy it outside."
            )
        self.calls.check_copy()
        # A block that another thread is waiting to begin does not belong to the copy.
        return {**vars(self), "_weak_model": self._model, "_blocks": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.guard.model = self._weak_model = weakref.ref(state["_weak_model"])


def _is_recorded(layer: nn.Module) -> bool:
    hooks = (hook for part in layer.modules() for hook in part._forward_hooks.values())
    return any(getattr(hook, "__module__", None) == maybe_install_capturing_hooks.__module__ for hook in hooks)


def state_of(model: Any) -> TransplantState:
    """Return the state of a model's transplant."""
    state = getattr(model, "_transplant", None)
    if not isinstance(state, TransplantState):
        raise ConfigurationError("this model holds no transplant: it was built or loaded without donors.")
    return state


def attach_state(model: Any, blueprint: Blueprint) -> None:
    """Turn a model that has all layers and weights of a blueprint into a transplant."""
    stack = decoder_stack(model, blueprint.recipient.stack_path)
    if not blueprint.built_config.native:
        renumber(stack, blueprint.origins(blueprint.built))
        use_config(model, blueprint.recipient, blueprint.built_config)
    model._transplant = TransplantState(model, blueprint, dict(zip(blueprint.built, stack, strict=True)))
