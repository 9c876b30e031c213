"""From names to what is going to be exported: everything found and pinned, drawn, and refused where it must be."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from ..architecture import native_class
from ..config import TransplantConfig
from ..errors import ConfigurationError
from ..heads import CAUSAL_LM, Head, head_of
from ..model.adapters import ADAPTER_CONFIG
from ..model.resolve import Request, open_donors, read_request, recipient_config
from ..sources import HubOptions, locate
from ..splice import Blueprint, draw_blueprint

__all__ = ["Opened", "open_transplant"]


@dataclasses.dataclass(frozen=True)
class Opened:
    """A transplant that can be exported.

    Args:
        request: What was named, every revision pinned.
        blueprint: What runs; a native configuration describes it.
        head: The head that the recipient was saved with.
        hub: How to reach the Hub.
    """

    request: Request
    blueprint: Blueprint
    head: Head
    hub: HubOptions

    @property
    def auto_class(self) -> Any:
        """The Auto class that finds the recipient's own class."""
        return self.head.find()

    @property
    def config(self) -> TransplantConfig:
        """The transplant's configuration."""
        return self.blueprint.config

    @property
    def recipient(self) -> str:
        """The recipient, with its commit if it has one."""
        revision = self.config.recipient_revision
        return f"{self.config.recipient}@{revision}" if revision else str(self.config.recipient)


def open_transplant(
    source: str | os.PathLike[str],
    donors: Any,
    composition: str | None,
    revision: str | None,
    hub: HubOptions,
) -> Opened:
    """Find a transplant's parts by configurations and headers, and draw what runs.

    Args:
        source: A transplant, a donor, or with `donors` a recipient.
        donors: As in `from_pretrained`; `None` where the source names its own.
        composition: "stacked" or "side_by_side"; by default as the source says.
        revision: The source's revision.
        hub: How to reach the Hub.

    Raises:
        ConfigurationError: Nothing to export, or nothing that a plain checkpoint can describe; with what to do.
        CompatibilityError: A donor does not fit.
        HubError: Out of reach.
    """
    request = read_request(source, donors=donors, config=None, revision=revision, subfolder=None, hub=hub)
    if composition is not None:
        request.config.composition = composition
    found = open_donors(request, hub)
    config = recipient_config(request, hub, False, {}).config
    _refuse_adapters(request, hub)
    head = head_of(config.architectures or (), config) or CAUSAL_LM
    model_class, config = native_class(head.find(), config, request.config.recipient)
    blueprint = draw_blueprint(model_class, config, found, request.config)
    _refuse_beyond_native(blueprint)
    return Opened(request, blueprint, head, hub)


def _refuse_adapters(request: Request, hub: HubOptions) -> None:
    """Refuse adapters that loading puts on: an export holds weights alone.

    Raises:
        ConfigurationError: Saying where one lies.
    """
    name, revision = str(request.config.recipient), request.config.recipient_revision
    recipient = locate(name, files=(f"{ADAPTER_CONFIG}*",), revision=revision, hub=hub)
    for source in filter(None, (request.adapter, recipient)):
        if (source.folder / ADAPTER_CONFIG).exists():
            raise ConfigurationError(
                f"{source} holds an adapter ({ADAPTER_CONFIG}), which an export would leave out. Merge it into the "
                "weights (PEFT's merge_and_unload, then save_pretrained), or move that file away."
            )


def _refuse_beyond_native(blueprint: Blueprint) -> None:
    """Refuse what would load silently wrong in plain Transformers, or not at all.

    Raises:
        ConfigurationError: With the reason, and what can be done.
    """
    save = "load it with AutoModelWithTransplant and call save_pretrained(folder)"
    scaled = [(part.name, part.spec.strength) for part in blueprint.parts if part.spec.strength != 1.0]
    if scaled:
        name, strength = scaled[0]
        if strength == 0:
            raise ConfigurationError(
                f"donor {name!r} has strength 0, so it does nothing: leave it out, or export the recipient itself if "
                "it is the only one."
            )
        raise ConfigurationError(
            f"donor {name!r} has strength {strength}, and a plain checkpoint knows no strengths. Either {save}, which "
            "folds the strength into the weights where that is exact and else writes the transplant format; or export "
            "it at strength 1, by naming the recipient, the donor and its position."
        )
    if blueprint.crowds:
        raise ConfigurationError(
            f"donors {', '.join(blueprint.crowds[0])} run side by side at one position, and a plain checkpoint runs "
            f"one layer after another. Either {save}, which writes the transplant format; or export them stacked "
            '(composition="stacked"), which computes something else.'
        )
    state = blueprint.state(())
    if not state.native:
        reason = state.reasons[0] if state.reasons else "its layers differ"
        raise ConfigurationError(
            f"no configuration of {blueprint.recipient.config.model_type} describes these layers ({reason}), so a "
            f"plain checkpoint of them would be loaded silently wrong. Either {save}, which writes the transplant "
            "format; or choose another position (`transplant-hf check` says of each whether it is native)."
        )
