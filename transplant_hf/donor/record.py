"""`donor_config.json`: where a donor's layers came from, what its author recorded, and the sha256 of its files."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from ..architecture.follow import RUNTIME
from ..config import FORMAT_VERSION, check_format_version
from ..errors import CheckpointError, ConfigurationError, IntegrityError
from ..numeric import ascending_layers, is_number, plain_number, shown
from ..storage import read_json, verified_sha256, write_json
from .tensors import safe_name

DONOR_CONFIG = "donor_config.json"

_AGAIN = "Download it again (force_download=True, or remove it from the cache)"
_MAX_BITS = 4096  # of an integer in metadata; Python does not print one of more than 4,300 digits


@dataclasses.dataclass(frozen=True)
class FileStamp:
    """The recorded bytes of one weight file."""

    sha256: str
    size: int

    def check_size(self, path: Path, where: str = "") -> None:
        """Compare the file's size."""
        size = path.stat().st_size if path.exists() else None
        if size != self.size:
            problem = "is missing" if size is None else f"has {size} bytes"
            raise IntegrityError(f"{_describe(path, where)} {problem}, {DONOR_CONFIG} records {self.size}. {_AGAIN}.")

    def check_bytes(self, path: Path, where: str = "") -> None:
        """Compare the sha256."""
        self.check_size(path, where)
        sha256 = verified_sha256(path)
        if sha256 != self.sha256:
            raise IntegrityError(
                f"{_describe(path, where)} has sha256 {sha256}, {DONOR_CONFIG} records {self.sha256}: its bytes were "
                f"changed. {_AGAIN}, or ask its author."
            )


@dataclasses.dataclass(frozen=True)
class DonorRecord:
    """The content of `donor_config.json`.

    Args:
        model_type: The source model's type, such as "gpt2".
        source_config: The source model's own configuration, as its `config.json` has it.
        layer_indices: The donor layers' numbers in the source model, in ascending order; consecutive, unless the donor
            is spread through the recipient.
        source_id: Hub id or folder of the source model, if known.
        source_revision: Its commit, if known.
        name: The donor's name.
        metadata: What the author recorded, unchanged.
        files: sha256 and size of every weight file.
        signature: What its domain looks like, as `Signature.to_dict` writes it, if it was signed.
    """

    model_type: str
    source_config: Mapping[str, Any]
    layer_indices: tuple[int, ...]
    source_id: str | None = None
    source_revision: str | None = None
    name: str | None = None
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    files: Mapping[str, FileStamp] = dataclasses.field(default_factory=dict)
    signature: Mapping[str, Any] | None = None

    @classmethod
    def of_layers(cls, config: PreTrainedConfig, **known: Any) -> DonorRecord:
        """Create the record of layers of a model.

        Args:
            config: The model's configuration.
            **known: The other fields.
        """
        fields = {name: value for name, value in config.to_dict().items() if name not in RUNTIME}
        return cls(config.model_type, fields, **known)

    @classmethod
    def read(cls, folder: Path) -> DonorRecord:
        """Read `donor_config.json`.

        Args:
            folder: The donor's folder.
        """
        path = folder / DONOR_CONFIG
        config = folder / "config.json"
        kind = read_json(config, "config.json").get("model_type") if config.exists() and not path.exists() else None
        if kind not in (None, "transplant"):
            raise CheckpointError(
                f"{folder} is a {kind} model, not a donor: it has no {DONOR_CONFIG}. Name a donor, or make one from "
                "this model's layers with transplant-hf extract."
            )
        content = read_json(path, "the donor's record")
        check_format_version(content.get("format_version"), str(path))
        source = content.get("source") or {}
        try:
            return cls(
                model_type=_typed(content, "model_type", str),
                source_config=_typed(content, "source_config", dict),
                layer_indices=tuple(ascending_layers(_typed(content, "layer_indices", list), "layer_indices")),
                source_id=source.get("id"),
                source_revision=source.get("revision"),
                name=_typed(content, "name", str) if content.get("name") is not None else None,
                metadata=_typed(content, "metadata", dict) if content.get("metadata") is not None else {},
                files={
                    safe_name(name): FileStamp(_typed(stamp, "sha256", str), _typed(stamp, "size", int))
                    for name, stamp in (content.get("files") or {}).items()
                },
                signature=_typed(content, "signature", dict) if content.get("signature") is not None else None,
            )
        except (KeyError, TypeError, AttributeError, ConfigurationError) as error:
            raise CheckpointError(f"{path} is malformed: {error}") from error

    def write(self, folder: Path) -> None:
        """Write `donor_config.json`.

        Args:
            folder: The donor's folder.
        """
        write_json(
            folder / DONOR_CONFIG,
            {
                "format_version": FORMAT_VERSION,
                "name": self.name,
                "model_type": self.model_type,
                "source": {"id": self.source_id, "revision": self.source_revision},
                "layer_indices": list(self.layer_indices),
                "metadata": plain_json(self.metadata, "donor metadata"),
                "files": {name: dataclasses.asdict(stamp) for name, stamp in sorted(self.files.items())},
                "source_config": dict(self.source_config),
                **({"signature": dict(self.signature)} if self.signature is not None else {}),
            },
        )


def without_sha256(record: DonorRecord, names: Collection[str], from_hub: bool) -> list[str]:
    """Return which of these weight files should have a recorded sha256 and have none."""
    # A record of the user's own making, in a local folder, may name no file at all.
    return sorted(set(names) - set(record.files)) if record.files or from_hub else []


def _describe(path: Path, where: str) -> str:
    """Name a file, with its repository if it has one."""
    return f"{path.name} of {where} ({path})" if where and where != str(path.parent) else str(path)


def plain_json(value: Any, what: str) -> Any:
    """Return a value that JSON can hold: numbers, arrays and tensors of numpy and torch as Python's, paths as text."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        if wrong := [key for key in value if not isinstance(plain_number(key), str | int | float | None)]:
            raise CheckpointError(f"{what} has the key {wrong[0]!r}, which JSON cannot hold; remove that entry.")
        return {plain_number(key): plain_json(item, f"{what}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(item, what) for item in value]
    printed = not isinstance(value, int) or value.bit_length() <= _MAX_BITS
    if value is not None and not (isinstance(value, str | bool | int) and printed) and not is_number(value):
        raise CheckpointError(f"{what} holds {shown(value)}, which JSON cannot hold; remove that entry.")
    return value


def _typed(content: Mapping[str, Any], key: str, kind: type) -> Any:
    value = content[key]
    if not isinstance(value, kind):
        raise TypeError(f"{key} must be of type {kind.__name__}, got {shown(value)}")
    return value
