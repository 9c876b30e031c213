"""vLLM serves thin transplants and donors with the log-probabilities of Transformers; `make vllm` runs these tests."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.helpers import TOKENS, make_family, randomised
from transplant_hf import AutoModelWithTransplant, DonorSpec

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed; see `make vllm`"),
]

PROMPT = [7 * number % 250 for number in range(24)]  # longer than every sliding window
# In a process of its own, as vLLM wants it.
RUN = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    model, dtype, prompt, result, ranks = json.loads(sys.argv[1])
    formats = {"config_format": "transplant", "load_format": "transplant", "tensor_parallel_size": ranks}
    llm = LLM(model, dtype=dtype, max_model_len=64, enforce_eager=True, **formats)
    sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=3, prompt_logprobs=1)
    made = llm.generate([{"prompt_token_ids": prompt}], sampling)[0]
    output = made.outputs[0]
    rows = [*made.prompt_logprobs[1:], *output.logprobs]
    with open(result, "w") as file:
        found = [{int(token): entry.logprob for token, entry in row.items()} for row in rows]
        json.dump({"tokens": list(output.token_ids), "logprobs": found}, file)
"""
# The smallest width of heads that vLLM's attention on CPUs has.
SIZES: dict[str, Any] = {
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    **TOKENS,
}
WINDOWS: dict[str, Any] = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {}),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, {**WINDOWS, "query_pre_attn_scalar": 32}),
    "gpt_oss": (GptOssForCausalLM, GptOssConfig, {**WINDOWS, "num_local_experts": 4, "num_experts_per_tok": 2}),
}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """A function that makes the recipient and the donor of an architecture, once."""
    made: dict[tuple[str, str], Path] = {}

    def make(name: str, dtype: str = "float32") -> Path:
        model_class, config_class, fields = MODELS[name]

        def build(seed: int) -> Any:
            return randomised(model_class(config_class(**SIZES, **fields)), seed).to(getattr(torch, dtype))

        if (name, dtype) not in made:
            made[name, dtype] = make_family(tmp_path_factory.mktemp(name), build)
        return made[name, dtype]

    return make


VARIABLES = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}


def run_vllm(model: Path, dtype: str, folder: Path, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    result = folder / "result.json"
    # Without it, vLLM wants a NUMA node for each rank.
    cores = {} if ranks == 1 else {"VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, range(ranks)))}
    return subprocess.run(
        [sys.executable, "-c", RUN, json.dumps([str(model), dtype, PROMPT, str(result), ranks])],
        env=os.environ | VARIABLES | cores,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )


def assert_equal_in_vllm(model: Path, folder: Path, dtype: str = "float32", ranks: int = 1) -> None:
    """Compare greedy tokens, and the log-probability of each token of prompt and output, with Transformers."""
    run = run_vllm(model, dtype, folder, ranks)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-6000:]
    found = json.loads((folder / "result.json").read_text())
    ids = torch.tensor([PROMPT + found["tokens"]])
    expected = logprobs(model, ids, "float32")
    # In another dtype, as far from float32 as Transformers is, within a factor of 2.
    tolerance = 2 * float((logprobs(model, ids, dtype) - expected).abs().max()) or 2e-4
    for number, row in enumerate(found["logprobs"]):
        for token, value in row.items():
            assert value == pytest.approx(float(expected[number, int(token)]), abs=tolerance), number
    for number, token in enumerate(found["tokens"], start=len(PROMPT) - 1):
        assert expected[number].max() - expected[number, token] <= tolerance


@torch.no_grad()
def logprobs(model: Path, ids: torch.Tensor, dtype: str) -> torch.Tensor:
    transplant = AutoModelWithTransplant.from_pretrained(model, dtype=dtype)
    return transplant(ids, use_cache=False).logits[0].float().log_softmax(-1)


def thin(recipient: Path, donors: Any, folder: Path) -> Path:
    AutoModelWithTransplant.from_pretrained(recipient, donors=donors).save_pretrained(folder, thin=True)
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_a_donor_is_served(name: str, family: Callable[..., Path], tmp_path: Path) -> None:
    assert_equal_in_vllm(family(name) / "donor", tmp_path)


def test_a_donor_is_served_in_bfloat16(family: Callable[..., Path], tmp_path: Path) -> None:
    assert_equal_in_vllm(family("llama", "bfloat16") / "donor", tmp_path, "bfloat16")


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="each rank has a core of its own")
def test_tensor_parallel(family: Callable[..., Path], tmp_path: Path) -> None:
    assert_equal_in_vllm(family("llama") / "donor", tmp_path, ranks=2)


def test_a_thin_transplant_is_served(family: Callable[..., Path], tmp_path: Path) -> None:
    """One donor replaces layers, another is spread through the recipient."""
    folder = family("llama")
    donor = str(folder / "donor")
    donors = [DonorSpec(donor, 2, mode="replace", name="one"), DonorSpec(donor, (0, 4), name="two")]
    assert_equal_in_vllm(thin(folder / "recipient", donors, tmp_path / "thin"), tmp_path)


def test_kinds_that_do_not_repeat(family: Callable[..., Path], tmp_path: Path) -> None:
    """vLLM reads the kinds of layers of Gemma 3 from the configuration."""
    folder = family("gemma3")
    model = thin(folder / "recipient", {str(folder / "donor"): 2}, tmp_path / "thin")
    assert_equal_in_vllm(model, tmp_path)


def test_kinds_that_vllm_does_not_read(family: Callable[..., Path], tmp_path: Path) -> None:
    folder = family("gpt_oss")
    run = run_vllm(thin(folder / "recipient", {str(folder / "donor"): 2}, tmp_path / "thin"), "float32", tmp_path)
    assert run.returncode != 0
    assert "derives the kind of attention of a gpt_oss layer from its number" in run.stdout + run.stderr


def test_the_server(family: Callable[..., Path], tmp_path: Path) -> None:
    """The server of `vllm serve`, in the way in which vllm-cpu 0.32.0 can start it, and a request to it."""
    donor = family("llama") / "donor"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    words = [
        "--model",
        str(donor),
        "--config-format",
        "transplant",
        "--load-format",
        "transplant",
        "--dtype",
        "float32",
    ]
    words += ["--host", "127.0.0.1", "--port", address.partition(":")[2], "--max-model-len", "64", "--enforce-eager"]
    log = tmp_path / "log"
    with log.open("w") as file:
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words]
        server = subprocess.Popen(command, env=os.environ | VARIABLES, stdout=file, stderr=file)
    body = {"model": str(donor), "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "return_token_ids": True}
    try:
        found = completed(address, body, server)["token_ids"]
    except (AssertionError, TimeoutError) as error:
        raise AssertionError(log.read_text()[-6000:]) from error
    finally:
        server.terminate()
        server.wait(60)
    transplant = AutoModelWithTransplant.from_pretrained(donor, dtype="float32")
    expected = transplant.generate(torch.tensor([PROMPT]), max_new_tokens=8, do_sample=False)
    assert found == expected[0, len(PROMPT) :].tolist()


def completed(address: str, body: dict[str, Any], server: subprocess.Popen[bytes]) -> Any:
    """Return the completion of a server that is being started."""
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(f"http://{address}/v1/completions", json.dumps(body).encode(), headers)
    for _ in range(500):
        assert server.poll() is None
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                return json.load(answer)["choices"][0]
        except urllib.error.HTTPError:
            raise
        except (urllib.error.URLError, ConnectionError):
            time.sleep(1)
    raise TimeoutError(f"nothing answers at {address}")
