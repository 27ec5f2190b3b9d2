"""Whether writes go as a stream or by intervals, as a table."""

from __future__ import annotations

import pytest

from pitfs.model.schedule import behind_limit_s, choose_shipping_mode

KEEPS_UP = {
    "mode": "dynamic", "streaming": True, "behind_s": 0.3, "backlog_bytes": 0,
    "interval_s": 60.0, "rate_bytes_per_s": 1e6, "fitted": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "streams", "reason"),
    [
        ({}, True, "the link keeps up"),
        ({"behind_s": 15.0}, True, "the link keeps up"),
        ({"behind_s": 15.1}, False, "intervals: as a stream the replica was 15.1 s behind"),
        ({"behind_s": 0.9, "interval_s": 0.1}, True, "the link keeps up"),
        ({"behind_s": 1.1, "interval_s": 0.1}, False, "1.1 s behind"),
        ({"streaming": False}, True, "the link keeps up"),
        ({"streaming": False, "backlog_bytes": 1_000_001}, False, "1 MB wait, 1 MB go in a second"),
        ({"streaming": False, "backlog_bytes": 9 << 20, "rate_bytes_per_s": None}, True, "the link keeps up"),
        ({"streaming": False, "backlog_bytes": 17 << 20, "rate_bytes_per_s": None}, False, "17.8 MB wait"),
        ({"streaming": False, "fitted": False}, False, "more than goes in its time"),
        ({"mode": "async", "behind_s": 999.0}, True, "mode is async"),
        ({"mode": "sync", "streaming": False, "fitted": False, "backlog_bytes": 1 << 40}, True, "mode is sync"),
        ({"mode": "snapshot"}, False, "mode is snapshot"),
    ],
)
def test_the_way_that_writes_go(changes: dict[str, object], streams: bool, reason: str) -> None:
    way = choose_shipping_mode(**(KEEPS_UP | changes))  # type: ignore[arg-type]
    assert way.streams is streams and reason in way.reason


def test_a_quarter_of_an_interval_is_the_limit_but_not_below_a_second() -> None:
    assert [behind_limit_s(each) for each in (0.1, 4, 60)] == [1.0, 1.0, 15.0]
