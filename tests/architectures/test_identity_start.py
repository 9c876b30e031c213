"""Which types' layers can start as the identity, and that they then change nothing: `pytest -m slow` for all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from tests.architectures.matrix import CHECKED_TYPES, NOT_AT, OTHER_LAYERS, REFUSED, VARIANTS
from tests.architectures.reference import layers_of
from tests.architectures.tiny_models import tiny_config, tiny_inputs, tiny_model
from transplant_hf import AutoModelWithTransplant, CompatibilityError, Donor
from transplant_hf.architecture import find_stack, output_weights

CHOSEN = ["gemma3_text", "gpt_neox", "mixtral", "deepseek_v3", "mamba", "opt", "dbrx"]

AFTER_ADDING = "changes the hidden state, like layers that normalize or scale it after the addition"
# Normalized after the residual is added, as in the first transformers: no output of theirs leaves the state alone.
POST_NORM = (
    "bart", "bert", "bert-generation", "big_bird", "blenderbot-small", "camembert", "data2vec-text", "electra", "ernie",
    "git", "marian", "mvp", "openai-gpt", "plbart", "prophetnet", "rembert", "roberta", "roc_bert", "roformer", "trocr",
    "xlm-roberta", "xlnet", "xmod",
)  # fmt: skip
CANNOT = {name: AFTER_ADDING for name in POST_NORM} | {
    "beam": AFTER_ADDING,  # weighs the residual
    "deepseek_v4": AFTER_ADDING,  # mixes several residual streams
    "doge": AFTER_ADDING,  # weighs the residual
    "gemma4_text:plain": AFTER_ADDING,  # multiplies the sum by a number of its own
    "gemma4_unified": AFTER_ADDING,  # the same
    "gemma4_unified_text": AFTER_ADDING,  # the same
    "minimax": AFTER_ADDING,  # its residual is the normalized state
    "zaya": AFTER_ADDING,  # weighs the residual
}
# Cross-attention layers, of which a text model runs none without images.
LAYERS = {**OTHER_LAYERS, "mllama": (2,)}
# Halves the hidden state after some layers, in evaluation only: their number decides where, and rounding follows.
NEARLY = {"rwkv": 1e-4}
# Gradients through it are refused in evaluation mode.
NO_GRADIENTS = ("reformer",)


def _check_type(model_type: str, folder: Path) -> None:
    changes, plain = VARIANTS.get(model_type, {}), model_type.partition(":")[0]
    made = tiny_model(plain, 4, seed=1, **changes)
    made.save_pretrained(folder / "recipient")
    if type(made.config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        # Published under the composite configuration; the Auto class takes the text part out of it.
        tiny_config(plain, 4, **changes).save_pretrained(folder / "recipient")
    recipient = AutoModelForCausalLM.from_pretrained(folder / "recipient", dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in recipient.state_dict().items()}
    layers = LAYERS.get(model_type, (1, 2))
    if model_type in CANNOT:
        with pytest.raises(CompatibilityError, match=CANNOT[model_type]):
            Donor.from_model(recipient, layers, init="identity")
        return
    donor = Donor.from_model(recipient, layers, name="new", init="identity")
    donor.save_pretrained(folder / "donor", position=1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in recipient.state_dict().items())

    ids = tiny_inputs(recipient.config, seed=3)
    with torch.no_grad():
        wanted = recipient(ids, use_cache=False).logits
    for position in {0, 1, 2, len(layers_of(recipient))} - set(NOT_AT.get(model_type, {})):
        model = AutoModelWithTransplant.from_pretrained(
            folder / "recipient", donors={str(folder / "donor"): position}, dtype=torch.float32
        )
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits
        difference = float((logits - wanted).abs().max())
        assert difference <= NEARLY.get(model_type, 0.0), f"at {position}: {difference:.2g}"
    if model_type not in NO_GRADIENTS:
        _check_it_can_learn(model, ids)


def _check_it_can_learn(model: Any, ids: torch.Tensor) -> None:
    """No output weight keeps another from learning, and a small step makes a small difference."""
    numbers = model.layer_map.layers_of("new")
    names = output_weights(model, find_stack(model), numbers)
    before = model(ids, use_cache=False).logits
    before.pow(2).mean().backward()
    for number in numbers:
        for name in names[number]:
            weight = layers_of(model)[number].get_parameter(name)
            assert weight.grad is not None and bool(weight.grad.any()), f"layer {number}: {name} would stay as it is"
            weight.data += 1e-5 * weight.grad.sign()
    with torch.no_grad():
        change = (model(ids, use_cache=False).logits - before).abs().max() / before.abs().max()
    assert change < 1e-2, f"a step of 1e-5 changes logits by {change:.2g}"


@pytest.mark.parametrize("model_type", CHOSEN)
def test_one_of_each_kind(model_type: str, tmp_path: Path) -> None:
    if model_type == "dbrx" and not hasattr(PreTrainedConfig, "sub_configs_defaults"):
        pytest.skip("DbrxConfig.from_dict of Transformers 5.17 refuses what DbrxConfig.to_dict returns")
    _check_type(model_type, tmp_path)


@pytest.mark.parametrize("model_type", ["openai-gpt", "doge"])
def test_refused(model_type: str, tmp_path: Path) -> None:
    _check_type(model_type, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model_type", [name for name in [*CHECKED_TYPES, *VARIANTS] if name not in CHOSEN and name not in REFUSED]
)
def test_every_type(model_type: str, tmp_path: Path) -> None:
    _check_type(model_type, tmp_path)
