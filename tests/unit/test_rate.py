"""The token bucket: what a caller is told to sleep."""

from __future__ import annotations

import pytest

from pitfs.link.transport.rate import TokenBucket


def test_a_burst_goes_at_once_and_what_follows_at_the_rate() -> None:
    bucket = TokenBucket(1000, 500, now_s=7.0)
    assert bucket.take(300, 7.0) == 0
    assert bucket.take(200, 7.0) == 0
    assert bucket.take(100, 7.0) == pytest.approx(0.1)
    assert bucket.take(100, 7.1) == 0
    assert bucket.take(100, 7.1) == pytest.approx(0.1)


def test_what_may_not_go_yet_takes_nothing() -> None:
    bucket = TokenBucket(1000, 500, now_s=0.0)
    bucket.take(500, 0.0)
    assert bucket.take(400, 0.1) == pytest.approx(0.3)
    assert bucket.take(400, 0.1) == pytest.approx(0.3)
    assert bucket.take(100, 0.1) == 0


def test_idle_time_earns_no_more_than_one_burst() -> None:
    bucket = TokenBucket(1000, 500, now_s=0.0)
    assert bucket.take(500, 1e9) == 0
    assert bucket.take(500, 1e9) == pytest.approx(0.5)


def test_what_was_slept_too_long_is_made_up_for() -> None:
    bucket = TokenBucket(1000, 500, now_s=0.0)
    bucket.take(500, 0.0)
    assert bucket.take(100, 0.0) == pytest.approx(0.1)
    assert bucket.take(100, 0.2) == 0  # woken 0.1 s late
    assert bucket.take(100, 0.2) == 0


def test_a_clock_that_goes_back_counts_as_standing_still() -> None:
    bucket = TokenBucket(1000, 500, now_s=10.0)
    bucket.take(500, 10.0)
    assert bucket.take(100, 3.0) == pytest.approx(0.1)
    assert bucket.take(100, 10.1) == 0


@pytest.mark.parametrize(("rate", "burst"), [(0, 1), (-1, 1), (1, 0)])
def test_a_rate_or_burst_of_nothing_is_a_mistake(rate: float, burst: int) -> None:
    with pytest.raises(ValueError, match="positive"):
        TokenBucket(rate, burst, 0.0)


def test_more_than_a_burst_at_once_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="burst is 10"):
        TokenBucket(100, 10, 0.0).take(11, 0.0)
