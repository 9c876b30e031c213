"""Transplants in memory: into a model that is already loaded, sharing its storage, and out of it again."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel

from ..architecture import Anatomy, decoder_stack, forget_gguf, is_quantized
from ..architecture.follow import stale_lists
from ..architecture.names import is_adapted
from ..compatibility import refuse_unsupported
from ..config import TransplantConfig, check_composition
from ..donor import Donor
from ..errors import ConfigurationError, TransplantError
from ..layer_map import Position
from ..splice import Blueprint
from .active_donors import attach_state
from .native_methods import recipient_class
from .surface import TransplantMixin, transplant_class

if TYPE_CHECKING:
    from .surface import TransplantedModel


def transplant(
    model: PreTrainedModel, donor: Donor | str, position: Position | None = None, mode: str | None = None, *,
    name: str | None = None, strength: float | None = None, composition: str | None = None, in_place: bool = False,
) -> TransplantedModel:  # fmt: skip
    """Return a model that runs a loaded recipient's layers with a donor's between them.

    The recipient's weights are shared, not copied: training either trains both. Everything else is copied, hooks and
    parametrizations too, and the model passed in stays as it is, unless `in_place`. A model that already holds donors
    gets one more; positions are in the untouched recipient's numbering.

    Args:
        model: A loaded decoder-only model.
        donor: The donor, or its Hub id or folder.
        position: How many recipient layers run before it, 0..L; by default what it recommends.
        mode: "insert" or "replace"; by default the donor's recommendation, or "insert" with `position`. Replaced layers
            are kept, so that the donor can be switched off.
        name: What to call it; by default its own name.
        strength: Scales what its layers add to the hidden state; by default the donor's recommendation, or 1 with
            `position`.
        composition: How donors at one position go together, "stacked" or "side_by_side"; by default as in the model.
        in_place: Change the model itself, which may then be quantized, offloaded or on several devices.

    Returns:
        An instance of the recipient's own class; `in_place`, the model that was passed in.

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
    if not isinstance(model, PreTrainedModel):
        raise ConfigurationError(
            f"donors go into Transformers models, and a {type(model).__name__} is not a PreTrainedModel: unwrap it, or "
            "load the recipient with AutoModelWithTransplant.from_pretrained(recipient, donors=...)."
        )
    if not in_place:
        _check_shareable(model)
        model = _sharing_copy(model)
    if composition is not None:
        check_composition(composition, "this model")
    made: Any = model  # its class changes below
    was = (type(made), getattr(made, "_transplant", None))
    if was[1] is None:
        _hold_none(made)
    try:
        made.add_donor(donor, position, mode, name=name, strength=strength)
    except TransplantError:
        if was[1] is None:
            made._transplant.guard.remove()
        made.__class__, made._transplant = was
        raise
    if composition is not None:
        made.set_composition(composition)
    return made


def _sharing_copy(model: Any) -> Any:
    """Copy a model without its weights, which the copy has as parameters of its own."""
    state, shared = getattr(model, "_transplant", None), dict[int, Any]()
    for module in (model, *(state.idle_layers() if state is not None else ())):
        shared |= {id(one): nn.Parameter(one.detach(), one.requires_grad) for one in module.parameters()}
        shared |= {id(one): one.detach() for one in module.buffers()}
    return copy.deepcopy(model, shared)


def _hold_none(model: Any) -> None:
    """Make a loaded recipient, where it stands, a model that holds donors, none of them yet."""
    native = recipient_class(type(model))
    name = model.config.name_or_path
    forget_gguf(model)
    recipient = Anatomy(native, copy.deepcopy(model.config), f"recipient {name or native.__name__}")
    refuse_unsupported(recipient)
    _refuse_edited(model, recipient)
    model.__class__ = transplant_class(native)
    attach_state(model, Blueprint(recipient, TransplantConfig(recipient=name or "")))


def _refuse_edited(model: Any, recipient: Anatomy) -> None:
    """Refuse a recipient whose layers are not those that its configuration describes."""
    layers = list(decoder_stack(model, recipient.stack_path))
    reasons = [
        f"config.{name} has {length} entries for {recipient.num_layers} layers"
        for name, length in stale_lists(recipient.config).items()
    ]
    if len(layers) != recipient.num_layers:
        reasons.append(f"it holds {len(layers)} layers, and its configuration describes {recipient.num_layers}")
    places: dict[nn.Module, list[int]] = {}
    for number, layer in enumerate(layers):
        places.setdefault(layer, []).append(number)
    shared = [numbers for numbers in places.values() if len(numbers) > 1]
    reasons += [f"layers {', '.join(map(str, numbers))} are one and the same module" for numbers in shared]
    if reasons:
        raise ConfigurationError(
            f"the layers of this recipient do not match its configuration: {'; '.join(reasons)}. Where layers were "
            "deleted or inserted by hand, let the configuration follow (num_hidden_layers and every list with an entry "
            "for each layer), copy layers that run twice, and save and load the model before donors go in."
        )


def _check_shareable(model: Any) -> None:
    reason, state = None, getattr(model, "_transplant", None)
    if is_quantized(model):
        reason = "it is quantized"
    elif any(parameter.is_meta for parameter in model.parameters()):
        reason = "some of its weights are offloaded or not loaded"
    elif len({parameter.device for parameter in model.parameters()}) > 1:
        reason = "its weights are on several devices"
    elif any(is_adapted(name) for name, _ in model.named_parameters()):
        reason = "it has adapters attached (merge_and_unload or unload ends that)"
    elif state is not None and state.disabled:
        reason = "some of its donors are switched off just now"
    elif state is not None and state.hooks.gates():
        reason = "the strength of some of its donors is being trained (detach_gate ends that)"
    if reason is not None:
        raise ConfigurationError(
            f"the weights of this model cannot be shared with a transplant: {reason}. Load the recipient with "
            "AutoModelWithTransplant.from_pretrained(recipient, donors=...) instead."
        )


def remove_transplants(model: Any) -> PreTrainedModel:
    """Remove all donors from a model: the same object becomes the recipient again.

    Args:
        model: A transplanted model; changed in place.

    Returns:
        The model, now of the recipient's own class.

    Raises:
        ConfigurationError: A donor replaced layers that were not kept.
    """
    state = getattr(model, "_transplant", None)
    if state is not None:
        state.check_removable(state.blueprint.splice.names)
        state.remove()
        model.config.name_or_path = model.name_or_path = state.blueprint.config.recipient
    if isinstance(model, TransplantMixin):
        model._transplant = None
        native = recipient_class(type(model))
        # A class that others made of the model's stays, as that of FSDP2: without donors it is the recipient's, too.
        if type(model) is transplant_class(native):
            model.__class__ = native
    return model
