"""`check`: whether a donor fits a recipient, from headers and configurations only."""

from __future__ import annotations

import os
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from ..architecture import native_class, open_recipient, unwrapped
from ..compatibility import CompatibilityReport
from ..donor import Donor
from ..donor.entry import read_entry
from ..donor.place import donor_and_position, spec_of
from ..errors import CheckpointError, ConfigurationError
from ..layer_map import Position
from ..sources import HubOptions, locate
from ..splice import report_fit


def check(
    recipient: Any, donor: Any, position: Position | None = None, mode: str | None = None, **hub_kwargs: Any
) -> CompatibilityReport:
    """Say whether a donor fits a recipient, from headers and configurations only.

    Args:
        recipient: Hub id, folder, configuration or model.
        donor: A `Donor`, its Hub id or folder, or `{donor: position}`.
        position: Where it would go, 0..L; by default the donor's recommended position.
        mode: "insert" or "replace"; by default what the donor recommends together with its position, at a position of
            your own "insert".
        **hub_kwargs: `token`, `cache_dir`, `local_files_only`, `force_download`, `trust_remote_code`.

    Returns:
        The report, with every mismatch.
    """
    trust = hub_kwargs.pop("trust_remote_code", None)
    hub = HubOptions.from_kwargs(hub_kwargs)
    donor, position = donor_and_position(donor, position)
    try:
        opened = donor if isinstance(donor, Donor) else Donor.from_pretrained(donor, **hub.as_kwargs())
    except CheckpointError as error:
        is_name = isinstance(recipient, str | os.PathLike)
        if is_name and read_entry(locate(os.fspath(recipient), files=("config.json",), hub=hub).folder):
            raise ConfigurationError(
                f"{donor} is not a donor, but {recipient} is. Pass the recipient first, then the donor. {error}"
            ) from error
        raise
    spec = spec_of(opened, position, mode=mode, name=opened.name or "donor", strength=1.0)
    if isinstance(recipient, nn.Module):
        recipient = unwrapped(recipient)
        model_class, config, name = type(recipient), recipient.config, recipient.config.name_or_path
    elif isinstance(recipient, PreTrainedConfig):
        name = recipient.name_or_path or recipient.model_type
        model_class, config = native_class(AutoModelForCausalLM, recipient, name)
    else:
        name = os.fspath(recipient)
        found = open_recipient(name, None, hub, trust_remote_code=trust)
        model_class, config = found.model_class(AutoModelForCausalLM)
    return report_fit(model_class, config, name or model_class.__name__, spec, opened)


check_compatibility = check  # the old name, for one release
