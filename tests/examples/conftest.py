"""The small models of `--tiny`, and what the public API says of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.donor_app.tiny import make_tiny
from transplant_hf import AutoModelWithTransplant, DonorSpec

PROMPT = "the judge asked for"


class Reference:
    """A recipient or a transplant that is loaded anew, beside what the app does."""

    def __init__(self, folder: Path, donor: str | None = None, position: int = 0, strength: float = 1.0) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "recipient")
        if donor is None:
            self.model = AutoModelForCausalLM.from_pretrained(folder / "recipient")
        else:
            spec = DonorSpec(str(folder / donor), position, strength=strength, name=donor)
            self.model = AutoModelWithTransplant.from_pretrained(folder / "recipient", donors=[spec])

    def continued(self, tokens: int, prompt: str = PROMPT) -> str:
        """The greedy continuation of the prompt."""
        ids = self.tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            written = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
            )
        return self.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`recipient`, `law`, `code` and `too-wide`, as `--tiny` makes them."""
    folder = tmp_path_factory.mktemp("app")
    make_tiny(folder)
    return folder


@pytest.fixture(scope="session")
def reference(tiny_folder: Path) -> Callable[..., Any]:
    """Load a recipient, or a transplant by donor, position and strength."""
    return lambda *which: Reference(tiny_folder, *which)
