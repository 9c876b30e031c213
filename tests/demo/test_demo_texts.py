"""The demo's two domains: nothing held out is trained upon."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from transplant_hf.demo.budget import DemoBudget
from transplant_hf.demo.library import Document
from transplant_hf.demo.texts import (
    DemoTexts,
    Domain,
    load_texts,
    paragraph_keys,
    split_documents,
)
from transplant_hf.errors import ConfigurationError, TransplantError

BUDGET = DemoBudget(english_characters=150_000, source_characters=150_000, held_out_characters=20_000)


@pytest.fixture(scope="module")
def texts() -> DemoTexts:
    return load_texts(BUDGET)


def _domains(texts: DemoTexts) -> list[Domain]:
    return [texts.english, texts.source]


def _keys(documents: tuple[Document, ...]) -> set[str]:
    return {key for document in documents for key in paragraph_keys(document.text)}


def test_held_out_documents_are_not_trained_upon(texts: DemoTexts) -> None:
    for domain in _domains(texts):
        assert {d.name for d in domain.train}.isdisjoint(d.name for d in domain.held_out)


def test_held_out_paragraphs_are_not_trained_upon(texts: DemoTexts) -> None:
    trained = _keys(texts.english.train) | _keys(texts.source.train)
    for domain in _domains(texts):
        held_out = _keys(domain.held_out)
        assert len(held_out) > 20
        assert trained.isdisjoint(held_out)


def test_sizes_follow_the_budget(texts: DemoTexts) -> None:
    for domain, limit in zip(_domains(texts), (150_000, 150_000), strict=True):
        assert limit * 0.99 <= sum(len(d.text) for d in domain.train) <= limit
        assert 20_000 <= sum(len(d.text) for d in domain.held_out) <= 25_000


def test_split_is_deterministic(texts: DemoTexts) -> None:
    longer = load_texts(DemoBudget(english_characters=200_000, source_characters=150_000, held_out_characters=20_000))
    assert longer.digest() != texts.digest()
    assert longer.english.held_out == texts.english.held_out
    assert longer.source == texts.source


def test_no_file_belongs_to_both_domains(texts: DemoTexts) -> None:
    english = {d.name.partition("/")[2] for part in (texts.english.train, texts.english.held_out) for d in part}
    source = {d.name.partition("/")[2] for part in (texts.source.train, texts.source.held_out) for d in part}
    assert english.isdisjoint(source)


def test_paragraphs_quoted_by_another_document_are_taken_out() -> None:
    shared = "A paragraph that is long enough to be compared with the others."
    documents = [Document("a", shared), Document("b", f"Something else\n\n  {shared}\n\nThe end")]
    domain = split_documents("test", documents, held_out_size=10, train_size=1000)
    assert [d.name for d in domain.held_out] == ["a"]
    assert domain.train == (Document("b", "Something else\n\nThe end"),)


def test_too_little_text_is_an_error() -> None:
    with pytest.raises(TransplantError, match="Too little text"):
        split_documents("test", [Document("a", "only one document")], held_out_size=10, train_size=10)


def test_missing_language_reference_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(TransplantError, match=r"pydoc_data\.topics"):
        load_texts(BUDGET)


def test_missing_library_source_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "__file__", str(tmp_path / "os.py"))
    with pytest.raises(TransplantError, match="no Python files"):
        load_texts(BUDGET)


@pytest.mark.parametrize(
    "wrong",
    [
        {"vocabulary_size": 100},
        {"attention_heads": 5},
        {"donor_position": 99},
        {"replay_fraction": 1.0},
        {"context": 0},
    ],
)
def test_budget_refuses_what_cannot_work(wrong: dict) -> None:
    with pytest.raises(ConfigurationError):
        DemoBudget(**wrong)
