"""Sizes and numbers as a person reads them; the rest of the text is tested with what it describes."""

from __future__ import annotations

import pytest

from transplant_hf.inspection.describe import bytes_text, numbers_text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (1023, "1,023 bytes"),
        (1024, "1.0 KiB"),
        (85_053_440, "81.1 MiB"),
        (4_939_212_390, "4.6 GiB"),
        (1 << 50, "1,024.0 TiB"),
    ],
)
def test_sizes(count: int, text: str) -> None:
    assert bytes_text(count) == text


def test_layer_numbers() -> None:
    assert numbers_text([0]) == "0"
    assert numbers_text([3, 4, 5]) == "3, 4, 5"
    assert numbers_text(range(7)) == "0..6"
    assert numbers_text([0, 2, 4, 6, 8, 10, 12]) == "0, 2, 4, 6, 8, 10, 12"
    assert numbers_text(range(0, 40, 2)).endswith("... and 8 more")
