"""Fields of the recipient's configuration, set and read on a transplant's configuration."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from .errors import BUILD_ERRORS, ConfigurationError
from .numeric import shown

# The fields of a transplant's own configuration. Every other field is one of the recipient's configuration.
OWN_FIELDS = {
    *("recipient", "recipient_revision", "recipient_overrides", "recipient_quantization"),
    *("donors", "format_version", "composition"),
    *("architectures", "tokenizer_class", "transformers_version", "model_type", "auto_map", "name_or_path"),
}
_MISSING = object()


def checked_overrides(found: Any, where: str) -> dict[str, Any]:
    """Return fields of a recipient's configuration, after a check."""
    names = found if isinstance(found, Mapping) else [None]
    wrong = [name for name in names if not isinstance(name, str) or name in OWN_FIELDS or name.startswith("_")]
    if wrong:
        raise ConfigurationError(
            f"recipient_overrides in {where} must be an object with fields of the recipient's configuration, got "
            f"{wrong[0] if isinstance(found, Mapping) else found!r}, which cannot be set there."
        )
    return dict(found)


def is_settable(kind: type, name: str) -> bool:
    """Whether a name can be a field in configurations of a class, and is not a method or class variable."""
    member = inspect.getattr_static(kind, name, _MISSING)
    if isinstance(member, property):
        return member.fset is not None
    if name in {field.name for field in dataclasses.fields(PreTrainedConfig)}:
        return True
    return not hasattr(PreTrainedConfig, name) and not callable(getattr(kind, name, None))


def _field_of(name: str) -> str:
    """The field that an attribute sets; implementations, as of attention, are attributes with an underscore."""
    return "dtype" if name == "torch_dtype" else name.removeprefix("_") if name.endswith("implementation") else name


def _as_field(name: str, value: Any) -> Any:
    if name == "id2label" and isinstance(value, Mapping):
        return {int(number): label for number, label in value.items()}
    return value


class RecipientFields:
    """Stores each field that is set on a transplant's configuration, and is not its own, as one of the recipient's."""

    # Set by `registration`, because this module reads no files.
    _read_field: ClassVar[Callable[[Any, str], Any]] = staticmethod(lambda config, name: _MISSING)
    missing: ClassVar[object] = _MISSING
    recipient_overrides: dict[str, Any]

    def _take_fields(self, fields: Mapping[str, Any], overrides: Mapping[str, Any]) -> None:
        """Store the fields that were passed and are not at their default, and the overrides."""
        defaults = {name: getattr(self, _field_of(name), _MISSING) for name in fields}
        self.recipient_overrides = {}
        for name, value in {**fields, **overrides}.items():
            known = defaults.get(name, _MISSING) if name not in overrides else _MISSING
            if name not in OWN_FIELDS and not name.startswith("_") and _as_field(name, value) != known:
                try:
                    if not is_settable(type(self), name):
                        raise AttributeError("it is not a field of a configuration")
                    setattr(self, name, value)
                except BUILD_ERRORS as error:
                    raise ConfigurationError(
                        f"{name}={shown(value)} cannot be set in a configuration: {error}. Correct it, or "
                        "remove it from config.json or its recipient_overrides."
                    ) from error

    def __setattr__(self, name: str, value: Any) -> None:
        key = _field_of(name)
        if "recipient_overrides" not in self.__dict__ or key in OWN_FIELDS or key.startswith("_"):
            return super().__setattr__(name, value)
        value = _as_field(key, value)
        if key != "num_labels":  # a way to set the two fields of labels
            self.recipient_overrides[key] = value
        if key.endswith("implementation"):
            super().__setattr__(f"_{key}", value)
        elif key != "rope_scaling" and (hasattr(type(self), key) or key == "vocab_size"):
            super().__setattr__(key, value)
        return None

    def __delattr__(self, name: str) -> None:
        """Remove a field that was set, so that the recipient's own value counts again."""
        key = _field_of(name)
        overridden = self.__dict__.get("recipient_overrides", {}).pop(key, _MISSING) is not _MISSING
        names = {name, key, f"_{key}"} if key.endswith("implementation") else {name, key}
        stored = names & self.__dict__.keys()
        for each in stored:
            super().__delattr__(each)
        if not overridden and not stored:
            super().__delattr__(name)

    def __getattr__(self, name: str) -> Any:
        """Read a field of the recipient's configuration, which other tools expect, from files on this machine."""
        if not name.startswith("_") and "recipient_overrides" in self.__dict__:
            found = self.recipient_overrides.get(name, _MISSING)
            found = type(self)._read_field(self, name) if found is _MISSING else found
            if found is not _MISSING:
                return found
        raise AttributeError(
            f"{type(self).__name__} has no attribute {name!r}, and no configuration of the recipient on this machine "
            "has it."
        )

    def _with_overrides(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of a `config.json`, with all overrides under `recipient_overrides`."""
        overrides = self.recipient_overrides
        kept = {name: value for name, value in fields.items() if name not in overrides or name == "vocab_size"}
        written = kept.pop("recipient_overrides", {})
        values = {name: value.to_dict() if hasattr(value, "to_dict") else value for name, value in written.items()}
        return kept | ({"recipient_overrides": values} if values else {})
