"""`from_pretrained` for transplants: `AutoModelWithTransplant`, and what the Auto classes call."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, overload

from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig

from ..architecture import check_gguf_reader, forget_gguf, native_class, open_recipient, unwrapped
from ..architecture.build import build_random
from ..compatibility import CompatibilityReport
from ..config import DonorSpec, TransplantConfig, check_composition
from ..donor import Donor
from ..donor.place import spec_of
from ..errors import CheckpointError, ConfigurationError
from ..sources import HubOptions, for_transformers, locate, reading
from ..splice import Blueprint, draw_blueprint, follow_quantization, report_fit
from ..storage import read_json
from .active_donors import attach_state
from .adapters import load_beside
from .loading import FileChecks, Loading, loading
from .resolve import Request, open_donors, read_request, recipient_config
from .surface import transplant_class

if TYPE_CHECKING:
    from .surface import TransplantedModel

__all__ = ["AutoModelWithTransplant", "check_compatibility", "config_to_model", "load_transplant"]

_HUB_NAMES = ("token", "cache_dir", "local_files_only", "force_download")
# About the repo that was asked for, never the recipient's.
_NOT_FOR_RECIPIENT = ("code_revision", "_commit_hash")


class AutoModelWithTransplant:
    """Loads a recipient with donors in place; what comes back is an instance of the recipient's own class.

    Example:
        >>> import tempfile
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from transplant_hf import AutoModelWithTransplant, Donor
        >>> folder = tempfile.mkdtemp()
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=8, n_head=2, vocab_size=16, n_positions=8))
        >>> model.save_pretrained(f"{folder}/recipient")
        >>> donor = Donor.from_model(model, layers=[1, 2], name="tail")
        >>> donor.save_pretrained(f"{folder}/donor", position=1, recipient=f"{folder}/recipient")
        >>> transplant = AutoModelWithTransplant.from_pretrained(f"{folder}/donor")
        >>> isinstance(transplant, GPT2LMHeadModel), transplant.config.n_layer
        (True, 5)
        >>> print(transplant.layer_map)
        layer  from
            0  recipient 0
            1  |  tail 1
            2  |  tail 2
            3  recipient 1
            4  recipient 2
        5 layers run: 3 recipient, 2 tail
        recipient: .../recipient
        tail: inserted at position 1, strength 1, on
    """

    def __init__(self) -> None:
        raise ConfigurationError("AutoModelWithTransplant is used through from_pretrained or from_config.")

    # All keyword arguments of Transformers are taken; this one decides what comes back.
    @overload
    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *model_args: Any,
        donors: Any = None,
        config: PreTrainedConfig | None = None,
        auto_class: Any = AutoModelForCausalLM,
        keep_replaced: bool = False,
        composition: str | None = None,
        output_loading_info: Literal[False] = False,
        **kwargs: Any,
    ) -> TransplantedModel: ...

    @overload
    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *model_args: Any,
        output_loading_info: Literal[True],
        **kwargs: Any,
    ) -> tuple[TransplantedModel, dict[str, Any]]: ...

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *model_args: Any,
        donors: Any = None,
        config: PreTrainedConfig | None = None,
        auto_class: Any = AutoModelForCausalLM,
        keep_replaced: bool = False,
        composition: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a transplant.

        Args:
            pretrained_model_name_or_path: A transplant or donor repo or folder; or, with `donors`, a recipient.
            *model_args: As in Transformers.
            donors: `{donor: position}` or a list of `DonorSpec`, when a recipient is named.
            config: A `TransplantConfig` to use instead of the repo's own.
            auto_class: The Auto class whose head is wanted; causal language modelling by default.
            keep_replaced: Also load layers that donors replace, so that those donors can be switched off.
            composition: How donors at one position go together, "stacked" or "side_by_side"; by default what the repo
                says, and else stacked.
            **kwargs: What `from_pretrained` takes; `revision` and `subfolder` name the repo that was asked for, all
                else reaches the recipient.

        Returns:
            The model; with `output_loading_info=True` also the loading info, as in Transformers.

        Raises:
            TransplantError: Before any weight is read, where something does not fit.
        """
        return load_transplant(
            auto_class,
            pretrained_model_name_or_path,
            *model_args,
            donors=donors,
            config=config,
            keep_replaced=keep_replaced,
            composition=composition,
            **kwargs,
        )

    @classmethod
    def from_config(
        cls, config: TransplantConfig, auto_class: Any = AutoModelForCausalLM, **kwargs: Any
    ) -> TransplantedModel:
        """Build a transplant with random weights; no weights are downloaded for the recipient.

        Args:
            config: The transplant.
            auto_class: The Auto class whose head is wanted.
            **kwargs: As in `AutoModel.from_config`.
        """
        return config_to_model(auto_class, config, **kwargs)


def load_transplant(
    auto_class: Any,
    asked: str | os.PathLike[str],
    *model_args: Any,
    donors: Any = None,
    config: PreTrainedConfig | None = None,
    keep_replaced: bool = False,
    composition: str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    recipient_overrides: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """Load a transplant with the head of one Auto class; see `AutoModelWithTransplant.from_pretrained`."""
    _check_arguments(config, kwargs)
    hub, gguf_file = HubOptions.from_kwargs(kwargs), kwargs.get("gguf_file")
    check_gguf_reader(gguf_file)
    request = read_request(
        asked, donors=donors, config=config, revision=revision, subfolder=subfolder or None, hub=hub,  # type: ignore[arg-type]
        gguf_file=gguf_file,
    )  # fmt: skip
    if composition is not None:
        request.config.composition = check_composition(composition, os.fspath(asked))
    request.config.recipient_overrides |= recipient_overrides or {}
    kwargs = {name: value for name, value in kwargs.items() if name not in (*_HUB_NAMES, *_NOT_FOR_RECIPIENT)}
    adapter = _adapter(request, kwargs)
    opened = open_donors(request, hub)
    with FileChecks(donor for _, donor in opened) as checks:
        loaded = _load(auto_class, request, opened, checks, hub, keep_replaced, model_args, kwargs)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    _remember(model, request, hub)
    forget_gguf(model)
    _forget_dequantizing(model)
    if adapter is not None:
        load_beside(model, *adapter, request.config.recipient)
    return loaded


def _adapter(request: Request, kwargs: dict[str, Any]) -> tuple[str, str | None, dict[str, Any]] | None:
    """Return the adapter that goes on the transplant: where it is, its name, and how to reach it.

    One of the recipient stays among the arguments: the recipient's class loads it.
    """
    options = dict(kwargs.pop("adapter_kwargs", None) or {})
    if not request.names_transplant:
        if request.adapter is not None:
            options["_adapter_model_path"] = str(request.adapter.folder)
        if options:
            kwargs["adapter_kwargs"] = options
        return None
    # Where an Auto class was asked for an adapter, this is it: the transplant is its base model.
    where = os.fspath(options.pop("_adapter_model_path", request.asked))
    if where == request.asked:
        if request.adapter is None:
            return None
        where, options = str(request.adapter.folder), {}
    return where, kwargs.get("adapter_name"), options


def _load(
    auto_class: Any,
    request: Request,
    opened: list[tuple[DonorSpec, Donor]],
    checks: FileChecks,
    hub: HubOptions,
    keep_replaced: bool,
    model_args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    blueprint, kwargs = _draw(auto_class, request, opened, hub, keep_replaced, kwargs)
    recipient, spliced = blueprint.recipient, blueprint.built_config
    if request.names_transplant and "generation_config" not in kwargs:
        with contextlib.suppress(OSError):  # none of its own: the recipient's is loaded
            kwargs["generation_config"] = GenerationConfig.from_pretrained(request.source.folder)
    where = (request.config.recipient, request.config.recipient_revision)
    name = for_transformers(*where, hub, weights=True, file=kwargs.get("gguf_file"))
    with reading("the weights", *where), loading(Loading(blueprint, checks)):
        return transplant_class(recipient.model_class).from_pretrained(
            name,
            *model_args,
            config=follow_quantization(spliced.config if spliced.native else recipient.config, blueprint),
            revision=request.config.recipient_revision or "main",
            **hub.as_kwargs(),
            **kwargs,
        )


def _check_arguments(config: PreTrainedConfig | None, kwargs: dict[str, Any]) -> None:
    if config is not None and not isinstance(config, TransplantConfig):
        raise ConfigurationError(
            f"config must be a TransplantConfig, got {type(config).__name__}; to change the recipient's own "
            "configuration pass its fields as keyword arguments."
        )
    if kwargs.get("state_dict") is not None:
        raise ConfigurationError(
            "state_dict= cannot be combined with donors; use transplant_hf.transplant(model, donor, p)."
        )


def _draw(
    auto_class: Any,
    request: Request,
    opened: list[tuple[DonorSpec, Donor]],
    hub: HubOptions,
    keep_replaced: bool,
    kwargs: dict[str, Any],
) -> tuple[Blueprint, dict[str, Any]]:
    # Applied by the model class, as the Auto classes do; a configuration would only store them.
    held: dict[str, Any] = {
        name: kwargs.pop(name) for name in ("dtype", "torch_dtype", "quantization_config") if name in kwargs
    }
    trust = kwargs.pop("trust_remote_code", None)
    recipient = recipient_config(request, hub, trust, kwargs)
    model_class, config = recipient.model_class(auto_class)
    blueprint = draw_blueprint(model_class, config, opened, request.config, keep_replaced)
    return blueprint, {**recipient.unused_kwargs, **held, "trust_remote_code": trust}


def _remember(model: Any, request: Request, hub: HubOptions) -> None:
    state = model._transplant
    state.local_only, state.cache_dir = hub.local_files_only, hub.cache_dir
    # What an adapter trained on this model will refer to.
    named = request.asked if request.names_transplant else request.config.recipient
    model.config._name_or_path = model.name_or_path = named
    request.config._name_or_path = str(request.source.folder) if request.names_transplant else ""


def _forget_dequantizing(model: Any) -> None:
    """Save what was dequantised while loading under its plain names.

    Transformers 5.23 runs the dequantising conversion backwards on saving, which writes full-precision experts of
    GPT-OSS under the names of packed ones; such a checkpoint loads with random experts. 5.24 forgets all conversions.
    """
    rules = getattr(model, "_weight_conversions", None)
    if rules is not None and getattr(model, "hf_quantizer", None) is None:
        model._weight_conversions = [
            rule
            for rule in rules
            if not any(hasattr(operation, "hf_quantizer") for operation in getattr(rule, "operations", ()))
        ]


def config_to_model(auto_class: Any, config: TransplantConfig, **kwargs: Any) -> TransplantedModel:
    """Build a transplant with random weights; see `AutoModelWithTransplant.from_config`."""
    if not isinstance(config, TransplantConfig):
        raise ConfigurationError(f"config must be a TransplantConfig, got {type(config).__name__}.")
    hub = HubOptions.from_kwargs(kwargs)
    kwargs = {name: value for name, value in kwargs.items() if name not in _HUB_NAMES}
    asked = config.name_or_path or os.curdir
    request = read_request(asked, donors=None, config=config, revision=None, subfolder=None, hub=hub)
    opened = open_donors(request, hub)
    model_class, found = recipient_config(request, hub, kwargs.pop("trust_remote_code", None), {}).model_class(
        auto_class
    )
    blueprint = draw_blueprint(model_class, found, opened, request.config)
    spliced = blueprint.built_config
    with FileChecks(donor for _, donor in opened) as checks, loading(Loading(blueprint, checks)):
        model: Any = build_random(transplant_class(model_class), spliced.config if spliced.native else found, **kwargs)
    attach_state(model, blueprint)
    return model


def _names_transplant(what: Any, hub: HubOptions) -> bool:
    if not isinstance(what, str | os.PathLike):
        return False
    path = locate(os.fspath(what), files=("config.json",), hub=hub).folder / "config.json"
    return path.exists() and read_json(path, "config.json").get("model_type") == TransplantConfig.model_type


def check_compatibility(
    recipient: Any, donor: Any, position: int | None = None, mode: str | None = None, **hub_kwargs: Any
) -> CompatibilityReport:
    """Say whether a donor fits a recipient, from headers and configurations only.

    Args:
        recipient: Hub id, folder, configuration or model.
        donor: A `Donor`, or its Hub id or folder.
        position: Where it would go, 0..L; by default the donor's recommended position.
        mode: "insert" or "replace"; by default what the donor recommends together with its position, at a position of
            your own "insert".
        **hub_kwargs: `token`, `cache_dir`, `local_files_only`, `force_download`, `trust_remote_code`.

    Returns:
        The report, with every mismatch.
    """
    trust = hub_kwargs.pop("trust_remote_code", None)
    hub = HubOptions.from_kwargs(hub_kwargs)
    try:
        opened = donor if isinstance(donor, Donor) else Donor.from_pretrained(donor, **hub.as_kwargs())
    except CheckpointError as error:
        if _names_transplant(recipient, hub):
            raise ConfigurationError(
                f"{donor} is no donor, but {recipient} is: the recipient comes first, then the donor. {error}"
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
