"""Transplants in memory: into a model that is already loaded, sharing its storage, and out of it again."""

from __future__ import annotations

import copy
from typing import Any

from transformers import PreTrainedModel

from ..config import DonorSpec, TransplantConfig
from ..donor import Donor
from ..donor.tensors import MemoryTensors
from ..errors import ConfigurationError
from ..layer_map import RECIPIENT
from ..splice import draw_blueprint
from .gates import gates_of
from .loading import FileChecks, Loading, loading
from .mixin import TransplantMixin, native_class, transplant_class
from .saving import recipient_state

__all__ = ["remove_transplants", "transplant"]


def transplant(
    model: PreTrainedModel, donor: Donor | str, position: int, mode: str = "insert", *, name: str | None = None,
    strength: float = 1.0, composition: str | None = None,
) -> Any:  # fmt: skip
    """Return a model that runs a loaded recipient's layers with a donor's between them.

    The recipient's weights are shared, not copied: training either trains both. The model passed in stays as it is.
    A model that already holds donors gets one more; positions are in the untouched recipient's numbering.

    Args:
        model: A loaded decoder-only model.
        donor: The donor, or its Hub id or folder.
        position: How many recipient layers run before it, 0..L.
        mode: "insert" or "replace"; replaced layers are kept, so that the donor can be switched off.
        name: What to call it; by default its own name.
        strength: Scales what its layers add to the hidden state.
        composition: How donors at one position go together, "stacked" or "side_by_side"; by default as in the model.

    Returns:
        An instance of the recipient's own class.

    Raises:
        ConfigurationError: A position out of range, or a model whose weights cannot be shared.
        CompatibilityError: The donor does not fit, with every mismatch.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> recipient = GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=8, n_head=2, vocab_size=16, n_positions=8))
        >>> donor = Donor.from_model(recipient, layers=[0], name="first")
        >>> model = transplant(recipient, donor, position=3)
        >>> len(model.transformer.h), len(recipient.transformer.h)
        (4, 3)
        >>> model.lm_head.weight.data_ptr() == recipient.lm_head.weight.data_ptr()
        True
    """
    opened = donor if isinstance(donor, Donor) else Donor.from_pretrained(donor)
    _check_shareable(model)
    if opened.source is None:
        # Else training the donor would train the layers it was taken from, and every other model it is in.
        copies = MemoryTensors({name: tensor.clone() for name, tensor in opened.tensors().items()})
        opened = Donor(opened.record, copies, position=opened.position, mode=opened.mode, strength=opened.strength)
    spec = DonorSpec(
        str(opened.source.reference if opened.source else opened.name or "."),
        position=position,
        mode=mode,
        name=name or opened.name,
        strength=strength,
        revision=opened.source.revision if opened.source else None,
        subfolder=opened.source.subfolder if opened.source else None,
    )
    held, recipient_class, recipient_config, weights, known = _taken_apart(model)
    donors = [*held, (spec, opened)]
    config = TransplantConfig(
        recipient=known.recipient,
        recipient_revision=known.recipient_revision,
        donors=[part for part, _ in donors],
        composition=composition or known.composition,
    )
    replaces = any(part.mode == "replace" for part, _ in donors)
    blueprint = draw_blueprint(recipient_class, recipient_config, donors, config, keep_replaced=replaces)
    spliced = blueprint.built_config
    with FileChecks(part for _, part in donors) as checks, loading(Loading(blueprint, checks, shared=True)):
        made: Any = transplant_class(recipient_class).from_pretrained(
            None,
            config=spliced.config if spliced.native else recipient_config,
            state_dict=weights,
            dtype=model.dtype,
            device_map={"": model.device} if model.device.type != "cpu" else None,
        )
    _take_after(made, model)
    return made


def _check_shareable(model: Any) -> None:
    reason = None
    if not isinstance(model, PreTrainedModel):
        reason = f"it is a {type(model).__name__}, not a PreTrainedModel (unwrap it first)"
    elif getattr(model, "hf_quantizer", None) is not None:
        reason = "it is quantised"
    elif any(parameter.is_meta for parameter in model.parameters()):
        reason = "some of its weights are offloaded or not loaded"
    elif len({parameter.device for parameter in model.parameters()}) > 1:
        reason = "its weights are on several devices"
    elif getattr(model, "_hf_peft_config_loaded", False):
        reason = "it has adapters attached"
    elif isinstance(model, TransplantMixin) and model._transplant and model._transplant.switch.disabled:
        reason = "some of its donors are switched off just now"
    elif isinstance(model, TransplantMixin) and model._transplant and gates_of(model._transplant):
        reason = "the strength of some of its donors is being trained (detach_gate ends that)"
    if reason is not None:
        raise ConfigurationError(
            f"the weights of this model cannot be shared with a transplant: {reason}. Load the recipient with "
            "AutoModelWithTransplant.from_pretrained(recipient, donors=...) instead."
        )


def _taken_apart(model: Any) -> tuple[list[tuple[DonorSpec, Donor]], Any, Any, Any, TransplantConfig]:
    """Return what a model holds: donors; the recipient's class, configuration and weights; its own configuration."""
    state = getattr(model, "_transplant", None)
    if state is None:
        known = TransplantConfig(recipient=model.config.name_or_path or "")
        native = native_class(type(model)) if isinstance(model, TransplantMixin) else type(model)
        return [], native, model.config, model.state_dict(), known
    blueprint = state.blueprint
    if len(recipient_layers := [s for s in state.layers if s.slot.source == RECIPIENT]) != blueprint.splice.num_layers:
        raise ConfigurationError(
            f"{blueprint.splice.num_layers - len(recipient_layers)} recipient layers were replaced and not kept; load "
            "the model with keep_replaced=True to add donors to it."
        )
    held = [
        (part.spec, Donor.from_model(model, model.layer_map.layers_of(part.name), name=part.name))
        for part in blueprint.parts
    ]
    specs = [(DonorSpec.from_dict({**spec.to_dict(), "layers": None}), donor) for spec, donor in held]
    return specs, blueprint.recipient.model_class, blueprint.recipient.config, recipient_state(model), blueprint.config


def _take_after(made: Any, model: PreTrainedModel) -> None:
    """Carry over what is not a weight: freezing, mode, generation settings, where it came from."""
    frozen = {tensor.data_ptr() for tensor in model.parameters() if not tensor.requires_grad}
    for tensor in made.parameters():
        if tensor.data_ptr() in frozen:
            tensor.requires_grad_(False)
    made.train(model.training)
    made.config._name_or_path = made.name_or_path = model.config.name_or_path
    if model.can_generate():
        made.generation_config = copy.deepcopy(model.generation_config)
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is not None:
        made._weight_conversions = conversions
    else:
        del made._weight_conversions


def remove_transplants(model: Any) -> PreTrainedModel:
    """Take every donor out of a model: the same object becomes the recipient again.

    Args:
        model: A transplanted model; changed in place.

    Returns:
        The model, now of the recipient's own class.

    Raises:
        ConfigurationError: A donor replaced layers that were not kept.
    """
    state = getattr(model, "_transplant", None)
    transplanted = isinstance(model, TransplantMixin)
    if state is not None:
        state.switch.check(state.blueprint.splice.names)
        state.switch.remove()
        model.config._name_or_path = model.name_or_path = state.blueprint.config.recipient
    if transplanted:
        model._transplant = None
        model.__class__ = native_class(type(model))
    return model
