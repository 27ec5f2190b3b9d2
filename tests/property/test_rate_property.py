"""The token bucket against its definition, for any pattern of sending, idling and oversleeping."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pitfs.link.transport.rate import TokenBucket

STEPS = st.lists(
    st.tuples(
        st.floats(0, 1),  # of the burst: bytes to send
        st.one_of(st.just(0.0), st.floats(0, 3)),  # seconds idle before
        st.one_of(st.just(0.0), st.floats(0, 0.5)),  # seconds overslept
    ),
    max_size=40,
)


@given(rate=st.floats(1, 1e9), burst=st.integers(1, 1 << 20), steps=STEPS)
def test_no_interval_lets_through_more_than_the_rate_and_one_burst(
    rate: float, burst: int, steps: list[tuple[float, float, float]]
) -> None:
    bucket, now_s = TokenBucket(rate, burst, 0.0), 0.0
    sent: list[tuple[float, int]] = []
    for share, idle_s, overslept_s in steps:
        now_s += idle_s
        count = int(share * burst)
        while delay_s := bucket.take(count, now_s):
            now_s += delay_s + overslept_s
        sent.append((now_s, count))
    for first in range(len(sent)):
        total = 0
        for at_s, count in sent[first:]:
            total += count
            # A byte of slack: what rounding of this sum and of the bucket's may come to.
            assert total <= rate * (at_s - sent[first][0]) + burst + 1


@given(
    rate=st.floats(1000, 1e9),
    burst=st.integers(1000, 1 << 20),
    steps=st.lists(st.tuples(st.floats(0.01, 0.5), st.floats(0, 1)), min_size=1, max_size=40),
)
def test_a_sender_of_half_bursts_gets_the_whole_rate_though_it_oversleeps_as_much(
    rate: float, burst: int, steps: list[tuple[float, float]]
) -> None:
    bucket, now_s, total = TokenBucket(rate, burst, 0.0), 0.0, 0
    for share, late in steps:
        count = int(share * burst)
        while delay_s := bucket.take(count, now_s):
            now_s += delay_s + late * (burst // 2) / rate
        total += count
    # Only the last sleep's lateness isn't made up for yet.
    assert now_s * rate <= max(0, total - burst) + burst // 2 + 1
