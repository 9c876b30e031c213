"""The demo's texts: no paragraph of a test text is trained on."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from transplant_hf.demo.texts import _paragraph_keys, write_texts
from transplant_hf.errors import DataError

TRAIN, TEST = 150_000, 20_000


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    files = write_texts(tmp_path_factory.mktemp("texts"), TRAIN, TEST)
    return {name: [json.loads(line)["text"] for line in path.open()] for name, path in files.items()}


def keys(documents: list[str]) -> set[str]:
    return {key for text in documents for key in _paragraph_keys(text)}


def test_test_paragraphs_are_not_trained_on(texts: dict[str, list[str]]) -> None:
    trained = keys(texts["english-train"]) | keys(texts["source-train"])
    for name in ("english-test", "source-test"):
        assert len(keys(texts[name])) > 20
        assert trained.isdisjoint(keys(texts[name]))


def test_sizes(texts: dict[str, list[str]]) -> None:
    for name in ("english", "source"):
        assert TRAIN * 0.99 <= sum(map(len, texts[f"{name}-train"])) <= TRAIN
        assert TEST <= sum(map(len, texts[f"{name}-test"])) <= TEST * 1.25


def test_the_texts_depend_on_nothing_but_the_installation(tmp_path: Path, texts: dict[str, list[str]]) -> None:
    files = write_texts(tmp_path, TRAIN, TEST)
    assert {name: [json.loads(line)["text"] for line in path.open()] for name, path in files.items()} == texts


def test_missing_language_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DataError, match=r"pydoc_data\.topics"):
        write_texts(tmp_path, TRAIN, TEST)


def test_missing_library_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "__file__", str(tmp_path / "os.py"))
    with pytest.raises(DataError, match="no Python files"):
        write_texts(tmp_path, TRAIN, TEST)
