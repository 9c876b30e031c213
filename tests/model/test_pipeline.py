"""`pipeline("text-generation", model=folder)` with a thin repo: one name for everything."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, pipeline

from tests.helpers import copied, edit_json, generated, layers_of, loaded, logits_of, plain, refused
from transplant_hf import AutoModelWithTransplant, CheckpointError, ConfigurationError


def test_a_donor_repo(tiny: Path) -> None:
    generate = pipeline("text-generation", model=str(tiny / "donor"))
    model = AutoModelWithTransplant.from_pretrained(tiny / "donor")
    assert generate.model.layer_map == model.layer_map
    assert torch.equal(logits_of(generate.model), logits_of(model))
    prompt = "Once upon a time"
    text = generate(prompt, do_sample=False, return_full_text=True)[0]["generated_text"]
    assert text.startswith(prompt)
    ids = generate.tokenizer(prompt, return_tensors="pt").input_ids
    assert text == generate.tokenizer.decode(
        model.generate(ids, do_sample=False)[0], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    assert generated(model, ids).shape[1] == ids.shape[1] + 8


def test_batches(tiny_gpt2: Path) -> None:
    generate = pipeline("text-generation", model=str(tiny_gpt2 / "donor"))
    generate.tokenizer.padding_side = "left"
    prompts = ["Once upon a time", "Hi"]
    together = generate(prompts, do_sample=False, batch_size=2)
    alone = [generate(prompt, do_sample=False) for prompt in prompts]
    assert together == alone


def test_thin_and_full(tiny: Path, tmp_path: Path) -> None:
    model = loaded(tiny, 3)
    model.save_pretrained(tmp_path / "thin", thin=True)
    model.save_pretrained(tmp_path / "full")
    tokenizer, ask = str(tiny / "recipient"), {"text_inputs": "Hi", "do_sample": False, "return_tensors": True}
    said = pipeline("text-generation", model=str(tmp_path / "thin"))(**ask)
    assert said == pipeline("text-generation", model=str(tmp_path / "full"), tokenizer=tokenizer)(**ask)
    assert said != pipeline("text-generation", model=str(tiny / "recipient"))(**ask)


def test_a_dtype(tiny_llama: Path) -> None:
    generate = pipeline("text-generation", model=str(tiny_llama / "donor"), dtype=torch.bfloat16)
    assert generate.model.dtype == torch.bfloat16
    assert len(layers_of(generate.model)) == 6


def test_model_kwargs(tiny_llama: Path) -> None:
    generate = pipeline(
        "text-generation", model=str(tiny_llama / "donor"), model_kwargs={"attn_implementation": "eager"}
    )
    assert generate.model.config._attn_implementation == "eager"


def test_a_transplanted_model(tiny: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny / "donor")
    model = loaded(tiny, 1)
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    say = {"text_inputs": "Hi", "do_sample": False, "return_tensors": True}
    outside = generate(**say)
    with model.disable_transplants():
        inside = generate(**say)
    assert inside == pipeline("text-generation", model=plain(tiny / "recipient"), tokenizer=tokenizer)(**say)
    assert outside != inside


@pytest.mark.parametrize("task", ["text-classification", "token-classification"])
def test_other_tasks(tiny_llama: Path, task: str) -> None:
    classify = pipeline(task, model=str(tiny_llama / "donor"))
    assert len(classify.model.layer_map) == 6
    assert classify("Once upon a time")


def test_an_error_is_said_once_and_clearly(tiny_gpt2: Path, tmp_path: Path) -> None:
    """The pipeline tries several classes and would bury what it catches."""
    family = copied(tiny_gpt2, tmp_path / "family")
    edit_json(family / "donor" / "config.json", format_version=9)
    with refused(ConfigurationError, "format_version 9"):
        pipeline("text-generation", model=str(family / "donor"))
    edit_json(family / "donor" / "config.json", format_version=1)
    (family / "donor" / "donor_config.json").unlink()
    with refused(CheckpointError, "donor_config.json", str(family / "donor")):
        pipeline("text-generation", model=str(family / "donor"))
