"""Models of the sizes that matter, by their configurations alone."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import refused, run_python
from transplant_hf import ConfigurationError
from transplant_hf.planning import plan

LLAMA_405B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


def gpt_oss(layers: int, experts: int) -> dict[str, Any]:
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": layers,
        "num_local_experts": experts,
        "num_experts_per_tok": 4,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "attention_bias": True,
        "vocab_size": 201088,
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * (layers // 2),
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
        },
    }


def written(folder: Path, fields: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


# Numbers and bytes by hand from the shapes: H hidden, I intermediate, V vocabulary, E experts, Q heads and K key-value
# heads of D numbers.
def llama_numbers(layers: int, H: int = 16384, I: int = 53248, V: int = 128256, K: int = 8, D: int = 128) -> int:  # noqa: N803, E741
    each = 2 * H * H + 2 * H * K * D + 3 * H * I + 2 * H
    return 2 * V * H + H + layers * each


def gpt_oss_parts(layers: int, experts: int, H: int = 2880, V: int = 201088) -> tuple[int, int]:  # noqa: N803
    """Numbers of experts' matrices, and all others."""
    matrices = layers * experts * 3 * H * H
    attention = 2 * (H * 64 * 64) + 64 * 64 + H + 2 * (H * 8 * 64 + 8 * 64) + 64
    others = layers * (attention + 2 * H + H * experts + experts + experts * 3 * H) + 2 * V * H + H
    return matrices, others


@pytest.mark.slow
def test_llama_405b(tmp_path: Path) -> None:
    found = plan(written(tmp_path, LLAMA_405B), count=6, context=8192, devices=8, memory="90GiB")
    assert found.before.parameters == llama_numbers(126) == 405_853_388_800
    assert found.after.parameters == llama_numbers(132)
    assert found.before.weights == {"bfloat16": 2 * llama_numbers(126)}
    # Keys and values, 8 heads of 128 numbers of two bytes.
    assert found.before.cache_per_token == 126 * 2 * 8 * 128 * 2
    assert found.after.cache_bytes == 132 * 2 * 8 * 128 * 2 * 8192
    assert sum(share.weights for share in found.after.shares) == found.after.weight_bytes + found.after.buffers
    assert not found  # 720 GiB for 792 GiB of weights
    assert plan(tmp_path, count=6, context=8192, devices=8, memory="141GB")


@pytest.mark.parametrize(
    ("layers", "experts", "billions"), [(24, 32, 20.9), pytest.param(36, 128, 116.8, marks=pytest.mark.slow)]
)
def test_gpt_oss(tmp_path: Path, layers: int, experts: int, billions: float) -> None:
    folder = written(tmp_path, gpt_oss(layers, experts))
    found = plan(folder, count=3, context=32768)
    matrices, others = gpt_oss_parts(layers, experts)
    assert found.before.parameters == matrices + others
    assert round(found.before.parameters / 1e9, 1) == billions
    # Four bits a number, and a byte for 32 of them.
    assert found.before.weights == {"uint8": matrices // 2 + matrices // 32, "bfloat16": 2 * others}
    # Donors are trained in full precision, and stay so.
    each = (matrices // layers, (others - 2 * 201088 * 2880 - 2880) // layers)
    assert found.after.weight_bytes - found.before.weight_bytes == 3 * 2 * sum(each)
    assert found.after.weights["uint8"] == found.before.weights["uint8"]
    sliding, full = found.before.cache
    assert (sliding.total, full.total) == (layers // 2 * 2048 * 127, layers // 2 * 2048 * 32768)
    whole = plan(folder, count=3, dequantize=True)
    assert whole.before.weights == {"bfloat16": 2 * found.before.parameters}


def test_size_of_the_authors_donor_of_gpt_oss_20b(tmp_path: Path) -> None:
    (donor,) = plan(written(tmp_path, gpt_oss(24, 32)), count=3).donors
    assert round(donor.weights / 2**30, 3) == 4.600


def test_another_quantization_is_refused(tmp_path: Path) -> None:
    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    fields = {**LLAMA_405B, **small, "num_key_value_heads": 2}
    folder = written(tmp_path, {**fields, "quantization_config": {"quant_method": "awq", "bits": 4}})
    with refused(ConfigurationError, "quantized with awq", "--dequantize"):
        plan(folder, count=1)
    assert plan(folder, count=1, dequantize=True).before.parameters == llama_numbers(3, 64, 96, K=2, D=16)


PROBE = """
import resource, sys, time
from transplant_hf.planning import plan
plan(sys.argv[2], count=1)
before, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
plan(sys.argv[1], count=6, context=8192, devices=8, memory="200GiB")
print(time.process_time() - before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak)
"""


@pytest.mark.slow
def test_it_is_quick_and_small(tmp_path: Path, tiny_llama: Path) -> None:
    """Processor time and memory of the plan itself, imports apart; a shared machine may take longer by the clock."""
    folder = written(tmp_path, LLAMA_405B)
    seconds, kibibytes = run_python(PROBE, folder, tiny_llama / "recipient").split()
    assert float(seconds) < 10
    assert int(kibibytes) < 300 * 1024
    assert os.listdir(folder) == ["config.json"]


def test_a_context_longer_than_the_model_reads_is_noted(tiny_llama: Path) -> None:
    reads = json.loads((tiny_llama / "recipient/config.json").read_text())["max_position_embeddings"]
    assert reads < 4096
    assert plan(tiny_llama / "donor").context == reads
    assert plan(tiny_llama / "donor", context=reads).context == reads
    assert not plan(tiny_llama / "donor").notes
    found = plan(tiny_llama / "donor", context=reads + 1)
    assert found.context == reads + 1
    assert f"more than the {reads} tokens that" in found.notes[0]
