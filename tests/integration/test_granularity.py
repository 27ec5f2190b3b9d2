"""Granularity over a link that can't carry every write: what is offered is exact, and no coarser than it says."""

from __future__ import annotations

import mmap
import os
import random
import time
from pathlib import Path

import pytest

from pitfs.model.ladder import RUNGS_NS
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


def test_granularity_falls_as_far_as_the_rate_makes_it_and_what_is_offered_is_exact(tmp_path: Path) -> None:
    """The interval has 1.5 MB of room: its diff takes 0.8 MB of it, the whole journal would take another 1.9."""
    plan = Plan(1, VOLUME_BYTES)
    with (
        Replica(tmp_path) as replica,
        Production(
            tmp_path, {"root": VOLUME_BYTES}, port=replica.port, interval="6s", rate="2Mbit"
        ) as production,
    ):
        production.snapshot()
        times = write_all(production.volume(), plan)
        last = production.snapshot(60)
        intervals = replica.listing()["intervals"]
        rungs = [each["granularity_ns"] for each in intervals]
        assert set(rungs) & set(RUNGS_NS[:-1]), intervals
        assert all("of it fit" in each["cause"] for each in intervals if each["granularity_ns"]), intervals
        random_ = random.Random(1)
        with Mount(replica.store(), tmp_path) as mount:
            for _ in range(60):
                time_ns = random_.randrange(times[0][0], instant_ns(last))
                image = mount.image(instant_name(time_ns))
                seq = check_image(image, plan)
                granularity = os.getxattr(image, "user.pitfs.granularity")
                assert seq <= sum(begun <= time_ns for begun, _ in times)
                if granularity != b"null":
                    rung_ns = max(int(granularity), 1)
                    before = sum(done <= time_ns // rung_ns * rung_ns for _, done in times)
                    assert seq >= before, "older than the end of the granule before"
            assert mount.complaints() == []
        assert production.complaints() == [] and replica.complaints() == []
