"""The content of a transplant's `config.json`: `TransplantConfig` and `DonorSpec`."""

from __future__ import annotations

import copy
import dataclasses
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from types import MappingProxyType
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from .errors import ConfigurationError
from .layer_map import Position
from .numeric import consecutive_layers, finite_number, is_whole, shown, whole_number
from .recipient_fields import OWN_FIELDS, RecipientFields, checked_overrides

FORMAT_VERSION = 1
# The format of a `config.json` with `recipient_overrides`, or a donor at several positions: releases that do not know
# these must not ignore them.
NEWEST_FORMAT = 2
_MODES = ("insert", "replace")
STACKED, SIDE_BY_SIDE = "stacked", "side_by_side"
_PLAIN_NAME = re.compile(r"(?!\.+$)[^/\\\x00-\x1f\x7f]+")


def check_format_version(found: Any, where: str, newest: int = FORMAT_VERSION) -> int:
    """Return a `format_version`, or refuse one that this release cannot read."""
    if found is None:
        return FORMAT_VERSION
    if not is_whole(found) or found < 1:
        raise ConfigurationError(f"format_version in {where} must be a whole number from 1, got {shown(found)}.")
    if found > newest:
        raise ConfigurationError(
            f"{where} has format_version {found}, and this release reads versions up to {newest}. Install a newer "
            "transplant_hf to read it."
        )
    return found


def check_composition(found: Any, where: str) -> str:
    """Return a composition, "stacked" or "side_by_side", or refuse another value."""
    if not isinstance(found, str) or found not in (STACKED, SIDE_BY_SIDE):
        raise ConfigurationError(
            f"composition of {where} must be {STACKED!r} (donors at one position run one after another) or "
            f"{SIDE_BY_SIDE!r} (each gets the same hidden state, and what they add is summed), got {found!r}."
        )
    return str(found)


@dataclasses.dataclass(frozen=True)
class DonorSpec:
    """A donor and its place in the recipient.

    Args:
        donor: Hub id, folder, or "." for the repo that holds this configuration.
        position: How many recipient layers run before the donor, 0..L, in the untouched recipient's numbering; `None`
            is the position that the donor recommends.
        mode: "insert" adds the donor's k layers; "replace" removes recipient layers position .. position+k-1. By
            default "insert"; without a position what the donor recommends.
        revision: Branch, tag or commit of the donor's repo; a commit once saved.
        subfolder: Folder inside the donor's repo.
        name: What the donor is called in the layer map; defaults to the last part of `donor`, and for "." to the name
            in the donor's record.
        layers: A contiguous part of the donor, by its own order 0..k-1; all of it by default.
        strength: Scales what the donor's layers add to the hidden state; 0 is exactly the recipient. By default 1;
            without a position what the donor recommends.

    Raises:
        ConfigurationError: A value of the wrong type.

    Example:
        >>> DonorSpec("user/gpt2-wikitext", position=1).name
        'gpt2-wikitext'
    """

    donor: str
    # Position, mode and strength are `None` only for a donor's recommendation that has not been read yet.
    position: Position = None  # type: ignore[assignment]
    mode: str = None  # type: ignore[assignment]
    revision: str | None = None
    subfolder: str | None = None
    name: str | None = None
    layers: tuple[int, ...] | None = None
    strength: float = None  # type: ignore[assignment]
    # Which of mode, strength and name were not given.
    defaults: frozenset[str] = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        own = vars(self)  # which a frozen object can be changed by
        own["donor"] = _text(self.donor, "donor", 'a Hub id, a folder or "."')
        for field in ("revision", "subfolder", "name"):
            if own[field] is not None:
                own[field] = _text(own[field], f"{field} of donor {self.donor!r}")
        defaults = {name for name in ("mode", "strength", "name") if own[name] is None}
        if (self.donor, self.name) == (".", "donor"):  # before the name of its repository is known
            defaults.add("name")
        own["defaults"] = frozenset(defaults)
        if self.position is not None:
            usual = {"mode": "insert", "strength": 1.0}
            own.update({name: default for name, default in usual.items() if own[name] is None})
            own["position"] = self._checked_position()
        if self.mode is not None and (not isinstance(self.mode, str) or self.mode not in _MODES):
            raise ConfigurationError(f"mode of donor {self.donor!r} must be one of {_MODES}, got {self.mode!r}.")
        if self.strength is not None:
            own["strength"] = finite_number(self.strength, f"strength of donor {self.donor!r}")
            self._check_strength()
        if self.layers is not None:
            what = f"layers of donor {self.donor!r}, counted from 0 in the donor,"
            own["layers"] = tuple(consecutive_layers(self.layers, what, "[0, 1]"))
        if self.name is None:
            last = PurePath(self.subfolder or self.donor).name
            # "." has no last part: the name of the repository is used once it is known.
            own["name"] = last if last not in ("", "..") else "donor"
        elif not _PLAIN_NAME.fullmatch(self.name):
            raise ConfigurationError(
                f"name of donor {self.donor!r} must also be a valid name of a folder, got '{self.name}'."
            )

    def replaced(self, **changes: Any) -> DonorSpec:
        """Return a copy with other values for some fields. A default name follows the new values.

        Args:
            **changes: The fields, such as `position=2`.
        """
        return dataclasses.replace(self, **{**({"name": None} if "name" in self.defaults else {}), **changes})

    def _checked_position(self) -> Position:
        what = f"position of donor {self.donor!r}"
        several = self.position if isinstance(self.position, list | tuple) else [self.position]
        found = tuple(whole_number(value, what) for value in several)
        if not found or list(found) != sorted(set(found)):
            raise ConfigurationError(f"{what} must be a number, or several in ascending order, got {list(found)}.")
        if found[0] < 0:
            raise ConfigurationError(
                f"{what} is {found[0]}; it counts the recipient layers that run before the donor, so it must be in "
                "0..L. Negative positions are not counted from the end."
            )
        return found if len(found) > 1 else found[0]

    def _check_strength(self) -> None:
        if self.mode == "replace" and self.strength != 1.0:
            raise ConfigurationError(
                f"donor {self.donor!r} replaces recipient layers and has strength {self.strength}: a strength "
                "blends an inserted donor with the hidden state that it gets. Use strength 1. Training puts a strength "
                "into the weights of such a donor: strength=0.75 (transplant-hf train --strength 0.75)."
            )

    @classmethod
    def parse(cls, text: str, mode: str | None = None) -> DonorSpec:
        """Read `DONOR@POSITION`, or `DONOR` for the position that the donor recommends.

        Several positions, with commas between, spread a donor through the recipient. A folder may have an @ in its
        name: text that names a folder is a donor without a position.

        Args:
            text: The text.
            mode: "insert" or "replace"; by default what the donor recommends, and with a position "insert".

        Raises:
            ConfigurationError: There is something else than a position behind the @.

        Example:
            >>> [DonorSpec.parse(text).position for text in ("user/law@3", "user/law@10,20,29", "user/law")]
            [3, (10, 20, 29), None]
        """
        donor, at, position = text.rpartition("@")
        if not at or Path(text).is_dir():
            return cls(text, mode=mode)  # type: ignore[arg-type]
        numbers = position.split(",")
        if not donor or not all(number.isascii() and number.isdigit() for number in numbers):
            raise ConfigurationError(
                "a donor is DONOR or DONOR@POSITION, such as user/gpt2-law@10, or user/gpt2-law@4,8,11 for one that is "
                f"spread through the recipient; got {text!r}."
            )
        return cls(donor, tuple(map(int, numbers)), mode)  # type: ignore[arg-type]

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> DonorSpec:
        """Create a spec from JSON fields.

        Args:
            fields: The JSON object.

        Raises:
            ConfigurationError: Unknown or missing fields, or values of the wrong type.
        """
        known = [field.name for field in dataclasses.fields(cls) if field.init]
        if unknown := sorted(set(fields) - set(known)):
            raise ConfigurationError(
                f"unknown donor field {', '.join(map(repr, unknown))} in donor {fields.get('donor', '?')!r}; "
                f"known fields are {', '.join(known)}."
            )
        if missing := [name for name in ("donor", "position") if name not in fields]:
            raise ConfigurationError(f"donor {dict(fields)!r} lacks {' and '.join(map(repr, missing))}.")
        # A configuration says what runs: its defaults are meant.
        return cls(**({"mode": "insert", "strength": 1.0, **fields} if fields["position"] is not None else fields))

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON fields, without those at their default, except position, mode and name."""
        kept: dict[str, Any] = {}
        for name in (field.name for field in dataclasses.fields(self) if field.init):
            value = getattr(self, name)
            default = 1.0 if name == "strength" else None
            if name in ("donor", "position", "mode", "name") or value not in (None, default):
                kept[name] = list(value) if isinstance(value, tuple) else value
        return kept


def _text(value: Any, what: str, kind: str = "text") -> str:
    """Return a name or path as text."""
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str) or not text or "\0" in text:
        note = " (an empty string)" if text == "" else " (it has a null byte)" if isinstance(text, str) else ""
        raise ConfigurationError(f"{what} must be {kind}, got {text!r}{note}.")
    return str(text)


def _checked_quantization(found: Any, where: str) -> dict[str, Any] | None:
    if found is None:
        return None
    known = isinstance(found, Mapping) and isinstance(found.get("config"), Mapping)
    if not known or "quant_method" not in found["config"] or not isinstance(found.get("donors"), list):
        raise ConfigurationError(
            f'recipient_quantization in {where} must be {{"config": {{"quant_method": ...}}, "donors": [...]}}, got '
            f"{found!r}."
        )
    return {"config": dict(found["config"]), "donors": list(found["donors"])}


def gguf_quantization(file: str) -> dict[str, Any]:
    """Return the `recipient_quantization` of a recipient that is read from a GGUF file."""
    return {"config": {"quant_method": "gguf", "gguf_file": file}, "donors": []}


def gguf_file_of(config: TransplantConfig) -> str | None:
    """Return the GGUF file that the recipient is read from, if any."""
    file = (config.recipient_quantization or {}).get("config", {}).get("gguf_file")
    return None if file is None else _text(file, "gguf_file in recipient_quantization")


def donor_specs(donors: Any) -> list[DonorSpec]:
    """Return the specs of donors that are named in any accepted way."""
    if donors is None:
        return []
    if isinstance(donors, Mapping) and not isinstance(donors.get("donor"), str):
        donors = [DonorSpec(_reference(name), position) for name, position in donors.items()]
    elif isinstance(donors, DonorSpec | Mapping | str | os.PathLike):
        donors = [donors]
    elif not isinstance(donors, Iterable) or isinstance(donors, bytes):
        raise ConfigurationError(
            f"donors must be {{donor: position}} or a list of donors or DonorSpec, got {donors!r}."
        )
    specs = []
    for entry in donors:
        if isinstance(entry, DonorSpec):
            specs.append(entry)
        elif isinstance(entry, Mapping):
            specs.append(DonorSpec.from_dict(entry))
        else:
            reference = _reference(entry)
            specs.append(DonorSpec.parse(reference) if isinstance(entry, str) else DonorSpec(reference))
    _check_unique_names(specs)
    return specs


def _reference(donor: Any) -> str:
    if not isinstance(donor, str | os.PathLike):
        raise ConfigurationError(f"a donor must be a Hub id, a folder, a DonorSpec or a JSON object, got {donor!r}.")
    return os.fspath(donor)


def _check_unique_names(specs: list[DonorSpec]) -> None:
    seen, rename = dict[str | None, str](), "Give it another name, DonorSpec(..., name=...), or rename its folder."
    for spec in specs:
        which = f"{spec.donor!r} at position {spec.position}"
        if spec.name == "recipient":
            raise ConfigurationError(f"donor {which} cannot be named 'recipient'. {rename}")
        if spec.name in seen:
            raise ConfigurationError(f"two donors are named {spec.name!r}: {seen[spec.name]} and {which}. {rename}")
        seen[spec.name] = which


class TransplantConfig(RecipientFields, PreTrainedConfig):
    """A recipient and its donors.

    Args:
        recipient: Hub id or folder; a relative folder is relative to this `config.json`.
        recipient_revision: Branch, tag or commit of the recipient; a commit once saved.
        donors: `DonorSpec` objects or their JSON, applied together, in this order.
        format_version: The version of this file format.
        composition: How donors that are inserted at one position run: "stacked", one after another, or
            "side_by_side", where each gets the same hidden state h and the output is h + sum_i s_i (d_i(h) - h).
        recipient_overrides: Fields of the recipient's configuration that replace those of the recipient's own
            `config.json`. Every field that is set on this object, and is not its own, becomes one.
        recipient_quantization: How the recipient is quantized while it is loaded: `"config"`, a `quantization_config`
            with the recipient's own names, and `"donors"`, the donors that are quantized too. An argument
            `quantization_config` replaces it; `None` loads in full precision. For a GGUF file, `"config"` names it,
            `{"quant_method": "gguf", "gguf_file": name}`.
        vocab_size: The recipient's, for tools that read it without loading the recipient.
        **kwargs: The arguments of `PreTrainedConfig`, and fields of the recipient's configuration.

    Raises:
        ConfigurationError: Unknown donor fields, two donors of one name, an unknown composition, or a newer format.

    Example:
        >>> config = TransplantConfig(recipient="openai-community/gpt2", donors={"user/law": 1})
        >>> config.donors[0].position
        1
        >>> config.use_cache = False
        >>> config.recipient_overrides
        {'use_cache': False}
    """

    model_type = "transplant"
    # Empty, for libraries that read it of every architecture that is not in Transformers itself, as TRL does.
    auto_map: ClassVar[Mapping[str, str]] = MappingProxyType({})

    def __init__(
        self,
        recipient: str = "",
        recipient_revision: str | None = None,
        donors: Any = None,
        format_version: int | None = FORMAT_VERSION,
        composition: str = STACKED,
        recipient_overrides: Mapping[str, Any] | None = None,
        recipient_quantization: Mapping[str, Any] | None = None,
        vocab_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        # Checked first: the lines below might misread the fields of a newer format.
        where = kwargs.get("name_or_path") or "config.json"
        self.format_version = check_format_version(format_version, where, NEWEST_FORMAT)
        self.composition = check_composition(composition, kwargs.get("name_or_path") or "the transplant")
        self.recipient = _text(recipient, f"recipient in {where}", "a Hub id or a folder") if recipient != "" else ""
        self.recipient_revision = (
            _text(recipient_revision, f"recipient_revision in {where}") if recipient_revision is not None else None
        )
        self.donors: list[DonorSpec] = donor_specs(donors)
        self.recipient_quantization = _checked_quantization(recipient_quantization, where)
        # Without it, `pipeline` uses native classes of the task.
        kwargs.setdefault("architectures", ["TransplantForCausalLM"])
        # It names code for programs that did not import this class; it is written again with each repository.
        kwargs.pop("auto_map", None)
        overrides = checked_overrides(recipient_overrides or {}, where)
        super().__init__(**{name: value for name, value in kwargs.items() if name in OWN_FIELDS})
        if vocab_size is not None:
            self.vocab_size = vocab_size
        self._take_fields(kwargs, overrides)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "donors" and not (isinstance(value, list) and all(isinstance(spec, DonorSpec) for spec in value)):
            value = donor_specs(value)
        super().__setattr__(name, value)

    @property
    def side_by_side_groups(self) -> tuple[tuple[str, ...], ...]:
        """The names of inserted donors that run side by side: at one position, without a replacing donor between."""
        if self.composition != SIDE_BY_SIDE:
            return ()
        runs: dict[Position, list[list[str]]] = {}
        for spec in self.donors:
            here = runs.setdefault(spec.position, [[]])
            if spec.mode == "insert":
                here[-1].append(str(spec.name))
            else:
                here.append([])
        return tuple(tuple(run) for here in runs.values() for run in here if len(run) > 1)

    def replaced(self, **changes: Any) -> TransplantConfig:
        """Return a copy with other values for some fields.

        Args:
            **changes: The fields, such as `donors=`.
        """
        made = copy.deepcopy(self)
        for name, value in changes.items():
            setattr(made, name, value)
        return made

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Do nothing: saving must not copy the code of this installed class."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Create the configuration; with `return_unused_kwargs=True`, all keyword arguments come back unused.

        They belong to the recipient's configuration (`attn_implementation`, `num_labels`, ...).
        """
        unused = kwargs.pop("return_unused_kwargs", False)
        named = {"name_or_path": kwargs.pop("name_or_path")} if "name_or_path" in kwargs else {}
        # Other names with an underscore are about the call and the repository, not about the recipient.
        kwargs = {
            name: value for name, value in kwargs.items() if not name.startswith("_") or name.endswith("implementation")
        }
        config = super().from_dict(config_dict, **named)
        if unused:
            return config, kwargs
        for name, value in kwargs.items():
            if not (name in ("dtype", "torch_dtype") and value == "auto"):
                setattr(config, name, value)
        return config

    def to_dict(self) -> dict[str, Any]:
        """Return the content of `config.json`, with donors as JSON objects, without fields at their default."""
        fields = super().to_dict() | {"donors": [spec.to_dict() for spec in self.donors]}
        for name, default in (("composition", STACKED), ("recipient_quantization", None)):
            if fields.get(name) == default:
                fields.pop(name, None)
        spread = any(isinstance(spec.position, tuple) for spec in self.donors)
        newest = self.recipient_overrides or self.recipient_quantization or spread
        return self._with_overrides(fields) | {"format_version": NEWEST_FORMAT if newest else FORMAT_VERSION}
