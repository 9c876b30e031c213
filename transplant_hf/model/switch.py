"""Turn donors off and on: the very modules, numbers and configuration of the model without them, no weight copied.

What must change is found by looking: the structure of both states is built on the meta device, and what differs
between the two is set on the live model.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from ..architecture import decoder_stack
from ..architecture.build import build_on_meta
from ..architecture.fingerprint import is_structure, plain
from ..errors import ConfigurationError
from ..layer_map import RECIPIENT, Stage
from ..splice import Blueprint, insert_layers, renumber, use_config
from ..splice.surgery import outer_modules
from .cache_guard import CacheGuard, Here
from .calls import BLOCK_END, Calls
from .strength import Dials

__all__ = ["Attributes", "Structure", "Switch", "structure_of"]

logger = logging.get_logger(__name__)

Names = frozenset[str]
# By the path of a module: its attributes.
Attributes = Mapping[str, Mapping[str, Any]]
_NOTHING: Names = frozenset()
_RECORDED = "_output_capturing_hooks_installed"


@dataclasses.dataclass(frozen=True)
class Structure:
    """The attributes of one state: by module outside the layers, by layer and module inside, by configuration."""

    outer: Attributes
    inner: Mapping[Stage, Attributes]
    configs: Mapping[str, PreTrainedConfig]


class Switch:
    """Turns donors of one model off and on.

    Args:
        model: The model, holding all its layers.
        blueprint: What it was built from.
        layers: Its layers by their stage.
        dials: What its donors do with what they add.
        after: The switch of the model as it was, where donors of a live model change; all of them are on.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blueprint: Blueprint,
        layers: Mapping[Stage, nn.Module],
        dials: Dials,
        after: Switch | None = None,
    ) -> None:
        # Weak, as all of it hangs on the model: a model that is let go of is freed at once.
        self._weak_model = weakref.ref(model)
        self._blueprint = blueprint
        self._layers = layers
        self._dials = dials
        replacing = frozenset(part.name for part in blueprint.parts if part.spec.mode == "replace")
        inserted = frozenset(blueprint.splice.names) - replacing
        self._here = Here(dials.requests, dials.settings, inserted=inserted, replacing=replacing)
        # By a key of their own: blocks may end in another order than they began (generators, callbacks).
        self._asked: dict[object, Names] = {}
        # Which layers the live model is set up for; `None` while it holds all it was built with.
        self._set_for: Names | None = None
        self._structures: dict[Names | None, Structure] = {}
        # What was last set on layers, where that is not what they were built with.
        self._worn: dict[Stage, Attributes] = {}
        self._unrecorded: set[nn.Module] | None = None
        decoder = model.get_submodule(blueprint.recipient.stack_path.rpartition(".")[0])
        guard = CacheGuard.of(decoder)
        if guard is not None:
            self._here.plan = guard.here.plan + 1
            guard.here = self._here
        self._guard = guard or CacheGuard(decoder, self._here)
        if after is not None:
            self._follow(after)

    @property
    def _model(self) -> PreTrainedModel:
        model = self._weak_model()
        if model is None:
            raise ConfigurationError("the model of this transplant is gone; keep a reference to it while it is used.")
        return model

    @property
    def calls(self) -> Calls:
        """The calls that are under way."""
        return self._guard.calls

    @property
    def disabled(self) -> Names:
        """The donors that are switched off now."""
        return self._here.disabled

    def settle(self) -> None:
        """Put layers aside that do not run when every donor does."""
        if self._blueprint.running(_NOTHING) == self._blueprint.built:
            self._set_for = _NOTHING
        else:
            self._go(_NOTHING, "the load")

    def _follow(self, old: Switch) -> None:
        """Take over what another switch knows of the layers that this one holds too."""
        old._note_recorded()
        stages = {layer: stage for stage, layer in old._layers.items()}
        self._worn = {stage: old.worn(stages[layer]) for stage, layer in self._layers.items() if layer in stages}
        if old._unrecorded is not None:
            self._unrecorded = {one for one in self._layers.values() if one not in stages or one in old._unrecorded}

    def take_over(self, before: Structure, after: Structure, worn: Mapping[Stage, Attributes]) -> None:
        """Let a live model, which was set up for other donors, run with these, all of them on.

        Args:
            before: What it is set up for.
            after: What it is going to be.
            worn: What is set on layers that are new in it.
        """
        self._worn.update(worn)
        self._structures[_NOTHING] = after
        self._set(before, _NOTHING)

    def structure(self) -> Structure:
        """What the live model is set up for now."""
        return self._structure(self._set_for)

    @contextmanager
    def off(self, names: Collection[str]) -> Iterator[None]:
        """Switch donors off inside a `with` block; blocks nest."""
        block, what, began, left = object(), "disable_transplants()", False, False
        try:
            with self.calls.turn(what):
                self._asked[block] = frozenset(names)
                self._go(self._wished, what)
            began = True
        finally:
            if not began:
                self._forget(block)
        try:
            yield
            left = True
        finally:
            try:
                self._end(block)
            except ConfigurationError as error:
                if left:
                    raise
                logger.warning(str(error))  # what went wrong in the block is what its caller has to see

    def _end(self, block: object) -> None:
        """End a block; where that is not possible now, the next call or change does it."""
        try:
            del self._asked[block]
            with self.calls.turn(BLOCK_END):
                self._resume()
        finally:
            self._forget(block)

    def _forget(self, block: object) -> None:
        self._asked.pop(block, None)
        if self._wished != self._set_for:
            self.calls.overdue = self._resume

    def _resume(self) -> None:
        self._go(self._wished, BLOCK_END)

    @property
    def _wished(self) -> Names:
        return _NOTHING.union(*self._asked.values())

    def remove(self) -> None:
        """Leave the recipient alone in the model, for good; caches from before are refused from then on."""
        what = "remove_transplants()"
        with self.calls.alone(what):
            self._go(frozenset(self._blueprint.splice.names), what)
            self._dials.close()
            self._guard.here = Here(self._here.requests, plan=self._here.plan + 1)

    def leave(self) -> None:
        """Release a model that no donor was added to."""
        self._guard.leave()

    def check(self, names: Collection[str]) -> None:
        """Refuse names that are no donors, and donors whose replaced layers are gone.

        Raises:
            ConfigurationError: Saying which.
        """
        for name in names:
            self._blueprint.check_name(name)
            part = self._blueprint.part(name)
            if part.spec.mode == "replace" and not self._blueprint.keep_replaced:
                raise ConfigurationError(
                    f"donor {name!r} replaced recipient layers, which were not loaded. Load the model with "
                    "keep_replaced=True to be able to switch it off."
                )

    def sidelined(self) -> list[nn.Module]:
        """Layers the model holds that are not among its modules now."""
        running = self._blueprint.running(self._set_for or _NOTHING) if self._set_for is not None else self._layers
        return [layer for stage, layer in self._layers.items() if stage not in running]

    def check_stack(self) -> None:
        """Refuse a model whose layers are not those that the transplant put there.

        Raises:
            ConfigurationError: With both numbers of layers.
        """
        running = self._blueprint.built if self._set_for is None else self._blueprint.running(self._set_for)
        wanted = [self._layers[stage] for stage in running]
        found = list(decoder_stack(self._model, self._blueprint.recipient.stack_path))
        # A layer may be inside a wrapper, as of torch.compile.
        pairs = itertools.zip_longest(found, wanted)
        if any(one is not other and (one is None or other not in set(one.modules())) for one, other in pairs):
            raise ConfigurationError(
                f"the decoder layers of this model were changed by hand: the transplant put {len(wanted)} there, and "
                f"there are {len(found)} now, or other ones. Switching donors, changing them and saving go by the "
                "layers that the transplant put there. Put those back; or delete and insert layers in the recipient, "
                "save it and load it, before donors go in."
            )

    def _go(self, disabled: Names, what: str) -> None:
        if disabled == self._set_for:
            return
        self.check_stack()
        old, _ = self._structure(self._set_for), self._structure(disabled)  # slow the first time: calls need not wait
        with self.calls.alone(what):
            self._note_recorded()
            self._set(old, disabled)

    def _set(self, old: Structure, disabled: Names) -> None:
        self._set_attributes(old, self._structure(disabled))
        layers = [self._layers[stage] for stage in self._blueprint.running(disabled)]
        self._record(layers)
        self._fill(layers)
        self._dials.without(disabled)
        self._set_for = self._here.disabled = disabled
        self.watch()

    def watch(self) -> None:
        """Watch caches where the model runs otherwise than it was loaded, or may in some calls."""
        self._here.settings = self._dials.settings
        self._guard.always = self._dials.open

    def _fill(self, layers: Sequence[nn.Module]) -> None:
        """Let exactly these layers run."""
        stack = decoder_stack(self._model, self._blueprint.recipient.stack_path)
        present = set(stack._modules.values())
        # A new mapping: a pass of this very thread may be going through the old one, if a hook switches donors in it.
        stack._modules = {str(number): layer for number, layer in enumerate(layers)}
        for layer in layers:
            # It missed train() and eval() while it was aside.
            if layer not in present and layer.training != stack.training:
                layer.train(stack.training)

    def _note_recorded(self) -> None:
        """Remember which layers lack the hooks that record hidden states: Transformers puts them where it looks."""
        if self._unrecorded is None and getattr(self._recorder(), _RECORDED, False):
            running = set(decoder_stack(self._model, self._blueprint.recipient.stack_path))
            self._unrecorded = {layer for layer in self._layers.values() if layer not in running}

    def _record(self, layers: Sequence[nn.Module]) -> None:
        """Have those hooks put on layers that come in without them, and on no other a second time."""
        lacking = [layer for layer in layers if layer in (self._unrecorded or ())]
        if lacking:
            recorder = self._recorder()
            self._fill(lacking)
            setattr(recorder, _RECORDED, False)
            maybe_install_capturing_hooks(recorder)
            self._unrecorded = (self._unrecorded or set()) - set(lacking)

    def _recorder(self) -> Any:
        """The innermost model around the layers, whose forward records hidden states."""
        owners: list[Any] = [self._model]
        for part in self._blueprint.recipient.stack_path.split(".")[:-1]:
            owners.append(getattr(owners[-1], part))
        return next(owner for owner in reversed(owners) if isinstance(owner, PreTrainedModel))

    def __deepcopy__(self, memo: dict[int, Any]) -> Switch:
        new = Switch.__new__(Switch)
        memo[id(self)] = new
        new.__setstate__({name: copy.deepcopy(value, memo) for name, value in self.__getstate__().items()})
        return new

    def __getstate__(self) -> dict[str, Any]:
        if self.disabled:
            raise ConfigurationError("a model cannot be copied inside disable_transplants(); copy it outside.")
        self.calls.check_copy()
        # A block that waits for its begin in another thread is none of the copy.
        return {**vars(self), "_weak_model": self._model, "_asked": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._weak_model = weakref.ref(state["_weak_model"])

    def _structure(self, disabled: Names | None) -> Structure:
        if disabled not in self._structures:
            self._structures[disabled] = structure_of(self._blueprint, disabled)
        return self._structures[disabled]

    def _set_attributes(self, old: Structure, new: Structure) -> None:
        live = outer_modules(self._model, self._blueprint.recipient.stack_path)
        for path, attributes in new.outer.items():
            if path in live:
                _set_differing(live[path], old.outer.get(path, {}), attributes)
        for stage, modules in new.inner.items():
            inside = dict(self._layers[stage].named_modules())
            for path, attributes in modules.items():
                if path in inside:
                    _set_differing(inside[path], self.worn(stage).get(path, {}), attributes)
            self._worn[stage] = modules
        for path, config in new.configs.items():
            if path in live and path in old.configs:
                _turn_config(_config(live[path]), old.configs[path], config)

    def worn(self, stage: Stage) -> Attributes:
        """What is set on a layer now, or was when it last ran."""
        known = self._worn.get(stage)
        return self._structure(None).inner[stage] if known is None else known


def structure_of(blueprint: Blueprint, disabled: Names | None = _NOTHING) -> Structure:
    """Look at one state of a blueprint, built on the meta device.

    Args:
        blueprint: What runs.
        disabled: The donors that are switched off; `None` for all layers that the model holds.
    """
    stages = blueprint.built if disabled is None else blueprint.running(disabled)
    model = _on_meta(blueprint, disabled, stages)
    path = blueprint.recipient.stack_path
    outer = outer_modules(model, path)
    stack = decoder_stack(model, path)
    return Structure(
        {name: _attributes(module) for name, module in outer.items()},
        {
            stage: {name: _attributes(module) for name, module in layer.named_modules()}
            for stage, layer in zip(stages, stack, strict=True)
        },
        {name: _config(module) for name, module in outer.items() if isinstance(_config(module), PreTrainedConfig)},
    )


def _config(module: nn.Module) -> Any:
    return vars(module).get("config")


def _on_meta(blueprint: Blueprint, disabled: Names | None, stages: tuple[Stage, ...]) -> PreTrainedModel:
    recipient = blueprint.recipient
    spliced = blueprint.built_config if disabled is None else blueprint.state(disabled)
    if spliced.native:
        return build_on_meta(recipient.model_class, spliced.config)
    model = build_on_meta(recipient.model_class, recipient.config)
    if any(stage.slot.source != RECIPIENT for stage in stages) or len(stages) != recipient.num_layers:
        with torch.device("meta"):
            insert_layers(model, blueprint, stages)
        renumber(decoder_stack(model, recipient.stack_path), blueprint.origins(stages))
        use_config(model, recipient, spliced)
    return model


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(module).items()
        if is_structure(name) and not isinstance(value, PreTrainedConfig | nn.Module)
    }


def _set_differing(module: nn.Module, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    for name, value in new.items():
        if name in old and plain(old[name]) != plain(value):
            setattr(module, name, copy.deepcopy(value))


def _turn_config(live: PreTrainedConfig, old: PreTrainedConfig, new: PreTrainedConfig) -> None:
    """Set what differs between two configurations on the one that the live model reads."""
    if live.__class__ is not new.__class__ and old.__class__ is not new.__class__:
        live.__class__ = new.__class__
    for name in {*vars(old), *vars(new)}:
        before, after = vars(old).get(name), vars(new).get(name)
        if isinstance(before, PreTrainedConfig) or isinstance(after, PreTrainedConfig) or before == after:
            continue
        if name in vars(new):
            live.__dict__[name] = copy.deepcopy(after)
        else:
            live.__dict__.pop(name, None)
