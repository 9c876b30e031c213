"""Memory does not grow with what is exported: anonymous memory, in a process of its own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.exporting.gguf_recipients import NAME, tiny_model, write_model
from tests.helpers import run_python
from transplant_hf import Donor

_MOST_MIB = 40

CODE = """
import sys, threading
from transplant_hf.exporting import export
import transplant_hf.donor, transformers.models.llama.modeling_llama

source, output, gguf = *sys.argv[1:3], (sys.argv[3] if len(sys.argv) > 3 else None)

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1024

export(source, output + "-first", gguf=gguf, verify=False)  # what is imported late is there
before, peak, done = anonymous(), [0.0], threading.Event()

def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], anonymous())

thread = threading.Thread(target=watch)
thread.start()
export(source, output, gguf=gguf, verify=gguf is not None)
done.set()
thread.join()
print(peak[0] - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=4, num_attention_heads=8, vocab_size=4096
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "recipient")
    donor = Donor.from_model(model, [1, 2], name="donor")
    donor.save_pretrained(tmp_path / "donor", position=1, recipient=str(tmp_path / "recipient"))
    grown = float(run_python(CODE, tmp_path / "donor", tmp_path / "full"))
    size = (tmp_path / "full" / "model.safetensors").stat().st_size / 2**20
    assert size > 5 * _MOST_MIB
    assert grown < _MOST_MIB, f"{grown:.0f} MiB more while {size:.0f} MiB were written"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_of_a_gguf_file_is_that_of_a_donors_tensor(tmp_path: Path) -> None:
    """A matrix of 8 MiB, read, in float32, laid out, and packed; recipient tensors are written from their file."""
    pytest.importorskip("gguf")
    shape = {"hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 128, "num_key_value_heads": 128}
    model = tiny_model("llama", 1, **shape)
    path = write_model(model, "llama", tmp_path / NAME, "F32")
    donor = Donor.from_model(model, [1, 2, 3, 4, 5], name="donor")
    donor.save_pretrained(tmp_path / "donor", position=1, recipient=str(tmp_path))
    grown = float(run_python(CODE, tmp_path / "donor", tmp_path / "out.gguf", path))
    size = (tmp_path / "out.gguf").stat().st_size / 2**20
    assert size > 5 * _MOST_MIB
    assert grown < _MOST_MIB, f"{grown:.0f} MiB more while {size:.0f} MiB were written"
