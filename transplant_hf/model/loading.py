"""The loading hooks of Transformers, used once for each transplant.

`from_pretrained` of the recipient's class does its whole work; in two of its private steps,
`_load_pretrained_model` and `_finalize_model_loading`, the transplant that is being loaded steps in. Which one that
is travels in a context variable, so that the class itself stays like the native one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from transformers import PreTrainedModel

from ..architecture import LayerNames
from ..donor import Donor
from ..errors import CheckpointError
from ..splice import Blueprint, MergedWeights, Provenance, merge_weights, open_checkpoint, renumber_metadata

__all__ = ["FileChecks", "Loading", "active_loading", "loading"]

_active: ContextVar[Loading | None] = ContextVar("transplant_hf_loading", default=None)


def active_loading() -> Loading | None:
    """The load in progress in this context, if any."""
    return _active.get()


@contextmanager
def loading(load: Loading) -> Iterator[Loading]:
    """Let one model be built and loaded as a transplant."""
    token = _active.set(load)
    try:
        yield load
    finally:
        _active.reset(token)


class FileChecks:
    """Compares donor files with their recorded sha256 beside the loading: both wait for the same bytes.

    Args:
        donors: The donors whose files are hashed.
    """

    def __init__(self, donors: Iterable[Donor]) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._checks: list[Future[None]] = [self._pool.submit(donor.verify) for donor in donors]

    def __enter__(self) -> FileChecks:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def result(self) -> None:
        """Wait for every file.

        Raises:
            IntegrityError: The bytes of one differ.
        """
        for check in self._checks:
            check.result()


class Loading:
    """One transplant on its way from files into a model.

    Args:
        blueprint: What is going to run.
        checks: The checks of its donors' files, under way.
        shared: Whether the recipient's weights come from a model in memory, under the model's own names.
    """

    def __init__(self, blueprint: Blueprint, checks: FileChecks, shared: bool = False) -> None:
        self.blueprint = blueprint
        self._checks = checks
        self.shared = shared
        self.model: Any = None
        self._merged: MergedWeights | None = None
        self._names: LayerNames | None = None

    def claim(self, model: Any) -> bool:
        """Take the first model that is built; those it builds inside are its own affair."""
        if self.model is not None:
            return False
        self.model = model
        return True

    def read(
        self, model: PreTrainedModel, state_dict: dict[str, Any] | None, files: list[str] | None, config: Any, load: Any
    ) -> Any:
        """Do the work of `_load_pretrained_model` with the merged weights."""
        path = self.blueprint.recipient.stack_path
        if self.shared:
            return self._read_shared(model, state_dict or {}, path, config, load)
        if state_dict is not None:
            tensors, provenance = state_dict, dict[str, Provenance]()
        else:
            tensors, provenance = open_checkpoint(files or [], config.disable_mmap, config.weights_only)
        self._names = LayerNames(model, path, config.weight_mapping or [])
        self._merged = merge_weights(self.blueprint, tensors, provenance, self._names)
        quantizer = config.hf_quantizer
        if getattr(quantizer, "metadata", None):
            quantizer.metadata = renumber_metadata(quantizer.metadata, self._names, self.blueprint)
        config = dataclasses.replace(config, sharded_metadata={"weight_map": self._merged.weight_map()})
        info, offloaded = load(self._merged.tensors, files, config)
        self._merged.restore_offload_names(offloaded)
        return info, offloaded

    def _read_shared(
        self, model: PreTrainedModel, state_dict: dict[str, Any], path: str, config: Any, load: Any
    ) -> Any:
        """Take the recipient's tensors as they are, then the donors' by their checkpoint names."""
        merged = merge_weights(self.blueprint, state_dict, {}, LayerNames(model, path, []))
        own = {name: tensor for name, tensor in merged.tensors.items() if name not in merged.donor_names}
        donors = {name: merged.tensors[name] for name in merged.donor_names}
        self._names, self._merged = LayerNames(model, path, config.weight_mapping or []), merged
        first, _ = load(own, None, dataclasses.replace(config, weight_mapping=[]))
        second, offloaded = load(donors, None, config)
        second.missing_keys &= first.missing_keys
        second.unexpected_keys |= first.unexpected_keys
        second.mismatched_keys |= first.mismatched_keys
        return second, offloaded

    def check_before_finish(self, info: Any) -> None:
        """Refuse donor tensors that are mis-shaped, not finite or could not be converted.

        Raises:
            CheckpointError: Naming the first ones.
            IntegrityError: A file's sha256 is not the recorded one.
        """
        bad = self._merged.check.not_finite if self._merged else []
        if bad or info.mismatched_keys or info.conversion_errors:
            self._checks.result()  # changed bytes look like any of these
        for number, name in self._donor_layers():
            start = f"{self.blueprint.recipient.stack_path}.{number}."
            for key, found, wanted in sorted(info.mismatched_keys, key=str):
                if key.startswith(start):
                    raise CheckpointError(
                        f"donor {name}: {key.removeprefix(start)} has shape {list(found)}, its layer wants "
                        f"{list(wanted)}."
                    )
            for key, error in sorted(info.conversion_errors.items()):
                if key.startswith(start):
                    raise CheckpointError(f"donor {name}: {key.removeprefix(start)} could not be converted: {error}")
        if bad:
            raise CheckpointError(
                f"donor tensor {bad[0]!r}{f' and {len(bad) - 1} more' if len(bad) > 1 else ''} holds NaN or infinity."
            )

    def check_after_finish(self, info: Any) -> None:
        """Refuse a donor that lacks tensors or brings others, one whose files were changed, and changed modules.

        Raises:
            CheckpointError: Naming the first ones; or weights that a recipient in memory has under other names.
            IntegrityError: A file's sha256 is not the recorded one.
        """
        for number, name in self._donor_layers():
            start = f"{self.blueprint.recipient.stack_path}.{number}."
            for kind, keys in (("lacks", info.missing_keys), ("brings", info.unexpected_keys)):
                wrong = sorted(key.removeprefix(start) for key in keys if key.startswith(start))
                if wrong:
                    listed = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
                    extra = ", which such a layer does not have" if kind == "brings" else ""
                    raise CheckpointError(f"donor {name} {kind} {listed}{extra}.")
        if self.shared and info.missing_keys:
            lacking = sorted(info.missing_keys)
            more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
            raise CheckpointError(
                f"{self.blueprint.recipient.what} has no {lacking[0]}{more} in memory, which its class has: modules of "
                "it were replaced, by a parametrisation or the like. Undo that, then transplant."
            )
        self._checks.result()

    def _donor_layers(self) -> list[tuple[int, str]]:
        return [
            (number, f"{stage.slot.source} (layer {stage.donor_layer} of it)")
            for number, stage in enumerate(self.blueprint.built)
            if stage.donor_layer is not None
        ]
