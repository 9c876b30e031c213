"""What is left of a learned part in the recipient's weights after it was taken out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture
def removal(script: Callable[[str], Any]) -> Any:
    return script("removal")


def test_differences_are_counted_by_weight_and_by_bit(removal: Any) -> None:
    before = torch.zeros(70, dtype=torch.bfloat16)
    after = before.clone()
    after.view(torch.int16)[3] = 0b111
    after.view(torch.int16)[69] = -(1 << 15)  # the sign alone
    found = removal.difference({"w": before}, {"w": after})
    assert (found["weights"], found["bits"], found["of"]) == (2, 4, 70)
    with pytest.raises(SystemExit, match="other names"):
        removal.difference({"w": before}, {"v": after})


def test_a_donor_leaves_no_trace(removal: Any, tiny_llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    (tmp_path / "text.txt").write_text("the court is the law and the law is the court\n" * 200)
    found = removal.measure(str(tiny_llama / "recipient"), str(tmp_path / "text.txt"), 2, 2, block_length=16)
    assert len(found) == 5 and all(set(by_cycles) == {1, 2} for by_cycles in found.values())
    for way in ("donor, switched off and on", "donor, removed and added", "LoRA of PEFT, disabled and enabled"):
        assert [row["bits"] for row in found[way].values()] == [0, 0], way
    [merged] = [by_cycles for way, by_cycles in found.items() if "merged" in way]
    assert merged[2]["bits"] > 0
