"""What other tools read of a transplant's configuration, answered from files that are on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from ..architecture import apply_overrides
from ..config import DonorSpec, TransplantConfig
from ..donor import DONOR_CONFIG, DonorRecord
from ..donor.companions import at_hand
from ..errors import BUILD_ERRORS, TransplantError
from ..sources import Source, points_to_folder

_PLAIN = (bool, int, float, str, type(None))
# What Transformers asks every configuration for, to find parts or code in it: a transplant's has none.
_OF_PARTS = {"quantization_config", "auto_map", "text_config", "text_encoder", "decoder", "generator"}


def field_at_hand(config: TransplantConfig, name: str) -> Any:
    """Return a field of the recipient's configuration; the number of layers is that of the layers that run."""
    if name in _OF_PARTS:
        return config.missing
    try:
        home = _home(config)
        found, exact = _recipient(config, home)
        if found is None:
            return config.missing
        text = found.get_text_config(decoder=True)
        words = text.attribute_map
        value: Any = getattr(found, name) if hasattr(found, name) else getattr(text, name, config.missing)
        if words.get(name, name) == words.get("num_hidden_layers", "num_hidden_layers") and value is not config.missing:
            added = [_num_layers(spec, home) for spec in config.donors if spec.mode == "insert"]
            return value + sum(n for n in added if n) if exact and None not in added else config.missing
    except (TransplantError, OSError, *BUILD_ERRORS):  # unreadable: loading says what is wrong
        return config.missing
    return value if isinstance(value, _PLAIN) or name.endswith("token_id") else config.missing


def _home(config: TransplantConfig) -> Source | None:
    """Where the configuration was read from."""
    name = config.name_or_path
    folder = at_hand(name, None) if name else None
    commit = None if folder is None or Path(str(name)).expanduser().is_dir() else folder.name
    return None if folder is None else Source(str(name), folder, commit)


def _recipient(config: TransplantConfig, home: Source | None) -> tuple[PreTrainedConfig | None, bool]:
    """The recipient's configuration, and whether it is its own and not that of a model like it."""
    place = _folder(config.recipient, config.recipient_revision, home) if config.recipient else None
    exact = place is not None and (place / "config.json").is_file()
    if exact and place is not None:
        fields, _ = PreTrainedConfig.get_config_dict(place)
    elif home is not None and (home.folder / DONOR_CONFIG).is_file():
        fields = dict(DonorRecord.read(home.folder).source_config)
    else:
        return None, False
    if fields.get("model_type") not in CONFIG_MAPPING:
        return None, False
    found: PreTrainedConfig = CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
    apply_overrides(found, config.recipient_overrides, {})
    return found, exact


def _folder(reference: str, revision: str | None, home: Source | None) -> Path | None:
    here = points_to_folder(reference, home, revision)
    return here or at_hand(reference, revision or ("main" if home is not None and home.from_hub else None))


def _num_layers(spec: DonorSpec, home: Source | None) -> int | None:
    if spec.layers is not None:
        return len(spec.layers)
    place = _folder(spec.donor, spec.revision, home)
    place = place / spec.subfolder if place is not None and spec.subfolder else place
    if place is None or not (place / DONOR_CONFIG).is_file():
        return None
    return len(DonorRecord.read(place).layer_indices)
