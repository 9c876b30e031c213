"""Rows of `pipeline`: the text is what the reference says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import pipeline

from tests.ecosystem.cases import Case

SECTION = "Pipelines"
PROMPTS = ["Once upon a time", "Hi", "The court finds that"]


def ready(folder: Path, case: Case) -> Any:
    """A text generation pipeline of a folder."""
    speak = pipeline("text-generation", model=str(folder))
    speak.tokenizer.padding_side = case.tokenizer.padding_side
    return speak


def continued(model: Any, case: Case, ids: torch.Tensor) -> str:
    """What a model says next, by `generate` alone."""
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8)
    return case.tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.ecosystem(section=SECTION, feature="text-generation, by the name of a donor repo or a thin transplant")
@pytest.mark.parametrize("name", ["donor", "thin"])
def test_one_text(case: Case, name: str) -> None:
    speak = ready(getattr(case, name), case)
    said = speak(PROMPTS[0], do_sample=False, max_new_tokens=8, return_full_text=False)[0]["generated_text"]
    ids = case.tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    assert said == continued(case.independent(), case, ids)
    assert said != continued(case.recipient_model(), case, ids)


@pytest.mark.ecosystem(section=SECTION, feature="text-generation in a batch, padded on the left")
def test_batch(case: Case) -> None:
    ask = {"do_sample": False, "max_new_tokens": 8, "return_full_text": False}
    together = ready(case.thin, case)(PROMPTS, batch_size=len(PROMPTS), **ask)
    reference = case.independent()
    alone = [continued(reference, case, case.tokenizer(text, return_tensors="pt").input_ids) for text in PROMPTS]
    assert [said[0]["generated_text"] for said in together] == alone


@pytest.mark.ecosystem(section=SECTION, feature="text-generation with a chat template")
@pytest.mark.parametrize("name", ["donor", "thin"])
def test_chat(case: Case, name: str) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    answer = ready(getattr(case, name), case)(chat, do_sample=False, max_new_tokens=8)[0]["generated_text"]
    ids = case.tokenizer("[system]Be brief.\n[user]Who?\n[assistant]", return_tensors="pt").input_ids
    assert answer[:-1] == chat
    assert answer[-1] == {"role": "assistant", "content": continued(case.independent(), case, ids)}
