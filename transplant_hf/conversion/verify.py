"""Run one layer with the weights of two donors, and compare the outputs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ..architecture import Anatomy, LayerOrigin, decoder_stack, native_class, splice_config
from ..architecture.build import build_on_meta, initialize
from ..donor import Donor
from ..donor.dtypes import loaded_dtype
from ..errors import CheckpointError, ConfigurationError
from ..model.in_memory import transplant

__all__ = ["compare_outputs", "first_layer_output"]

_TOKENS = 16


def compare_outputs(one: Donor, other: Donor) -> None:
    """Run the first layer of two donors on the same random hidden states."""
    first, second = first_layer_output(one), first_layer_output(other)
    if not torch.equal(first, second):
        worst = float((first.float() - second.float()).abs().max())
        raise CheckpointError(
            f"layer 0 of {other} gives other hidden states than that of {one} (largest difference {worst:.3g})."
        )


def first_layer_output(donor: Donor, seed: int = 0) -> torch.Tensor:
    """Run a donor's first layer alone, in a model that has no other layer."""
    fields = {**donor.record.source_config, "model_type": donor.model_type}
    fields.pop("quantization_config", None)  # a donor's weights are in full precision
    model_class, config = native_class(AutoModelForCausalLM, AutoConfig.for_model(**fields), str(donor))
    anatomy = Anatomy(model_class, config, f"the source model of donor {donor}")
    model = transplant(_empty_model(anatomy, donor), donor.part([0]), 0, mode="replace")
    outputs: list[torch.Tensor] = []

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handle = decoder_stack(model, anatomy.stack_path)[0].register_forward_hook(keep)
    size = config.get_text_config().hidden_size
    hidden = torch.randn(1, _TOKENS, size, generator=torch.Generator().manual_seed(seed)).to(model.dtype)
    with torch.no_grad():
        model.base_model(inputs_embeds=hidden, use_cache=False)
    handle.remove()
    if not torch.isfinite(outputs[0]).all():
        raise CheckpointError(f"layer 0 of {donor} turns random hidden states into NaN or infinity.")
    return outputs[0]


def _empty_model(anatomy: Anatomy, donor: Donor) -> PreTrainedModel:
    """A model with a layer like the donor's first and no other; memory for embeddings is reserved but not touched."""
    spliced = splice_config(anatomy, [LayerOrigin(anatomy, donor.layer_indices[0])])
    if not spliced.native:
        raise ConfigurationError(
            f"layer {donor.layer_indices[0]} of {donor} cannot be run alone ({spliced.reasons[0]}); convert it without "
            "verifying outputs."
        )
    spliced.config.dtype = _main_dtype(donor.part([0]))
    model = build_on_meta(anatomy.model_class, spliced.config).to_empty(device="cpu")
    large = {
        id(part.weight) for part in (model.get_input_embeddings(), model.get_output_embeddings()) if part is not None
    }
    with torch.no_grad():
        parameter: Any
        for parameter in model.parameters():
            parameter._is_hf_initialized = True
            if id(parameter) not in large:
                parameter.zero_()
    initialize(model, anatomy.model_class)  # the buffers
    model.tie_weights()
    return model.eval()


def _main_dtype(donor: Donor) -> torch.dtype:
    """The type of most numbers: some norms are kept in another, and the order of tensors says nothing."""
    counts: Counter[str] = Counter()
    for _, info in sorted(donor.infos().items()):
        counts[info.dtype] += info.num_elements
    dtype = loaded_dtype(counts.most_common(1)[0][0])
    if dtype.itemsize == 1:
        raise ConfigurationError(f"donor {donor}: no layer runs in {dtype}; convert it without verifying outputs.")
    return dtype
