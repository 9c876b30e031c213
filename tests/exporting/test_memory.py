"""Memory does not grow with what is exported: anonymous memory, in a process of its own."""

from __future__ import annotations

import importlib.util
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

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1024

def grown(source, output, gguf=None):
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
    return peak[0] - before

print(grown(*sys.argv[1:3]), grown(*sys.argv[3:]) if sys.argv[3:] else "")
"""


def safetensors_case(folder: Path) -> list[Path]:
    """A thin transplant, and where to write it."""
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=4, num_attention_heads=8, vocab_size=4096
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder / "recipient")
    donor = Donor.from_model(model, [1, 2], name="donor")
    donor.save_pretrained(folder / "donor", position=1, recipient=str(folder / "recipient"))
    return [folder / "donor", folder / "full"]


def gguf_case(folder: Path) -> list[Path]:
    """The same of a recipient in a GGUF file.

    A matrix of 8 MiB is in memory as read, in float32, laid out, and packed; recipient tensors are written from their
    file.
    """
    folder.mkdir()
    shape = {"hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 128, "num_key_value_heads": 128}
    model = tiny_model("llama", 1, **shape)
    path = write_model(model, "llama", folder / NAME, "F32")
    donor = Donor.from_model(model, [1, 2, 3, 4, 5], name="donor")
    donor.save_pretrained(folder / "donor", position=1, recipient=str(folder))
    return [folder / "donor", folder / "out.gguf", path]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    words = safetensors_case(tmp_path / "safetensors")
    written = [words[1] / "model.safetensors"]
    if importlib.util.find_spec("gguf") is not None:
        words += gguf_case(tmp_path / "gguf")
        written.append(words[3])
    for grown, path in zip(map(float, run_python(CODE, *words).split()), written, strict=True):
        size = path.stat().st_size / 2**20
        assert size > 5 * _MOST_MIB
        assert grown < _MOST_MIB, f"{grown:.0f} MiB more while {size:.0f} MiB were written to {path.name}"
