"""`generate` from the command line and in Python."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.cli.conftest import Run
from tests.helpers import edit_json, loaded, plain
from transplant_hf import ConfigurationError
from transplant_hf.generation import Generation, generate


def continued(model: object, folder: Path, prompt: str, count: int) -> str:
    """The same by Transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=count, do_sample=False)  # type: ignore[attr-defined]
    return str(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def test_with_the_donor_and_without(tiny_llama: Path, run: Run) -> None:
    recipient, donor = tiny_llama / "recipient", tiny_llama / "donor"
    wanted = {
        "with donor": continued(loaded(tiny_llama), recipient, "To be", 8),
        "recipient": continued(plain(recipient), recipient, "To be", 8),
    }
    words = ("To be", "--max-new-tokens", 8, "--json")
    for model in ((donor,), (recipient, "--donor", donor), (recipient, "--donor", f"{donor}@1")):
        status, out, _ = run("generate", model[0], *words, *model[1:])
        assert status == 0
        assert json.loads(out) == {"prompt": "To be", "texts": wanted, "chat": False}
    status, out, _ = run("generate", donor, *words, "--off")
    assert json.loads(out)["texts"] == {"recipient": wanted["recipient"]}
    status, out, _ = run("generate", recipient, *words)
    assert json.loads(out)["texts"] == {"model": wanted["recipient"]}


def test_decoding_is_greedy_whatever_the_model_recommends(family: Path, run: Run) -> None:
    wanted = continued(plain(family / "recipient"), family / "recipient", "To be", 8)
    edit_json(family / "recipient" / "generation_config.json", num_beams=3, length_penalty=9.0)
    assert continued(plain(family / "recipient"), family / "recipient", "To be", 8) != wanted
    status, out, _ = run("generate", family / "recipient", "To be", "--max-new-tokens", 8, "--json")
    assert (status, json.loads(out)["texts"]) == (0, {"model": wanted})


def test_columns_stand_side_by_side() -> None:
    printed = str(Generation("p", {"with law": "word " * 20 + "\n\nend", "recipient": "short"}, False))
    prompt, blank, *lines = printed.splitlines()
    assert (prompt, blank) == ("prompt: p", "")
    assert [cell.strip() for cell in lines[0].split("|")] == ["with law", "recipient"]
    assert [cell.strip() for cell in lines[2].split("|")][1] == "short"
    assert lines[-1].split("|")[0].strip() == "end"
    assert max(map(len, lines)) <= 96
    assert str(Generation("p", {"recipient": " just\ntext"}, False)) == "p just\ntext"
    assert str(Generation("p", {"recipient": "just\ntext"}, True)) == "just\ntext"


def test_the_chat_template(tiny_llama: Path, tmp_path: Path, run: Run) -> None:
    folder = shutil.copytree(tiny_llama / "recipient", tmp_path / "chat")
    edit_json(folder / "tokenizer_config.json", chat_template="{% for m in messages %}<{{ m.content }}>{% endfor %}")
    model = AutoModelForCausalLM.from_pretrained(folder)
    status, out, err = run("generate", folder, "hi", "--max-new-tokens", 4, "--json")
    assert status == 0 and "--no-chat" in err
    assert json.loads(out) == {"prompt": "hi", "texts": {"model": continued(model, folder, "<hi>", 4)}, "chat": True}
    _, out, err = run("generate", folder, "hi", "--max-new-tokens", 4, "--json", "--no-chat")
    assert json.loads(out)["texts"] == {"model": continued(model, folder, "hi", 4)} and "--no-chat" not in err
    status, _, err = run("generate", tiny_llama / "recipient", "hi", "--chat")
    assert status == 1 and "has no chat template" in err


def test_what_cannot_be_continued(tiny_llama: Path) -> None:
    with pytest.raises(ConfigurationError, match="the prompt is empty"):
        generate(tiny_llama / "recipient", "")
    with pytest.raises(ConfigurationError, match=r"the prompt has 2 tokens; with max_new_tokens=\d+ .* than the \d+"):
        generate(tiny_llama / "recipient", "hi", max_new_tokens=100_000)
