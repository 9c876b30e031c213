"""Layers taken out of a loaded model, named and typed as its checkpoint would be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import prune
from transformers import AutoModelForCausalLM, GPT2Config, MixtralConfig, Qwen3MoeConfig

from tests.helpers import TOKENS, Shelf, loaded, logits_of, plain, refused, tiny_gpt2_model, tiny_llama_model
from transplant_hf import CheckpointError, ConfigurationError, Donor, transplant

PREFIXES = {"gpt2": "transformer.h", "llama": "model.layers", "gpt_oss": "model.layers"}


def layers_in(path: Path, prefix: str, layers: list[int]) -> dict[str, torch.Tensor]:
    """Read a checkpoint's layers under a donor's names."""
    tensors = load_file(path)
    return {
        f"layers.{number}.{name.removeprefix(f'{prefix}.{layer}.')}": tensor
        for number, layer in enumerate(layers)
        for name, tensor in tensors.items()
        if name.startswith(f"{prefix}.{layer}.")
    }


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("layers", [[0], [1, 2], [0, 1, 2, 3], [3]])
def test_names_are_the_checkpoints(tiny: Path, layers: list[int]) -> None:
    donor = Donor.from_model(plain(tiny / "source"), layers)
    prefix = PREFIXES[donor.model_type]
    assert (donor.num_layers, donor.layer_indices) == (len(layers), layers)
    assert_same(donor.tensors(), layers_in(tiny / "source" / "model.safetensors", prefix, layers))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_are_the_models(tiny_llama: Path, dtype: torch.dtype) -> None:
    donor = Donor.from_model(plain(tiny_llama / "source", dtype=dtype), [1])
    assert {tensor.dtype for tensor in donor.tensors().values()} == {dtype}


@pytest.mark.parametrize("config_class", [MixtralConfig, Qwen3MoeConfig])
def test_experts_are_separate_as_in_the_checkpoint(tmp_path: Path, config_class: Any) -> None:
    """In memory they are one tensor."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    experts = {"num_key_value_heads": 1, "head_dim": 8, "num_experts_per_tok": 2}
    experts |= (
        {"num_local_experts": 3} if config_class is MixtralConfig else {"num_experts": 3, "moe_intermediate_size": 12}
    )
    model = AutoModelForCausalLM.from_config(config_class(**sizes, **experts, **TOKENS))
    model.save_pretrained(tmp_path)
    donor = Donor.from_model(model, [1, 2])
    assert any(".experts.2." in name for name in donor.tensors())
    assert_same(donor.tensors(), layers_in(tmp_path / "model.safetensors", "model.layers", [1, 2]))


@pytest.mark.parametrize("layers", [[], [2, 1], [1, 1]])
def test_layers_are_in_ascending_order(layers: list[int]) -> None:
    with refused(ConfigurationError, "ascending order", str(layers)):
        Donor.from_model(tiny_gpt2_model(0), layers)


@pytest.mark.parametrize("layers", [[-1, 0], [3, 4], [7]])
def test_layers_exist(layers: list[int]) -> None:
    with refused(ConfigurationError, str(layers), "0..3", "4 layers"):
        Donor.from_model(tiny_gpt2_model(0), layers)


@pytest.mark.parametrize("layers", [range(1, 3), np.arange(1, 3), torch.tensor([1, 2]), {2, 1}, (np.int64(1), 2)])
def test_layers_in_other_containers(layers: Any, tmp_path: Path) -> None:
    donor = Donor.from_model(tiny_gpt2_model(0), layers, name="law")
    donor.save_pretrained(tmp_path, position=np.int64(1), recipient="user/base", strength=np.float32(0.5))
    written = Donor.from_pretrained(tmp_path)
    assert (written.layer_indices, written.position, written.strength) == ([1, 2], 1, 0.5)
    assert written.part(np.array([1])).layer_indices == [2]


@pytest.mark.parametrize("layers", ["12", 1, ["1"], [1.5], [True], {1: 2}, torch.tensor(1), None, [10**5000]])
def test_layers_are_a_list_of_whole_numbers(layers: Any) -> None:
    with refused(ConfigurationError, "whole numbers, and in ascending order", "[4, 5, 6]"):
        Donor.from_model(tiny_gpt2_model(0), layers)


def test_what_is_put_around_a_model_is_taken_off() -> None:
    model = tiny_gpt2_model(0)
    expected = Donor.from_model(model, [1, 2])
    for wrapped in (nn.DataParallel(model), torch.compile(model), nn.DataParallel(torch.compile(model))):
        donor = Donor.from_model(wrapped, [1, 2])
        assert_same(donor.tensors(), expected.tensors())
        assert donor.record == expected.record


@pytest.mark.parametrize("model", ["user/base", Path("base"), nn.Linear(2, 2), None, GPT2Config()])
def test_a_donor_comes_out_of_a_loaded_model(model: Any) -> None:
    with refused(ConfigurationError, "a loaded model"):
        Donor.from_model(model, [1])


@pytest.mark.parametrize(
    "change",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.spectral_norm,
        lambda module: prune.l1_unstructured(module, "weight", 0.5),
    ],
)
def test_computed_weights_are_refused(change: Any) -> None:
    """Their parameters have names that no checkpoint of the architecture has, so that nobody could load the donor."""
    model = tiny_gpt2_model(0)
    change(model.transformer.h[1].mlp.c_fc)
    with refused(
        CheckpointError, "transformer.h.1.mlp.c_fc.weight", "computed from other parameters", "remove_parametrizations"
    ):
        Donor.from_model(model, [1, 2])
    assert Donor.from_model(model, [2, 3]).num_layers == 2


def test_offloaded_layers_are_refused() -> None:
    model = tiny_gpt2_model(0)
    model.transformer.h[2].to("meta")
    with refused(CheckpointError, "transformer.h.2.", "offloaded", "without offload"):
        Donor.from_model(model, [1, 2])


def test_quantized_layers_are_refused() -> None:
    model = tiny_gpt2_model(0)
    weight = model.transformer.h[1].mlp.c_fc.weight
    model.transformer.h[1].mlp.c_fc.weight = torch.nn.Parameter(weight.to(torch.int8), requires_grad=False)
    with refused(CheckpointError, "transformer.h.1.mlp.c_fc.weight", "quantized", "int8"):
        Donor.from_model(model, [1])


def test_a_donor_taken_back_out_of_a_transplant(tiny: Path) -> None:
    """It knows its own source, not the spliced configuration it ran in."""
    original = Donor.from_pretrained(tiny / "donor")
    model = loaded(tiny, position=3, name="law")
    donor = Donor.from_model(model, [3, 4])
    assert_same(donor.tensors(), original.tensors())
    assert (donor.layer_indices, donor.name, donor.position) == ([1, 2], "law", 3)
    assert donor.record.source_config["model_type"] == original.model_type
    assert json.loads(json.dumps(donor.record.source_config)) == original.record.source_config


def test_recipient_layers_of_a_transplant(tiny: Path) -> None:
    model = loaded(tiny, position=1)
    donor = Donor.from_model(model, [3, 4])
    prefix = PREFIXES[donor.model_type]
    assert donor.layer_indices == [1, 2]
    assert_same(donor.tensors(), layers_in(tiny / "recipient" / "model.safetensors", prefix, [1, 2]))
    assert donor.record.source_id == str(tiny / "recipient")


def test_layers_of_two_sources_are_no_donor(tiny_gpt2: Path) -> None:
    with refused(ConfigurationError, "[2, 3]", "('donor', 2)", "('recipient', 1)", "one source"):
        Donor.from_model(loaded(tiny_gpt2, position=1), [2, 3])


# -- init="identity" ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", [0, 1, 2, 4])
def test_an_identity_changes_nothing(tiny: Path, position: int) -> None:
    model = plain(tiny / "recipient")
    donor = Donor.from_model(model, [1, 2], name="new", init="identity")
    assert (donor.layer_indices, donor.metadata) == ([1, 2], {"init": "identity"})
    assert torch.equal(logits_of(transplant(model, donor, position)), logits_of(model))


def test_an_identity_is_a_copy_but_for_its_output_projections(tiny: Path, tmp_path: Path) -> None:
    model = plain(tiny / "source")
    Donor.from_model(model, [1, 2], init="identity").save_pretrained(tmp_path / "new", position=3)
    new = Donor.from_pretrained(tmp_path / "new")
    zero = {name for name, tensor in new.tensors().items() if not tensor.any()}
    prefix = PREFIXES[new.model_type]
    wanted = layers_in(tiny / "source" / "model.safetensors", prefix, [1, 2])
    assert_same(new.tensors(), {name: tensor * (name not in zero) for name, tensor in wanted.items()})
    ends = (
        "o_proj.weight",
        "o_proj.bias",
        "c_proj.weight",
        "c_proj.bias",
        "down_proj.weight",
        "down_proj",
        "down_proj_bias",
    )
    assert zero == {name for name in wanted if name.endswith(ends)}
    assert new.metadata == {"init": "identity"}
    assert_same(Donor.from_model(model, [1, 2]).tensors(), wanted)


def test_an_identity_of_fused_experts(tmp_path: Path) -> None:
    """In memory they are one tensor, in the checkpoint one for each expert."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_config(
        MixtralConfig(**sizes, num_key_value_heads=1, head_dim=8, num_experts_per_tok=1, num_local_experts=7, **TOKENS)
    )
    tensors = Donor.from_model(model, [1], init="identity").tensors()
    zero = {name.rpartition(".experts.")[2] for name, tensor in tensors.items() if not tensor.any()}
    assert {f"{number}.w2.weight" for number in range(7)} <= zero
    assert len(zero) == 8


def test_what_was_recorded_of_trained_layers_is_not_true_of_their_identity(tiny_llama: Path) -> None:
    model = loaded(tiny_llama, position=1)
    model._transplant.blueprint.part("donor").donor.record.metadata["perplexity"] = 27.2
    assert Donor.from_model(model, [1, 2]).metadata == {"perplexity": 27.2}
    started = Donor.from_model(model, [1, 2], init="identity")
    assert (started.metadata, started.position) == ({"init": "identity"}, 1)


def test_an_identity_is_inserted(tiny_llama: Path) -> None:
    """Whatever was done with the layers it starts from: put in the place of others it would not be one."""
    model = loaded(tiny_llama, position=1, mode="replace")
    assert Donor.from_model(model, [1, 2]).mode == "replace"
    assert Donor.from_model(model, [1, 2], init="identity").mode == "insert"


def test_no_such_start() -> None:
    with refused(ConfigurationError, '"copy" or "identity"', "'zeros'"):
        Donor.from_model(tiny_llama_model(0), [1], init="zeros")


# -- Where it came from ------------------------------------------------------------------------------------------------


@pytest.mark.hub
def test_the_commit_of_a_plain_model(both: Shelf, tmp_path: Path) -> None:
    """Transformers keeps the name it was loaded by, and forgets the commit."""
    model = plain(both.base)  # type: ignore[arg-type]
    donor = Donor.from_model(model, [0], revision=both.base_commit)
    assert (donor.record.source_id, donor.record.source_revision) == (both.base, both.base_commit)
    donor.save_pretrained(tmp_path / "donor", position=1)
    config = json.loads((tmp_path / "donor" / "config.json").read_text())
    assert (config["recipient"], config["recipient_revision"]) == (both.base, both.base_commit)
    assert Donor.from_model(model, [0]).record.source_revision is None


def test_the_commit_of_a_transplant_is_its_own(tiny_llama: Path) -> None:
    model = loaded(tiny_llama, position=1)
    known = Donor.from_pretrained(tiny_llama / "donor").record.source_revision
    assert Donor.from_model(model, [1, 2], revision="0" * 40).record.source_revision == known
