"""The windows of a replica's connections: what one gets, and what all may have together."""

from __future__ import annotations

import pytest

from pitfs.link.sessions.receiver import SPARE_BYTES, WindowPool
from pitfs.model.window import check_window

MIB = 1 << 20


@pytest.mark.parametrize("limit_mib", [1, 32, 128])
@pytest.mark.parametrize("offered_mib", [1, 8, 32, 128])
def test_one_alone_gets_what_both_sides_want(limit_mib: int, offered_mib: int) -> None:
    assert WindowPool(limit_mib * MIB).take(offered_mib * MIB) == min(limit_mib, offered_mib) * MIB


@pytest.mark.parametrize("limit_mib", [1, 8, 32, 128])
def test_many_share_what_there_is_and_each_gets_a_window(limit_mib: int) -> None:
    pool = WindowPool(limit_mib * MIB)
    windows = [pool.take(128 * MIB) for _ in range(64)]
    for each in windows:
        check_window(each)
    assert windows[0] == limit_mib * MIB and windows == sorted(windows, reverse=True)
    assert sum(windows[:10]) <= limit_mib * MIB + SPARE_BYTES
    assert sum(windows) <= limit_mib * MIB + SPARE_BYTES + 64 * MIB
    assert pool.taken_bytes == sum(windows)


def test_ten_groups_at_the_default() -> None:
    pool = WindowPool(32 * MIB)
    assert [pool.take(32 * MIB) // MIB for _ in range(10)] == [32, 16, 8, 8, 8, 4, 4, 4, 2, 2]


def test_small_windows_leave_room_for_each_other() -> None:
    pool = WindowPool(32 * MIB)
    assert [pool.take(8 * MIB) for _ in range(5)] == [8 * MIB] * 5


def test_what_is_given_back_is_there_for_the_next() -> None:
    pool = WindowPool(32 * MIB)
    first = pool.take(32 * MIB)
    assert pool.take(32 * MIB) < 32 * MIB
    pool.give_back(first)
    assert pool.take(16 * MIB) == 16 * MIB
