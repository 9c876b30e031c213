"""The author's three donors, by their exact names and shapes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GptOssConfig, LlamaConfig, PreTrainedConfig

from tests.helpers import BUILDERS, layers_of, logits_of, plain, refused, write_tokenizer
from tests.pt_files.crafted import bits, saved
from transplant_hf import AutoModelWithTransplant, CheckpointError, Donor
from transplant_hf.architecture import Anatomy, native_class
from transplant_hf.conversion import SEEDS, Seed, convert, convert_seeds

KINDS = {"gpt2": "gpt2", "tinyllama": "llama", "gptoss": "gpt_oss"}
COUNTS = {"gpt2": {"n_layer": 12}, "tinyllama": {"num_hidden_layers": 22}, "gptoss": {"num_hidden_layers": 24}}


def test_the_seeds_are_the_authors() -> None:
    assert [(seed.folder, seed.recipient, seed.layers, seed.position) for seed in SEEDS] == [
        ("gpt2", "openai-community/gpt2", (4, 5, 6), 1),
        ("tinyllama", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", (7, 8, 9), 3),
        ("gptoss", "openai/gpt-oss-20b", (8, 9, 10), 4),
    ]


def metadata_of(seed: Seed) -> dict[str, Any]:
    return {"layer_indices": list(seed.layers), "best_position": seed.position, "model": seed.recipient}


@pytest.fixture
def author(tmp_path: Path) -> Path:
    """The author's repository with narrow layers, and the recipients they came from in `recipients/`."""
    for seed in SEEDS:
        model: Any = BUILDERS[KINDS[seed.folder]](seed=3, **COUNTS[seed.folder])
        model.save_pretrained(tmp_path / "recipients" / seed.folder)
        write_tokenizer(tmp_path / "recipients" / seed.folder)
        folder = tmp_path / "author" / seed.folder
        folder.mkdir(parents=True)
        saved(folder / "donor_layers.pt", [layers_of(model)[number].state_dict() for number in seed.layers])
        (folder / "donor_metadata.json").write_text(json.dumps(metadata_of(seed)))
    return tmp_path


def local(author: Path) -> list[Seed]:
    """The seeds with recipients that are at hand."""
    return [dataclasses.replace(seed, recipient=str(author / "recipients" / seed.folder)) for seed in SEEDS]


def test_all_seeds_are_converted_at_once(author: Path) -> None:
    done = convert_seeds(author / "out", source=author / "author", seeds=local(author), verify=True)
    assert [(one.layer_indices, one.position) for one in done] == [(seed.layers, seed.position) for seed in SEEDS]
    assert sorted(path.name for path in (author / "out").iterdir()) == sorted(seed.name for seed in SEEDS)
    for seed, one, recipient in zip(SEEDS, done, (author / "recipients" / seed.folder for seed in SEEDS), strict=True):
        folder = author / "out" / seed.name
        assert one.folder == str(folder)
        donor = Donor.from_pretrained(folder)
        assert (donor.name, donor.layer_indices, donor.position) == (seed.name, list(seed.layers), seed.position)
        assert donor.metadata == metadata_of(seed)
        layers = torch.load(author / "author" / seed.folder / "donor_layers.pt", weights_only=True)
        assert {name: bits(tensor) for name, tensor in donor.tensors().items()} == {
            f"layers.{n}.{name}": bits(tensor) for n, layer in enumerate(layers) for name, tensor in layer.items()
        }
        model = AutoModelWithTransplant.from_pretrained(folder)
        assert not torch.allclose(logits_of(model), logits_of(plain(recipient)), atol=1e-2)


def test_a_missing_seed_is_named(author: Path) -> None:
    (author / "author" / "tinyllama" / "donor_layers.pt").unlink()
    with refused(CheckpointError, "tinyllama/donor_layers.pt", str(author / "author")):
        convert_seeds(author / "out", source=author / "author", seeds=local(author))


def test_a_seed_that_records_other_layers_is_refused(author: Path) -> None:
    (author / "author" / "gpt2" / "donor_metadata.json").write_text(json.dumps({"layer_indices": [3, 4, 5]}))
    with refused(CheckpointError, "gpt2/donor_layers.pt", "asked for [4, 5, 6]", "[6] are missing"):
        convert_seeds(author / "out", source=author / "author", seeds=local(author))
    assert not (author / "out" / "not-gpt2").exists()


# -- Full size -------------------------------------------------------------------------------------------------------

CONFIGS: dict[str, tuple[PreTrainedConfig, torch.dtype, int]] = {
    "gpt2": (GPT2Config(), torch.float32, 80 << 20),
    "tinyllama": (
        LlamaConfig(
            hidden_size=2048,
            intermediate_size=5632,
            num_hidden_layers=22,
            num_attention_heads=32,
            num_key_value_heads=4,
            max_position_embeddings=2048,
            vocab_size=32000,
        ),
        torch.bfloat16,
        250 << 20,
    ),
    "gptoss": (
        GptOssConfig(hidden_size=128, intermediate_size=96, head_dim=16, num_hidden_layers=24, num_local_experts=32),
        torch.bfloat16,
        1 << 20,
    ),
}


def random_layers(config: PreTrainedConfig, dtype: torch.dtype, layers: tuple[int, ...]) -> list[Any]:
    """State dicts by a configuration alone: no whole model is made."""
    from transformers import AutoModelForCausalLM

    anatomy = Anatomy(*native_class(AutoModelForCausalLM, config, "a test"), "a test")
    generator = torch.Generator().manual_seed(0)
    return [
        {
            name: torch.randn(tensor.shape, generator=generator).mul_(0.02).to(dtype)
            for name, tensor in anatomy.layers[number].state_dict().items()
        }
        for number in layers
    ]


@pytest.mark.parametrize(
    "name", [pytest.param("gpt2", marks=pytest.mark.slow), pytest.param("tinyllama", marks=pytest.mark.slow), "gptoss"]
)
def test_a_seed_of_full_size(name: str, tmp_path: Path) -> None:
    config, dtype, least = CONFIGS[name]
    seed = next(seed for seed in SEEDS if seed.folder == name)
    config.save_pretrained(tmp_path / "recipient")
    layers = random_layers(config, dtype, seed.layers)
    path = saved(tmp_path / "donor_layers.pt", layers)
    assert path.stat().st_size > least
    done = convert(
        path,
        tmp_path / "recipient",
        tmp_path / "donor",
        layers=seed.layers,
        position=seed.position,
        max_shard_size="100MB",
        verify=True,
    )
    assert len(done.files) == {"gpt2": 1, "tinyllama": 3, "gptoss": 1}[name]
    found = Donor.from_pretrained(tmp_path / "donor").tensors()
    assert len(found) == sum(map(len, layers))
    for number, layer in enumerate(layers):
        assert all(torch.equal(found[f"layers.{number}.{key}"], tensor) for key, tensor in layer.items())


def test_gpt_oss_keeps_the_names_of_the_real_checkpoint() -> None:
    config, dtype, _ = CONFIGS["gptoss"]
    (layer,) = random_layers(config, dtype, (8,))
    assert {name: list(tensor.shape) for name, tensor in layer.items() if "experts" in name} == {
        "mlp.experts.gate_up_proj": [32, 128, 192],
        "mlp.experts.gate_up_proj_bias": [32, 192],
        "mlp.experts.down_proj": [32, 96, 128],
        "mlp.experts.down_proj_bias": [32, 128],
    }
