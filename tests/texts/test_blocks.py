"""Streams and blocks of tokens."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from tests.helpers import END_OF_TEXT, refused, write_tokenizer
from transplant_hf.errors import ConfigurationError, DataError
from transplant_hf.texts import Blocks, TextSource, check_tokenizer, encode, pack, starting_token


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path)
    return path


@pytest.fixture
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def with_start(tokenizer: Any) -> Any:
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", END_OF_TEXT)]
    )
    return tokenizer


def own(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_documents_are_parted_by_the_end_of_text(tokenizer: Any) -> None:
    stream = encode(["ab", "", "c"], tokenizer)
    assert stream.dtype == torch.int32
    assert stream.tolist() == [*own(tokenizer, "ab"), END_OF_TEXT, *own(tokenizer, "c")]


def test_without_an_end_of_text_nothing_is_between(tokenizer: Any) -> None:
    tokenizer.eos_token = None
    assert encode(["ab", "c"], tokenizer).tolist() == own(tokenizer, "abc")


def test_many_batches_give_the_same_as_one(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"document {number}" * (number % 5) for number in range(50)]
    whole = encode(texts, tokenizer)
    monkeypatch.setattr("transplant_hf.texts.blocks._CHARACTERS_PER_CALL", 30)
    assert torch.equal(encode(texts, tokenizer), whole)


def test_no_warning_of_long_texts(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder, model_max_length=8)
    warned: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warned.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("transformers").addHandler(handler)
    try:
        encode(["x" * 100] * 3, tokenizer)
        assert warned == []
        # Without the precaution there is one.
        tokenizer("x" * 100)
        assert "longer than" in warned[0]
    finally:
        logging.getLogger("transformers").removeHandler(handler)


class Endless:
    """Documents without end, counted."""

    def __init__(self) -> None:
        self.read = 0

    def __iter__(self) -> Iterator[str]:
        while True:
            self.read += 1
            yield "0123456789"


def test_reading_stops_when_there_is_enough(tokenizer: Any) -> None:
    texts = Endless()
    blocks = pack(texts, tokenizer, block_length=11, max_blocks=4)
    assert blocks.tokens.shape == (4, 11)
    assert texts.read <= 5


def test_the_last_part_block_is_dropped(tokenizer: Any) -> None:
    blocks = pack(["abcdefgh"], tokenizer, block_length=3)
    assert blocks.tokens.flatten().tolist() == own(tokenizer, "abcdef")
    assert (len(blocks), blocks.block_length, blocks.num_tokens) == (2, 3, 6)


def test_blocks_begin_as_the_tokenizer_begins_texts(with_start: Any) -> None:
    assert starting_token(with_start) == END_OF_TEXT
    blocks = pack(["abcdef"], with_start, block_length=3)
    assert blocks.tokens[:, 0].tolist() == [END_OF_TEXT] * 3
    assert blocks.tokens[:, 1:].flatten().tolist() == own(with_start, "abcdef")


def test_no_start_where_the_tokenizer_has_none(tokenizer: Any) -> None:
    assert tokenizer.bos_token_id is not None
    assert starting_token(tokenizer) is None


def test_every_kind_of_data_gives_the_same_blocks(tokenizer: Any, tmp_path: Path) -> None:
    text = "to be or not to be"
    path = tmp_path / "hamlet.txt"
    path.write_text(text)
    kinds = [
        path,
        str(path),
        TextSource(str(path)),
        [text],
        iter([text]),
        [{"text": text, "n": 1}],
        encode([text], tokenizer),
    ]
    packed = [pack(kind, tokenizer, 4) for kind in kinds]
    assert len({blocks.fingerprint for blocks in packed}) == 1
    assert [blocks.name for blocks in packed] == ["hamlet"] * 3 + ["text"] * 4


def test_rows_of_a_dataset(tokenizer: Any) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["abc", "def"], "n": [1, 2]})
    assert torch.equal(pack(rows, tokenizer, 7).tokens[0], encode(["abc", "def"], tokenizer))


def test_a_row_is_what_a_trainer_wants() -> None:
    blocks = Blocks(torch.arange(6).view(2, 3))
    row = blocks[1]
    assert {name: (value.dtype, value.tolist()) for name, value in row.items()} == {
        "input_ids": (torch.int64, [3, 4, 5]),
        "labels": (torch.int64, [3, 4, 5]),
    }
    row["labels"][0] = -100
    assert row["input_ids"][0] == 3
    assert blocks[1]["labels"][0] == 3


def test_a_fingerprint_tells_tokens_and_shape() -> None:
    tokens = torch.arange(12)
    one, same = Blocks(tokens.view(3, 4), "a"), Blocks(tokens.view(3, 4).int(), "b")
    assert one.fingerprint == same.fingerprint
    assert len(one.fingerprint) == 64
    changed = tokens.clone()
    changed[-1] = 0
    others = [Blocks(tokens.view(4, 3)), Blocks(changed.view(3, 4)), one.part(0, 2)]
    assert len({one.fingerprint, *(blocks.fingerprint for blocks in others)}) == 4


def test_parts_are_consecutive_and_whole() -> None:
    blocks = Blocks(torch.arange(40).view(20, 2), "numbers")
    train, validation, test = blocks.split(8, 1, 1)
    assert [len(part) for part in (train, validation, test)] == [16, 2, 2]
    assert torch.equal(torch.cat([train.tokens, validation.tokens, test.tokens]), blocks.tokens)
    assert test.name == "numbers"
    assert blocks.part(-2).tokens.tolist() == blocks.tokens[-2:].tolist()


@pytest.mark.parametrize(
    ("act", "kind", "facts"),
    [
        (lambda t: pack(["abc"], t, 8), DataError, ("text has 3 tokens", "a block needs 8")),
        (lambda t: pack([], t, 8), DataError, ("empty",)),
        (lambda t: pack([""], t, 8, name="law"), DataError, ("law is empty",)),
        (lambda t: pack(["a"], t, 1), ConfigurationError, ("at least 2", "got 1")),
        (lambda t: pack([3], t, 4), DataError, ("document 0", "int")),
        (lambda t: pack([{"a": "x", "b": "y"}], t, 4), DataError, ("a, b",)),
        (lambda t: pack(torch.zeros(2, 2), t, 2), DataError, ("one dimension", "[2, 2]")),
        (lambda t: Blocks(torch.zeros(0, 4)), DataError, ("[0, 4]",)),
        (lambda t: Blocks(torch.zeros(3, 4)).part(3, 5), DataError, ("3..5", "it has 3")),
        (lambda t: Blocks(torch.zeros(3, 4)).split(100, 1), DataError, ("3 blocks", "100, 1")),
        (lambda t: Blocks(torch.zeros(3, 4)).split(1, -1), ConfigurationError, ("positive",)),
        (lambda t: check_tokenizer(t, 257, "user/model"), DataError, ("user/model", "257", "0..256")),
    ],
)
def test_what_cannot_be_is_refused(tokenizer: Any, act: Any, kind: Any, facts: tuple[str, ...]) -> None:
    with refused(kind, *facts):
        act(tokenizer)


def test_names_of_texts_and_files_are_no_text(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "law.txt"
    file.write_text("The court held. " * 9)
    with refused(DataError, "one text", "'law'"):
        pack({"law": str(file)}, tokenizer, 4)
    with refused(DataError, str(file), "not a file"):
        pack([str(file)], tokenizer, 4)


def test_a_tokenizer_that_fits_is_accepted(tokenizer: Any) -> None:
    check_tokenizer(tokenizer, 258, "user/model")
    with refused(DataError, "has number 257", "the model has 257 tokens"):
        check_tokenizer(tokenizer, 257, "user/model")


@pytest.mark.shared
def test_a_real_text(shared_folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared_folder / "models" / "recipient-llama-5m")
    path = tmp_path / "shakespeare.txt"
    path.write_text((shared_folder / "data" / "shakespeare.txt").read_text()[:100_000])
    stream = encode([path.read_text()], tokenizer)
    assert tokenizer.decode(stream[:500].tolist()) in path.read_text()
    assert pack(path, tokenizer, 128).num_tokens == len(stream) // 128 * 128
