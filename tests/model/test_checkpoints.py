"""Recipients and donors as their files may be: sharded, pickled, without a prefix, one tensor for each expert."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    Qwen3MoeConfig,
)

from tests.helpers import (
    DONOR_LAYERS,
    NUM_LAYERS,
    TOKENS,
    Graft,
    copied,
    generated,
    loaded,
    logits_of,
    plain,
    randomised,
    reference_logits,
)
from transplant_hf import AutoModelWithTransplant, Donor, DonorSpec, export

load = AutoModelWithTransplant.from_pretrained
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def assert_loads_and_exports_as_before(family: Path, original: Path, unexpected: int = 0) -> None:
    """An export has the names that Transformers writes."""
    model, info = load(family / "donor", output_loading_info=True)
    assert not info["missing_keys"]
    assert len(info["unexpected_keys"]) == unexpected
    wanted = logits_of(load(original / "donor"))
    assert torch.equal(logits_of(model), wanted)
    export(family / "donor", family / "full", verify=False)
    assert set(load_file(family / "full" / "model.safetensors")) <= set(model.state_dict())
    assert torch.equal(logits_of(plain(family / "full")), wanted)


def test_a_sharded_recipient(tiny: Path, tmp_path: Path) -> None:
    family = copied(tiny, tmp_path / "family")
    model = plain(tiny / "recipient")
    (family / "recipient" / "model.safetensors").unlink()
    model.save_pretrained(family / "recipient", max_shard_size="30KB")
    assert len(list((family / "recipient").glob("model-*.safetensors"))) > 2
    assert_loads_and_exports_as_before(family, tiny)


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_a_bin_recipient(tiny: Path, tmp_path: Path, form: str) -> None:
    family = copied(tiny, tmp_path / "family")
    weights = load_file(family / "recipient" / "model.safetensors")
    target = family / "recipient" / "pytorch_model.bin"
    torch.save(weights, target, _use_new_zipfile_serialization=form == "zip")
    (family / "recipient" / "model.safetensors").unlink()
    assert_loads_and_exports_as_before(family, tiny)


@pytest.mark.parametrize("masks", [False, True])
def test_gpt2_without_a_prefix(tiny_gpt2: Path, tmp_path: Path, masks: bool) -> None:
    """As OpenAI's own checkpoint is, causal masks included."""
    family = copied(tiny_gpt2, tmp_path / "family")
    path = family / "recipient" / "model.safetensors"
    weights = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    if masks:
        weights |= {f"h.{n}.attn.bias": torch.ones(1, 1, 64, 64) for n in range(NUM_LAYERS)}
    save_file(weights, path, metadata={"format": "pt"})
    assert_loads_and_exports_as_before(family, tiny_gpt2)


def test_layers_beyond_the_recipients_depth_stay_unexpected(tiny_llama: Path, family: Path) -> None:
    """As in Transformers; they must not be taken for the donor's."""
    path = family / "recipient" / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.4.mlp.up_proj.weight"] = torch.ones_like(weights["model.layers.3.mlp.up_proj.weight"])
    save_file(weights, path, metadata={"format": "pt"})
    assert_loads_and_exports_as_before(family, tiny_llama, unexpected=1)


@pytest.mark.parametrize("config_class", [MixtralConfig, Qwen3MoeConfig])
@pytest.mark.parametrize("mode", ["insert", "replace"])
def test_experts_that_are_separate_in_the_files(tmp_path: Path, config_class: Any, mode: str) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "head_dim": 8, "num_experts_per_tok": 2}
    sizes |= (
        {"num_local_experts": 3} if config_class is MixtralConfig else {"num_experts": 3, "moe_intermediate_size": 12}
    )

    def build(seed: int) -> Any:
        return randomised(AutoModelForCausalLM.from_config(config_class(**sizes, **TOKENS)), seed)

    recipient, source = build(1), build(2)
    recipient.save_pretrained(tmp_path / "recipient")
    assert any(".experts.2." in name for name in load_file(tmp_path / "recipient" / "model.safetensors"))
    donor = Donor.from_model(source, DONOR_LAYERS, name="donor")
    donor.save_pretrained(tmp_path / "donor", position=1, recipient=str(tmp_path / "recipient"))
    model, info = loaded(tmp_path, 1, mode, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    expected = reference_logits(recipient, [Graft(source, DONOR_LAYERS, 1, replace=mode == "replace")])
    torch.testing.assert_close(logits_of(model), expected, **TOLERANCE)
    assert torch.equal(generated(model, use_cache=True), generated(model, use_cache=False))
    model.save_pretrained(tmp_path / "full")
    assert any(".experts.2." in name for name in load_file(tmp_path / "full" / "model.safetensors"))
    assert torch.equal(logits_of(plain(tmp_path / "full")), logits_of(model))


def test_a_donor_used_twice_does_not_share_memory(tiny_llama: Path) -> None:
    donor = str(tiny_llama / "donor")
    model = load(tiny_llama / "recipient", donors=[DonorSpec(donor, 0, name="a"), DonorSpec(donor, 2, name="b")])
    first, second = model.model.layers[0].mlp.up_proj.weight, model.model.layers[4].mlp.up_proj.weight
    assert torch.equal(first, second)
    with torch.no_grad():
        first.zero_()
    assert second.detach().abs().max() > 0


def test_a_donor_of_its_own_recipient(tiny_llama: Path, tmp_path: Path) -> None:
    recipient = plain(tiny_llama / "recipient")
    Donor.from_model(recipient, [1], name="again").save_pretrained(tmp_path / "again", position=2)
    model = load(tmp_path / "again")
    torch.testing.assert_close(logits_of(model), reference_logits(recipient, [Graft(recipient, [1], 2)]), **TOLERANCE)


@pytest.mark.parametrize(("ours", "theirs"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_a_donor_of_another_dtype(tiny_llama: Path, tmp_path: Path, ours: torch.dtype, theirs: torch.dtype) -> None:
    """The model has one dtype: the recipient's, as `dtype="auto"` has it."""
    plain(tiny_llama / "recipient", dtype=ours).save_pretrained(tmp_path / "recipient")
    donor = Donor.from_model(plain(tiny_llama / "source", dtype=theirs), DONOR_LAYERS, name="donor")
    donor.save_pretrained(tmp_path / "donor", position=1, recipient=str(tmp_path / "recipient"))
    model = load(tmp_path / "donor")
    assert {parameter.dtype for parameter in model.parameters()} == {ours}
    assert torch.equal(generated(model, use_cache=True), generated(model, use_cache=True))
