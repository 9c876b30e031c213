"""Registers transplants with the Auto classes; idempotent, quiet, and loads no model code."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

from .config import TransplantConfig
from .heads import Head, auto_classes


class _Loader:
    """The class that an Auto class finds for a `TransplantConfig`; it loads the recipient's own class with donors."""

    config_class = TransplantConfig
    auto_class: Any = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """Load a transplant; see `AutoModelWithTransplant.from_pretrained`."""
        from .model.load import load_transplant

        return load_transplant(cls.auto_class, pretrained_model_name_or_path, *model_args, **kwargs)

    @classmethod
    def _from_config(cls, config: TransplantConfig, **kwargs: Any) -> Any:
        from .model.load import AutoModelWithTransplant

        return AutoModelWithTransplant.from_config(config, cls.auto_class, **kwargs)


def _loader(auto_class: Any) -> type[_Loader]:
    fields = {"auto_class": auto_class, "__module__": __name__, "__doc__": f"A transplant for `{auto_class.__name__}`."}
    return type(Head(auto_class.__name__).loader, (_Loader,), fields)


# For every Auto class, even those without decoder-only models: the error then names the classes that a model has.
LOADERS = {loader.__name__: loader for loader in map(_loader, auto_classes())}


def __getattr__(name: str) -> Any:
    """Find a loader by the name that `modeling_transplant.py` of a repository imports."""
    try:
        return LOADERS[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def _read_field(config: TransplantConfig, name: str) -> Any:
    from .model.local_fields import field_at_hand

    return field_at_hand(config, name)


def register() -> None:
    """Let the Auto classes and `pipeline` load transplants."""
    TransplantConfig._read_field = staticmethod(_read_field)
    AutoConfig.register(TransplantConfig.model_type, TransplantConfig, exist_ok=True)
    for loader in LOADERS.values():
        loader.auto_class.register(TransplantConfig, loader, exist_ok=True)
