"""The replication of the paper: padding that counts in the loss, and padding that does not."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import plain


@pytest.fixture
def replication(script: Callable[[str], Any]) -> Any:
    return script("replication")


def samples(replication: Any, *rows: list[int]) -> Any:
    found = object.__new__(replication.Samples)
    found.ids = list(rows)
    return found


def test_padding_counts_only_where_it_is_asked_for(replication: Any) -> None:
    batch = replication.Padding(9, None, False)([[1, 2, 3], [4]])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[1, 2, 3], [4, -100, -100]]
    counted = replication.Padding(9, 4, True)([[1, 2, 3], [4]])
    assert counted["labels"].tolist() == counted["input_ids"].tolist() == [[1, 2, 3, 9], [4, 9, 9, 9]]


def test_padding_does_not_change_the_loss_of_tokens(replication: Any, tiny_llama: Path) -> None:
    model, rows = plain(tiny_llama / "recipient"), [[1, 2, 3, 4], [5, 6]]
    data = samples(replication, *rows)
    found = replication.Recipe(data, data, 0, 2, 8).measure(model)
    losses = [model(input_ids=torch.tensor([row]), labels=torch.tensor([row])).loss * (len(row) - 1) for row in rows]
    assert math.isclose(found["tokens"], math.exp(float(sum(losses)) / 4), rel_tol=1e-4)
    assert found["with padding"] != found["tokens"]


def test_samples_are_paragraphs_from_the_whole_text(replication: Any, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(" = Title = \n\n a b c d \n\n e f \n\n g \n")
    found = replication.Samples(tmp_path / "text.txt", lambda text: {"input_ids": text.split()}, 2, 3)
    assert list(found) == [["a", "b", "c"], ["e", "f"]]
    with pytest.raises(SystemExit, match="3 paragraphs, not 4"):
        replication.Samples(tmp_path / "text.txt", None, 4, 3)
