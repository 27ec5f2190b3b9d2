"""Granularity over a link that can't carry every write: what is offered is exact, and no coarser than it says."""

from __future__ import annotations

import mmap
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.checks import check_image
from tests.helpers.hosts import Mount, Production, Replica, instant_name, instant_ns
from tests.helpers.stamps import MAX_SECTORS, SECTOR_BYTES, Plan

pytestmark = [pytest.mark.fuse, pytest.mark.timeout(120)]
VOLUME_BYTES = 1 << 20
WRITES = 200


def write_all(volume: Path, plan: Plan) -> list[tuple[int, int]]:
    """Writes 1 to WRITES, some 3 ms apart; when each was begun and acknowledged."""
    times = []
    fd = os.open(volume, os.O_RDWR | os.O_DIRECT)  # else the kernel makes several of one
    buffer = mmap.mmap(-1, MAX_SECTORS * SECTOR_BYTES)  # aligned, as O_DIRECT wants
    try:
        for n in range(1, WRITES + 1):
            content = plan.content(n)
            buffer[: len(content)] = content
            begun = time.time_ns()
            os.pwritev(fd, [memoryview(buffer)[: len(content)]], plan.sectors(n)[0] * SECTOR_BYTES)
            times.append((begun, time.time_ns()))
            time.sleep(0.003)
    finally:
        os.close(fd)
    return times


def check_random_instants(
    mount: Mount, plan: Plan, times: list[tuple[int, int]], until_ns: int, intervals: list[dict[str, Any]], seed: int
) -> None:
    """Each leads to a state no older than the granularity of its interval says, and exact.

    Args:
        intervals: as they were listed before; they may become finer meanwhile.
    """
    random_ = random.Random(seed)
    for _ in range(40):
        time_ns = random_.randrange(times[0][0], until_ns)
        image = mount.image(instant_name(time_ns))
        seq = check_image(image, plan)
        assert seq <= sum(begun <= time_ns for begun, _ in times)
        (granularity_ns,) = (
            each["granularity_ns"]
            for each in intervals
            if instant_ns(each["from"]) <= time_ns < instant_ns(each["to"])
        )
        if granularity_ns is not None:
            rung_ns = max(granularity_ns, 1)
            before = sum(done <= time_ns // rung_ns * rung_ns for _, done in times)
            assert seq >= before, "older than the end of the granule before"


def test_granularity_falls_no_further_than_the_rate_makes_it_and_comes_back(tmp_path: Path) -> None:
    """200 writes within a second, on a link that takes several intervals for all their journal."""
    plan = Plan(1, VOLUME_BYTES)
    with (
        Replica(tmp_path) as replica,
        Production(
            tmp_path, {"root": VOLUME_BYTES}, port=replica.port, interval="2s", rate="64kbit"
        ) as production,
    ):
        production.snapshot()
        times = write_all(production.volume(), plan)
        last_ns = instant_ns(production.snapshot(60))
        seen: list[int | None] = []
        with Mount(replica.store(), tmp_path) as mount:
            deadline = time.monotonic() + 60
            while True:
                intervals = replica.listing()["intervals"]
                now = [each["granularity_ns"] for each in intervals]
                if now != seen[-len(now) :]:
                    seen += now
                    check_random_instants(mount, plan, times, last_ns, intervals, len(seen))
                for each in intervals:
                    assert each["granularity_ns"] == 0 or each["cause"], intervals
                if set(now) == {0}:
                    break
                assert time.monotonic() < deadline, intervals
                time.sleep(0.1)
            check_random_instants(mount, plan, times, last_ns, intervals, 0)
            for begun, done in times[::10]:  # now every write can be reached
                assert check_image(mount.image(instant_name(done)), plan) >= sum(d < begun for _, d in times)
            assert mount.complaints() == []
        assert set(seen) - {0}, "it had to fall"
        assert production.complaints() == [] and replica.complaints() == []
