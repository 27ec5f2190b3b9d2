"""How quantities are shown to people."""

from __future__ import annotations

import pytest

from pitfs.model.units import format_bytes, format_seconds


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"), (12, "12 B"), (999, "999 B"), (999.6, "1 kB"), (1000, "1 kB"), (12_288, "12.3 kB"), (0.4, "0.4 B"),
        (999_499, "999 kB"), (999_500, "1 MB"), (1_234_567.891, "1.23 MB"), (64 << 20, "67.1 MB"),
        (10 << 30, "10.7 GB"), (32 << 40, "35.2 TB"), (1e18, "1000 PB"),
    ],
)  # fmt: skip
def test_bytes_have_three_digits_and_a_unit(size_bytes: float, text: str) -> None:
    assert format_bytes(size_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.0 s"), (0.334, "0.3 s"), (119.94, "119.9 s"), (120, "2 min"), (840, "14 min"), (7200, "2 h"),
        (172_800, "2 days"),
    ],
)  # fmt: skip
def test_durations_have_the_unit_that_fits(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
