"""Keyword arguments of `from_pretrained` mean what they mean in Transformers, and reach the recipient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.helpers import generated, layers_of, loaded, logits_of, plain, refused, two_donors
from transplant_hf import AutoModelWithTransplant, ConfigurationError

LOADERS: list[Any] = [AutoModelWithTransplant, AutoModelForCausalLM]


@pytest.mark.parametrize("class_", LOADERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "bfloat16"])
def test_dtype(tiny_llama: Path, class_: Any, dtype: Any) -> None:
    model = class_.from_pretrained(tiny_llama / "donor", dtype=dtype)
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert {parameter.dtype for parameter in model.parameters()} == {wanted}
    assert model.config.dtype == wanted
    for name, tensor in loaded(tiny_llama).state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor.to(wanted)), name


@pytest.mark.parametrize("class_", LOADERS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attn_implementation(tiny_llama: Path, class_: Any, attention: str) -> None:
    model = class_.from_pretrained(tiny_llama / "donor", attn_implementation=attention)
    assert model.config._attn_implementation == attention
    assert all(layer.self_attn.config._attn_implementation == attention for layer in layers_of(model))
    if attention == "eager":
        with torch.no_grad():
            seen = model(torch.ones(1, 3, dtype=torch.long), output_attentions=True).attentions
        assert len(seen) == 6
        assert all(part is not None for part in seen)


@pytest.mark.parametrize("class_", LOADERS)
def test_output_loading_info_is_clean(tiny: Path, class_: Any) -> None:
    model, info = class_.from_pretrained(tiny / "donor", output_loading_info=True)
    assert len(layers_of(model)) == 6
    assert {name: list(found) for name, found in info.items() if found} == {}


def test_fields_of_the_recipients_configuration(tiny_gpt2: Path) -> None:
    for model in (
        AutoModelForCausalLM.from_pretrained(tiny_gpt2 / "donor", resid_pdrop=0.25, use_cache=False),
        loaded(tiny_gpt2, resid_pdrop=0.25, use_cache=False),
    ):
        assert model.config.resid_pdrop == 0.25
        assert model.config.use_cache is False
        assert model.transformer.h[0].mlp.dropout.p == 0.25


def test_unknown_arguments_are_refused_as_in_transformers(tiny_gpt2: Path) -> None:
    with pytest.raises(TypeError, match="no_such_thing"):
        plain(tiny_gpt2 / "recipient", no_such_thing=1)
    for call in (
        lambda: AutoModelWithTransplant.from_pretrained(tiny_gpt2 / "donor", no_such_thing=1),
        lambda: AutoModelForCausalLM.from_pretrained(tiny_gpt2 / "donor", no_such_thing=1),
        lambda: loaded(tiny_gpt2, no_such_thing=1),
    ):
        with pytest.raises(TypeError, match="no_such_thing"):
            call()


@pytest.mark.parametrize("class_", LOADERS)
def test_device_map_to_the_cpu(tiny: Path, class_: Any) -> None:
    model = class_.from_pretrained(tiny / "donor", device_map={"": "cpu"})
    assert torch.equal(logits_of(model), logits_of(AutoModelWithTransplant.from_pretrained(tiny / "donor")))


def offload_map(model: Any, on_disk: range) -> dict[str, str]:
    """All on the CPU, some decoder layers on disk."""
    stack = "transformer.h" if hasattr(model, "transformer") else "model.layers"
    rest = {name: "cpu" for name, _ in model.named_parameters() if f"{stack}." not in name}
    rest |= {name: "cpu" for name, _ in model.named_buffers() if f"{stack}." not in name}
    modules = {name.rpartition(".")[0] or name: "cpu" for name in rest}
    layers = {f"{stack}.{n}": "disk" if n in on_disk else "cpu" for n in range(len(layers_of(model)))}
    return {**modules, "lm_head": "cpu", **layers}


@pytest.mark.parametrize("on_disk", [range(6), range(1, 3), range(3, 6)])
def test_offload_to_disk(tiny: Path, tmp_path: Path, on_disk: range) -> None:
    """Recipient and donor files are used where they are; nothing is written when they can be mapped."""
    reference = loaded(tiny)
    model = loaded(tiny, device_map=offload_map(reference, on_disk), offload_folder=tmp_path / "offload")
    parameters = dict(layers_of(model)[on_disk[0]].named_parameters())
    assert all(parameter.is_meta for parameter in parameters.values())
    torch.testing.assert_close(logits_of(model), logits_of(reference), rtol=0, atol=0)
    assert torch.equal(generated(model), generated(reference))


def test_offload_to_disk_and_the_switch(tiny: Path, tmp_path: Path) -> None:
    reference = loaded(tiny)
    model = loaded(tiny, device_map=offload_map(reference, range(1, 5)), offload_folder=tmp_path / "offload")
    recipient = plain(tiny / "recipient")
    with model.disable_transplants():
        assert torch.equal(logits_of(model), logits_of(recipient))
        assert torch.equal(generated(model), generated(recipient))
    assert torch.equal(logits_of(model), logits_of(reference))


def test_offloaded_with_a_strength(tiny: Path, tmp_path: Path) -> None:
    reference = loaded(tiny, strength=0.5)
    on_disk = offload_map(reference, range(6))
    model = loaded(tiny, strength=0.5, device_map=on_disk, offload_folder=tmp_path / "offload")
    assert torch.equal(logits_of(model), logits_of(reference))
    model.save_pretrained(tmp_path / "full")
    assert torch.equal(logits_of(plain(tmp_path / "full")), logits_of(reference))


def test_offloaded_layers_that_are_replaced_cannot_be_saved(tiny_llama: Path, tmp_path: Path) -> None:
    fields = {"second": "replace", "strength": 0.5, "keep_replaced": True}
    on_disk = offload_map(two_donors(tiny_llama, **fields), range(9))
    on_disk |= {f"model.layers.{n}": "disk" for n in range(9)}
    model = two_donors(tiny_llama, **fields, device_map=on_disk, offload_folder=tmp_path / "offload")
    with refused(ConfigurationError, "layers that donors replace are offloaded", "thin=True"):
        model.save_pretrained(tmp_path / "full")
    assert not (tmp_path / "full").exists()


def test_key_mapping_does_not_disturb_the_donor(tiny_llama: Path) -> None:
    model = loaded(tiny_llama, key_mapping={"^nothing_like_this": "x"})
    assert torch.equal(logits_of(model), logits_of(loaded(tiny_llama)))


def test_without_memory_maps(tiny: Path) -> None:
    model = loaded(tiny, disable_mmap=True)
    assert torch.equal(logits_of(model), logits_of(loaded(tiny)))


def test_a_generation_config_of_ones_own(tiny_gpt2: Path) -> None:
    own = plain(tiny_gpt2 / "recipient").generation_config
    own.max_new_tokens = 2
    model = AutoModelWithTransplant.from_pretrained(tiny_gpt2 / "donor", generation_config=own)
    assert model.generation_config.max_new_tokens == 2


def test_num_labels_and_labels(tiny_gpt2: Path) -> None:
    labels = {0: "a", 1: "b", 2: "c"}
    model = AutoModelForSequenceClassification.from_pretrained(tiny_gpt2 / "donor", id2label=labels)
    assert model.config.id2label == labels
    assert model.score.out_features == 3
