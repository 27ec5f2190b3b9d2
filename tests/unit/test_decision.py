"""Figure 7 as a table: what of the difference journal goes behind its diff, and the words that say why."""

from __future__ import annotations

import itertools

import pytest

from pitfs.model.ladder import NO_LAYER, RUNGS_NS
from pitfs.model.schedule import Waiting, next_step

MS = 1_000_000
# 10 s, 5 s have no instant inside; then 1 s, 500, 100, 50, 10, 5, 1 ms, every write
SIZES = (None, None, 10, 15, 30, 40, 60, 70, 80, 100)
DIFF_BYTES = 30


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
    room_bytes = None if rate is None else rate * 1.0 - DIFF_BYTES  # of an interval of a second
    step = next_step(diff_due=False, waiting=[Waiting(1, NO_LAYER, SIZES)], room_bytes=room_bytes)
    assert words in step.decision.reason
    assert step.fits == (wanted is not None)
    assert step.decision.granularity_ns == (1000 * MS if wanted is None else wanted)  # an idle link takes the coarsest


def test_each_rung_divides_the_one_before() -> None:
    assert all(coarse % fine == 0 for coarse, fine in itertools.pairwise(RUNGS_NS[:-1]))
    assert RUNGS_NS[-1] == 0
