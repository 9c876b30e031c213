"""The demo's tokenizer gives back every text."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from transplant_hf.demo.tokenizer import encode_stream, train_tokenizer

TEXTS = [
    'The "while" statement repeats as long as an expression is true.',
    "def f(x):\n    return x + 1\n",
] * 5


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, vocabulary_size=300, context=64)


@pytest.mark.parametrize(
    "text", [*TEXTS[:2], "", " leading, trailing ", "\t\r\n", "naïve Übung 中文 🙂", "a . b , c ( d ) 's n't"]
)
def test_round_trip(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1)
    assert len(tokenizer) <= 300


def test_saved_tokenizer_is_the_same(tokenizer: PreTrainedTokenizerFast, tmp_path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]
    assert loaded.decode(loaded("a . b")["input_ids"]) == "a . b"


def test_stream_separates_texts(tokenizer: PreTrainedTokenizerFast) -> None:
    one, other = (tokenizer(text)["input_ids"] for text in TEXTS[:2])
    assert encode_stream(tokenizer, TEXTS[:2]).tolist() == [0, *one, 0, *other, 0]
