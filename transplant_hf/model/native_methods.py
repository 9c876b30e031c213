"""Methods of torch and Transformers that a model with donors overrides."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from ..architecture.build import initialize, inner_models, settle, thread_contexts
from .active_donors import attach_state
from .load_request import refuse_replaced
from .load_weights import CURRENT

_IDLE = "_transplant_idle"


class NativeMethods:
    """The base class of `TransplantMixin`; its own base at run time is the recipient's class."""

    _transplant: Any = None  # a TransplantState once the model is loaded
    _layers_in_files: Any = None  # LayersInFiles where some layers stay in files

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        loader = CURRENT.get()
        with loader.building(self) if loader else nullcontext(), inner_models(config):
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        settle(self)  # type: ignore[arg-type]

    # -- Loading ---------------------------------------------------------------------------------------------------

    @classmethod
    def get_init_context(cls, dtype: Any, *args: Any, **kwargs: Any) -> list[Any]:
        """The contexts in which Transformers builds a model that it loads, for this thread only."""
        return thread_contexts(super().get_init_context(dtype, *args, **kwargs), dtype)  # type: ignore[misc]

    def initialize_weights(self) -> None:
        """Initialize the weights that were not loaded, for this thread only."""
        initialize(self, recipient_class(type(self)))  # type: ignore[arg-type]

    def load_adapter(self, peft_model_id: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Load a PEFT adapter; see `PreTrainedModel.load_adapter`."""
        native = super().load_adapter  # type: ignore[misc]
        loader = CURRENT.get()
        if loader is None or loader.model is not self:
            return native(peft_model_id, *args, **kwargs)
        # The adapter is stored with the recipient's weights and was trained on the recipient's layers.
        refuse_replaced(self, peft_model_id)
        with self.disable_transplants():
            return native(peft_model_id, *args, **kwargs)

    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, expected_keys: Any = None
    ) -> Any:
        """Transformers' step from files to weights (private there; `tests/test_private_names.py` watches it)."""
        native = recipient_class(type(model))._load_pretrained_model
        loader = CURRENT.get()
        if loader is None or not loader.loads(model):
            return native(model, state_dict, checkpoint_files, load_config, expected_keys)
        return loader.read(
            model,
            state_dict,
            checkpoint_files,
            load_config,
            lambda tensors, files, config, keys=expected_keys: native(model, tensors, files, config, keys),
        )

    @staticmethod
    def _finalize_model_loading(model: Any, load_config: Any, loading_info: Any) -> Any:
        """Transformers' step from weights to a complete model (private there and watched, too)."""
        native = recipient_class(type(model))._finalize_model_loading
        loader = CURRENT.get()
        if loader is None or not loader.loads(model):
            return native(model, load_config, loading_info)
        loader.check_before_finish(loading_info)
        loading_info = native(model, load_config, loading_info)
        loader.check_after_finish(model, loading_info)
        attach_state(model, loader.blueprint)
        return loading_info

    # -- Idle layers: held by the model, but not running -----------------------------------------------------------
    # They are no children of the model: they are not saved, counted or optimized. What is set on the model in the
    # meantime is set on them, too, because they come back.

    @property
    def _transplant_idle(self) -> nn.ModuleDict:
        """Layers that the model holds and that do not run now, at the path that `named_modules` gives."""
        layers = self._transplant.idle_layers() if self._transplant else []
        return nn.ModuleDict({f"layer{number}": layer for number, layer in enumerate(layers)})

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """As in torch, and the modules of layers that do not run now, so that they can be configured.

        Only modules with submodules: gradient checkpointing is set on layers, and adapters wrap weights. A search for
        modules to adapt finds only what runs.
        """
        memo = set() if memo is None else memo
        yield from super().named_modules(memo, prefix, remove_duplicate)  # type: ignore[misc]
        for name, layer in self._transplant_idle.items():
            path = ".".join(filter(None, (prefix, _IDLE, name)))
            for module_path, module in layer.named_modules(memo, path, remove_duplicate):
                if next(module.children(), None) is not None:
                    yield module_path, module

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """As in torch: those of the layers that run now."""
        yield from (pair for pair in super().named_parameters(*args, **kwargs) if _IDLE not in pair[0])  # type: ignore[misc]

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """As in torch: those of the layers that run now."""
        yield from (pair for pair in super().named_buffers(*args, **kwargs) if _IDLE not in pair[0])  # type: ignore[misc]

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        """Move and cast layers that do not run now, too."""
        self._transplant_idle._apply(fn, *args, **kwargs)
        return super()._apply(fn, *args, **kwargs)  # type: ignore[misc]

    def train(self, mode: bool = True) -> Any:
        """As in torch; on layers that do not run now, too."""
        self._transplant_idle.train(mode)
        return super().train(mode)  # type: ignore[misc]

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """As in torch; on layers that do not run now, too."""
        self._transplant_idle.requires_grad_(requires_grad)
        return super().requires_grad_(requires_grad)  # type: ignore[misc]


def recipient_class(model_class: Any) -> Any:
    """Return the recipient's own class of a transplanted model's class; another class is its own."""
    # FSDP2 puts a class of its own before the model's; the native class comes after ours.
    bases = model_class.__mro__
    return bases[bases.index(NativeMethods) + 1] if NativeMethods in bases else model_class
