"""Rows of llama.cpp: an export converted by its converter, with the snippet of docs/export.md, and run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.ecosystem.cases import Case
from tests.helpers import copied, edit_json, logits_of
from transplant_hf.exporting import export

# A folder with llama.cpp's convert_hf_to_gguf.py.
LLAMA_CPP = "TRANSPLANT_HF_LLAMA_CPP"
ROOT = Path(__file__).parents[2]
# The converter knows tokenizers by fingerprints, that of the tests not among them; it splits text as GPT-2's does.
KNOWN_TOKENIZER = """
import sys
sys.path[:0] = [".", "gguf-py"]
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
"""
# Tensors that no converter permutes or transposes, by the words that GGUF has for them.
NORMS = {"gpt2": ("ln_1.weight", "attn_norm.weight"), "gemma3": ("input_layernorm.weight", "attn_norm.weight")}
# Of the difference of logits in llama.cpp, whose cache holds float16.
TOLERANCE = 0.02


@pytest.fixture
def converter() -> Path:
    named = os.environ.get(LLAMA_CPP)
    if not named or not (Path(named) / "convert_hf_to_gguf.py").is_file():
        pytest.skip(f"{LLAMA_CPP} names no folder with convert_hf_to_gguf.py")
    pytest.importorskip("sentencepiece", reason="the converter imports sentencepiece")
    return Path(named)


def converted(case: Case, converter: Path, folder: Path) -> Path:
    """Export a case, and convert the export in a process of its own."""
    recipient = copied(case.recipient, folder / "recipient")
    if case.architecture == "gpt2":
        edit_json(recipient / "config.json", n_ctx=128)  # as in the original; Transformers 5 writes none for new models
    tokenizer = json.loads((recipient / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {"th": 258, "he": 259}
    tokenizer["model"]["merges"] = [["t", "h"], ["h", "e"]]  # llama.cpp loads no byte-level tokenizer without merges
    (recipient / "tokenizer.json").write_text(json.dumps(tokenizer))
    export(recipient, folder / "full", {str(case.donor): case.position})
    found = re.search(
        r"<!-- snippet: gguf -->\n```python\n(.*?)```", (ROOT / "docs" / "export.md").read_text(), re.DOTALL
    )
    assert found, "docs/export.md has no snippet gguf"
    target = folder / "full.gguf"
    arguments = [str(folder / "full"), "--outfile", str(target), "--outtype", "f32"]
    run = subprocess.run(
        [sys.executable, "-c", KNOWN_TOKENIZER + found[1], *arguments],
        cwd=converter,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return target


@pytest.mark.slow
@pytest.mark.ecosystem(section="Export", feature="GGUF by llama.cpp's converter")
def test_gguf(case: Case, converter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many blocks as layers run, the donor's own values in its place, and the kind of each layer."""
    path = converted(case, converter, tmp_path)
    monkeypatch.syspath_prepend(str(converter / "gguf-py"))
    import gguf

    reader: Any = gguf.GGUFReader(path)
    architecture = reader.get_field("general.architecture").contents()
    assert reader.get_field(f"{architecture}.block_count").contents() == 6
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert {int(name.split(".")[1]) for name in tensors if name.startswith("blk.")} == set(range(6))
    weights = load_file(case.donor / "donor.safetensors")
    inside, theirs = NORMS.get(case.architecture, ("input_layernorm.weight", "attn_norm.weight"))
    shift = (
        1.0 if case.architecture == "gemma3" else 0.0
    )  # llama.cpp's norm multiplies by the weight, Gemma's by 1 + it
    for number in (0, 1):
        expected = weights[f"layers.{number}.{inside}"].float() + shift
        assert torch.equal(torch.tensor(tensors[f"blk.{number + case.position}.{theirs}"].data.copy()), expected)
    kinds = getattr(case.independent().config, "layer_types", None)
    if kinds and "sliding_attention" in kinds:
        pattern = reader.get_field(f"{architecture}.attention.sliding_window_pattern").contents()
        assert pattern == [kind == "sliding_attention" for kind in kinds]


@pytest.mark.slow
@pytest.mark.ecosystem(section="Export", feature="llama.cpp runs that GGUF: logits")
def test_llama_cpp(case: Case, converter: Path, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama_cpp is not installed; see [export](export.md)")
    model = llama_cpp.Llama(
        str(converted(case, converter, tmp_path)), n_ctx=64, n_threads=1, logits_all=True, verbose=False
    )
    ids = case.ids[:1]
    expected = logits_of(case.independent(), ids)[0]
    model.eval(ids[0].tolist())
    found = torch.tensor(model.scores[: ids.shape[1]].copy())
    model.close()
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
