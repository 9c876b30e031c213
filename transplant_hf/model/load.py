"""`from_pretrained` for transplants: `AutoModelWithTransplant`, and what the Auto classes call."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, overload

from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig

from ..architecture import forget_gguf
from ..architecture.build import build_random
from ..architecture.names import unpacked_conversions
from ..config import TransplantConfig, gguf_file_of
from ..errors import ConfigurationError
from ..sources import HubOptions, for_transformers, reading
from ..splice import follow_quantization, quantization_beside_donors
from .active_donors import attach_state
from .load_request import find_adapter, find_parts, load_adapter_beside, read_request
from .load_weights import FileChecks, HeldBack, WeightLoader, from_pretrained, use_loader
from .recipient_in_model import AsLoaded
from .routing import AUTO, routed_choice
from .surface import transplant_class

if TYPE_CHECKING:
    from .surface import TransplantedModel

# Arguments of the model class. A configuration that gets them only stores them.
FOR_MODEL = ("dtype", "torch_dtype", "quantization_config")


class AutoModelWithTransplant:
    """Loads a recipient with its donors, as an instance of the recipient's own class.

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
        strength: Literal["auto"] | None = None,
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
        strength: Literal["auto"] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a transplant.

        Args:
            pretrained_model_name_or_path: A transplant or donor repo or folder; or, with `donors`, a recipient.
            *model_args: As in Transformers.
            donors: `{donor: position}`, `DonorSpec` objects or text such as "user/law@10", when a recipient is named.
            config: A `TransplantConfig` to use instead of the repo's own.
            auto_class: The Auto class whose head is wanted; causal language modeling by default.
            keep_replaced: Also load layers that donors replace, so that those donors can be switched off.
            composition: How donors at one position go together, "stacked" or "side_by_side"; by default as in the
                repo, otherwise stacked.
            strength: "auto" lets donors choose themselves in every call, as `model.using("auto")` does in a block.
            **kwargs: What `from_pretrained` takes; `revision` and `subfolder` name the repo that was asked for, all
                else reaches the recipient.

        Returns:
            The model; with `output_loading_info=True` also the loading info, as in Transformers.

        Raises:
            TransplantError: If something does not fit, before any weight is read.
        """
        return load_transplant(
            auto_class,
            pretrained_model_name_or_path,
            *model_args,
            donors=donors,
            config=config,
            keep_replaced=keep_replaced,
            composition=composition,
            strength=strength,
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
        config = _checked_config(config)
        hub, trust = HubOptions.from_kwargs(kwargs), kwargs.pop("trust_remote_code", None)
        kwargs = {name: value for name, value in kwargs.items() if name not in hub.as_kwargs()}
        parts = find_parts(read_request(config.name_or_path or os.curdir, config=config, hub=hub), hub, trust)
        parts = dataclasses.replace(parts, config=parts.config.replaced(name_or_path=config.name_or_path))
        blueprint = parts.blueprint(auto_class)
        recipient, spliced = blueprint.recipient, blueprint.built_config
        with use_loader(WeightLoader(blueprint, FileChecks(()))):  # no file of a donor is read
            built_from = spliced.config if spliced.native else recipient.config
            model: Any = build_random(transplant_class(recipient.model_class), built_from, **kwargs)
        attach_state(model, blueprint)
        return model


def load_transplant(
    auto_class: Any,
    asked: str | os.PathLike[str],
    *model_args: Any,
    donors: Any = None,
    config: PreTrainedConfig | None = None,
    keep_replaced: bool = False,
    composition: str | None = None,
    strength: str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    recipient_overrides: Mapping[str, Any] | None = None,
    held_back: HeldBack | None = None,
    quantize_donors: bool = True,
    **kwargs: Any,
) -> Any:
    """Load a transplant with the head of one Auto class; see `AutoModelWithTransplant.from_pretrained`."""
    if kwargs.get("state_dict") is not None:
        raise ConfigurationError(
            "state_dict= cannot be combined with donors; use transplant_hf.transplant(model, donor, position)."
        )
    if "donor" in kwargs:
        raise ConfigurationError(f"there is no argument donor={kwargs['donor']!r}. Pass donors={{donor: position}}.")
    for name in {"position", "mode"} & kwargs.keys():
        raise ConfigurationError(
            f"there is no argument {name}={kwargs[name]!r}: it is a field of each donor, "
            "donors=[DonorSpec(donor, position, mode=...)]."
        )
    if strength not in (None, AUTO):
        raise ConfigurationError(
            f'strength={strength!r}: at load it can be "auto". The strength of one donor is a field of its DonorSpec.'
        )
    hub = HubOptions.from_kwargs(kwargs)
    request = read_request(
        asked,
        donors=donors,
        config=None if config is None else _checked_config(config),
        revision=revision,
        subfolder=subfolder or None,
        hub=hub,
        gguf_file=kwargs.pop("gguf_file", None),
        composition=composition,
        overrides=recipient_overrides,
    )
    gguf_file = gguf_file_of(request.config)
    trust = kwargs.pop("trust_remote_code", None)
    # Not for the recipient: `code_revision` and private names of Transformers are about the asked repo.
    left_out = (*hub.as_kwargs(), "code_revision")
    kwargs = {
        name: value
        for name, value in kwargs.items()
        if name not in left_out and (not name.startswith("_") or name.endswith("implementation"))
    }
    adapter, kwargs = find_adapter(request, kwargs)
    # For the model class, as in the Auto classes; a configuration would only store them.
    for_model = {name: kwargs.pop(name) for name in FOR_MODEL if name in kwargs}
    parts = find_parts(request, hub, trust, kwargs)
    blueprint = parts.blueprint(auto_class, keep_replaced)
    if strength is not None:
        routed_choice(blueprint, ())  # refuses donors that cannot, before weights are read
    saved = parts.config.recipient_quantization
    if saved is not None and gguf_file is None and "quantization_config" not in for_model:
        for_model["quantization_config"] = quantization_beside_donors(saved["config"], blueprint, saved["donors"])
    elif for_model.get("quantization_config") is not None and not quantize_donors:
        for_model["quantization_config"] = quantization_beside_donors(for_model["quantization_config"], blueprint)
    kwargs = {**parts.recipient.unused_kwargs, **for_model, "trust_remote_code": trust, **hub.as_kwargs()}
    if request.names_transplant and "generation_config" not in kwargs:
        with contextlib.suppress(OSError):  # without one of its own, the recipient's is loaded
            kwargs["generation_config"] = GenerationConfig.from_pretrained(request.source.folder)
    where = (parts.recipient.reference, parts.recipient.revision)
    name = for_transformers(*where, hub, weights=True, file=gguf_file)
    with reading("the weights", *where):
        loaded = from_pretrained(
            transplant_class(blueprint.recipient.model_class),
            blueprint,
            name,
            *model_args,
            adapt_config=lambda config: follow_quantization(config, blueprint),
            held_back=held_back,
            revision=parts.recipient.revision or "main",
            **kwargs,
        )
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    model._transplant.hub = HubOptions(cache_dir=hub.cache_dir, local_files_only=hub.local_files_only)
    # What an adapter that is trained on this model refers to.
    asked = request.asked if request.names_transplant else parts.config.recipient
    model.config.name_or_path = model.name_or_path = asked
    forget_gguf(model)
    if getattr(model, "hf_quantizer", None) is None and hasattr(model, "_weight_conversions"):
        # Transformers 5.23 packs weights again that were dequantized at load, under names that load as random weights.
        model._weight_conversions = unpacked_conversions(model)
    model._transplant.as_loaded = AsLoaded(model)
    if adapter is not None:
        load_adapter_beside(model, adapter, parts.config.recipient)
    if strength is not None:
        model._transplant.route()
    return loaded


def _checked_config(config: Any) -> TransplantConfig:
    if not isinstance(config, TransplantConfig):
        raise ConfigurationError(
            f"config must be a TransplantConfig, got {type(config).__name__}; to change the recipient's own "
            "configuration pass its fields as keyword arguments."
        )
    return config
