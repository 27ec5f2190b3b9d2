"""Figure 7 as a table: what of the difference journal goes, and the words that say why."""

from __future__ import annotations

import itertools

import pytest

from pitfs.model.granularity import decide
from pitfs.model.ladder import RUNGS_NS

MS = 1_000_000
# 10 s, 5 s have no instant inside; then 1 s, 500, 100, 50, 10, 5, 1 ms, every write
SIZES = [None, None, 10, 15, 30, 40, 60, 70, 80, 100]


@pytest.mark.parametrize(
    ("rate", "wanted", "words"),
    [
        (None, 0, "no rate is configured or measured yet"),
        (130, 0, "fits: difference journal"),
        (129, 1 * MS, "of it fit"),
        (91, 10 * MS, "of it fit"),
        (90, 10 * MS, "of it fit"),
        (89, 50 * MS, "of it fit"),
        (45, 500 * MS, "of it fit"),
        (40, 1000 * MS, "of it fit"),
        (39, None, "doesn't fit"),
        (1, None, "doesn't fit"),
    ],
)
def test_the_finest_rung_that_fits_behind_the_diff_goes(
    rate: float | None, wanted: int | None, words: str
) -> None:
    decision = decide(
        mode="dynamic", diff_bytes=30, journal_bytes=SIZES, interval_ns=10**9, rate_bytes_per_s=rate
    )
    assert decision.granularity_ns == wanted and words in decision.reason


def test_mode_snapshot_sends_none_of_it() -> None:
    decision = decide(
        mode="snapshot", diff_bytes=0, journal_bytes=SIZES, interval_ns=10**9, rate_bytes_per_s=None
    )
    assert decision.granularity_ns is None


def test_each_rung_divides_the_one_before() -> None:
    assert all(coarse % fine == 0 for coarse, fine in itertools.pairwise(RUNGS_NS[:-1]))
    assert RUNGS_NS[-1] == 0
