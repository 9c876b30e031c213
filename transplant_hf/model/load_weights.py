"""How `from_pretrained` gets the weights of recipient and donors: two steps of Transformers' loader, used as hooks.

`from_pretrained` of the recipient's class does the whole work. In its private steps `_load_pretrained_model` and
`_finalize_model_loading`, the transplant that is being loaded merges and checks the weights. A context variable holds
it, so that the class itself stays like the native one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..architecture import LayerNames
from ..architecture.native import build_failure, layer_differences
from ..display import some_of
from ..donor import Donor
from ..errors import BUILD_ERRORS, CheckpointError, TransplantError
from ..splice import (
    Blueprint,
    MergedWeights,
    Provenance,
    insert_layers,
    merge_weights,
    open_checkpoint,
    renumber_metadata,
)
from .layers_in_files import LayersInFiles

# Returns how many of the first layers stay in their files.
HeldBack = Callable[[Blueprint], int]

# The loader of the transplant that is being loaded in this context, if any.
CURRENT: ContextVar[WeightLoader | None] = ContextVar("transplant_hf_loader", default=None)


@contextmanager
def use_loader(loader: WeightLoader) -> Iterator[None]:
    """Build and load one model as a transplant."""
    token = CURRENT.set(loader)
    try:
        yield
    finally:
        CURRENT.reset(token)


def from_pretrained(
    model_class: Any,
    blueprint: Blueprint,
    name: str | None,
    *args: Any,
    from_memory: bool = False,
    adapt_config: Callable[[PreTrainedConfig], PreTrainedConfig] = lambda config: config,
    held_back: HeldBack | None = None,
    **kwargs: Any,
) -> Any:
    """Load a transplant with `from_pretrained` of its class.

    The model is built from the configuration that most likely describes its layers, and compared with them. Only if
    they differ, other configurations are tried on the meta device.
    """

    def load(loader: WeightLoader, config: PreTrainedConfig) -> Any:
        with use_loader(loader):
            return model_class.from_pretrained(name, *args, config=adapt_config(config), **kwargs)

    with FileChecks(part.donor for part in blueprint.parts) as checks:
        candidate = blueprint.native_candidate()
        if candidate is not None:
            try:
                return load(WeightLoader(blueprint, checks, from_memory, candidate, held_back), candidate)
            except _CandidateError as error:
                blueprint = blueprint.with_built_config(None, error.args)
        spliced = blueprint.built_config
        config = spliced.config if spliced.native else blueprint.recipient.config
        return load(WeightLoader(blueprint, checks, from_memory, held_back=held_back), config)


class _CandidateError(Exception):
    """The model that was built from a candidate configuration has other layers; its arguments are the reasons."""


class FileChecks:
    """Compares donor files with their recorded sha256 in a thread, while the weights are loaded."""

    def __init__(self, donors: Iterable[Donor]) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1)
        self.checks: list[Future[None]] = [self._pool.submit(donor.verify) for donor in donors]

    def __enter__(self) -> FileChecks:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def result(self) -> None:
        """Wait for every file."""
        for check in self.checks:
            check.result()


@dataclasses.dataclass(eq=False)
class WeightLoader:
    """Loads the weights of one transplant."""

    blueprint: Blueprint
    checks: FileChecks
    from_memory: bool = False  # the recipient's weights come from a model in memory, under the model's own names
    candidate: PreTrainedConfig | None = None  # what the model is built from, not yet compared with the layers
    held_back: HeldBack | None = None
    model: Any = None
    _merged: MergedWeights | None = None
    _layers_in_files: LayersInFiles | None = None

    @contextmanager
    def building(self, model: Any) -> Iterator[None]:
        """Build the model: the first one that is built; models inside it are not the loader's."""
        if self.model is not None:
            yield
            return
        self.model = model
        if self.candidate is None:
            yield
            if not self.blueprint.built_config.native:
                insert_layers(model, self.blueprint, self.blueprint.built)
            return
        try:
            yield
        except TransplantError:
            raise
        except BUILD_ERRORS as error:
            raise _CandidateError(build_failure(self.blueprint.recipient, error)) from error
        blueprint = self.blueprint
        reasons = layer_differences(blueprint.recipient, model, blueprint.origins(blueprint.built))
        if reasons:
            raise _CandidateError(*reasons)
        self.blueprint = blueprint.with_built_config(self.candidate)

    def loads(self, model: Any) -> bool:
        """Whether the weights of a model are still to be loaded: adapters are loaded by the same steps, later."""
        return self.model is model and model._transplant is None

    def read(
        self, model: PreTrainedModel, state_dict: dict[str, Any] | None, files: list[str] | None, config: Any, load: Any
    ) -> Any:
        """Do the work of `_load_pretrained_model` with the merged weights."""
        if self.from_memory:
            return self._read_from_memory(model, state_dict or {}, config, load)
        if state_dict is not None:
            tensors, provenance = state_dict, dict[str, Provenance]()
        else:
            tensors, provenance = open_checkpoint(files or [], config.disable_mmap, config.weights_only)
        names = LayerNames(model, self.blueprint.recipient.stack_path, config.weight_mapping or [])
        self._merged = merge_weights(self.blueprint, tensors, provenance, names)
        quantizer = config.hf_quantizer
        if getattr(quantizer, "metadata", None):
            quantizer.metadata = renumber_metadata(quantizer.metadata, names, self.blueprint)
        keys = self._hold_back(model, names, files or [], load, config) if self.held_back is not None else None
        config = dataclasses.replace(config, sharded_metadata={"weight_map": self._merged.weight_map()})
        info, offloaded = load(self._merged.tensors, files, config, *([] if keys is None else [keys]))
        if keys is not None:
            info.missing_keys &= set(keys)
        self._merged.restore_offload_names(offloaded)
        return info, offloaded

    def _hold_back(
        self, model: PreTrainedModel, names: LayerNames, files: list[str], load: Any, config: Any
    ) -> list[str] | None:
        """Take the weights of the first layers out of those to load; returns the names that are left in the model."""
        assert self._merged is not None and self.held_back is not None
        count, path = self.held_back(self.blueprint), self.blueprint.recipient.stack_path
        if count == 0:
            return None

        def load_some(tensors: dict[str, Any], keys: list[str], device: torch.device) -> Any:
            place = {"": device} if device.type != "cpu" else None
            return load(tensors, None, dataclasses.replace(config, device_map=place), keys)[0]

        self._layers_in_files = LayersInFiles(model, path, count, self._merged, names, files, load_some)
        return [name for name in model.state_dict() if name not in self._layers_in_files.own_names]

    def _read_from_memory(self, model: PreTrainedModel, state_dict: dict[str, Any], config: Any, load: Any) -> Any:
        """Load the recipient's tensors under the model's names, then the donors' under their checkpoint names."""
        names = LayerNames(model, self.blueprint.recipient.stack_path, [])
        self._merged = merged = merge_weights(self.blueprint, state_dict, {}, names)
        own = {name: tensor for name, tensor in merged.tensors.items() if name not in merged.donor_names}
        donors = {name: merged.tensors[name] for name in merged.donor_names}
        first, _ = load(own, None, dataclasses.replace(config, weight_mapping=[]))
        second, offloaded = load(donors, None, config)
        second.missing_keys &= first.missing_keys
        second.unexpected_keys |= first.unexpected_keys
        second.mismatched_keys |= first.mismatched_keys
        return second, offloaded

    def check_before_finish(self, info: Any) -> None:
        """Refuse donor tensors that are mis-shaped, not finite or could not be converted."""
        bad = self._merged.not_finite if self._merged else []
        if bad or info.mismatched_keys or info.conversion_errors:
            self.checks.result()  # changed bytes look like any of these
        wrong = [
            (key, f"has shape {list(found)}, its layer needs {list(expected)}.")
            for key, found, expected in sorted(info.mismatched_keys, key=str)
        ]
        wrong += [(key, f"could not be converted: {error}") for key, error in sorted(info.conversion_errors.items())]
        for start, name in self._donor_layers():
            for key, what in wrong:
                if key.startswith(start):
                    raise CheckpointError(f"donor {name}: {key.removeprefix(start)} {what}")
        if self._merged:
            self._merged.refuse_not_finite()

    def check_after_finish(self, model: Any, info: Any) -> None:
        """Refuse a donor with missing or unexpected tensors, or with changed files; free layers that stay in files."""
        for start, name in self._donor_layers():
            for verb, keys in (("lacks", info.missing_keys), ("has unexpected tensors", info.unexpected_keys)):
                wrong = [key.removeprefix(start) for key in keys if key.startswith(start)]
                if wrong:
                    raise CheckpointError(f"donor {name} {verb} {some_of(wrong)}.")
        self.checks.result()
        if self._layers_in_files is not None:
            self._layers_in_files.drop()
            model._layers_in_files = self._layers_in_files

    def _donor_layers(self) -> list[tuple[str, str]]:
        """The start of the names of each donor layer's weights, and what the layer is."""
        path = self.blueprint.recipient.stack_path
        return [
            (f"{path}.{number}.", f"{stage.slot.source} (layer {stage.donor_layer} of it)")
            for number, stage in enumerate(self.blueprint.built)
            if stage.donor_layer is not None
        ]
