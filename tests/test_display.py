"""Sizes and layer numbers as they are shown and read."""

from __future__ import annotations

import pytest

from tests.helpers import refused
from transplant_hf import ConfigurationError
from transplant_hf.display import bytes_text, numbers_text, parse_size, position_text, some_of


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
    assert (numbers_text([]), numbers_text([0])) == ("none", "0")
    assert numbers_text([3, 4, 5]) == "3, 4, 5"
    assert numbers_text(range(7)) == "0..6"
    assert numbers_text([0, 2, 4, 6, 8, 10, 12]) == "0, 2, 4, 6, 8, 10, 12"
    assert numbers_text(range(0, 40, 2)).endswith("... and 8 more")


def test_names_and_positions() -> None:
    assert some_of(["d", "c", "b", "a"]) == "a, b, c and 1 more"
    assert (position_text(3), position_text((10, 20, 29))) == ("position 3", "positions 10, 20, 29")


@pytest.mark.parametrize(
    ("text", "size"),
    [("20GiB", 20 * 2**30), ("20GB", 20 * 10**9), ("1.5 kb", 1500), ("4G", 4 * 10**9), ("2GB/s", 2 * 10**9), ("7B", 7)],
)
def test_a_size_is_a_number_with_its_unit(text: str, size: int) -> None:
    assert parse_size(text) == size
    assert parse_size(size) == size


@pytest.mark.parametrize("text", ["80", "much", "", "GB", "-1GB", "1e3GB"])
def test_a_size_without_a_unit_is_refused(text: str) -> None:
    with refused(ConfigurationError, "memory must be", "80GiB", repr(text)):
        parse_size(text, "memory")
