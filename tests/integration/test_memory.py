"""Memory doesn't grow with what waits: the link down under load, and many groups on one receiver."""

from __future__ import annotations

import contextlib
import os
import random
import time
from pathlib import Path

import pytest

from tests.helpers.hosts import Production, Replica, digest, free_port, xxhsum
from tests.helpers.processes import wait_until
from tests.helpers.refusals import status_of

pytestmark = [pytest.mark.fuse, pytest.mark.slow, pytest.mark.timeout(400)]
MIB = 1 << 20
WINDOW_BYTES = 32 * MIB  # of the codec, on either side of a link
LIMIT_BYTES = 200 * MIB
CHUNK_BYTES = 128 << 10
VOLUME_BYTES = 64 * MIB


def write(volume: Path, total_bytes: int, seconds: float, seed: int) -> None:
    """Noise at random places, spread over that time."""
    random_, begun = random.Random(seed), time.monotonic()
    fd = os.open(volume, os.O_RDWR)
    try:
        count = total_bytes // CHUNK_BYTES
        for number in range(count):
            os.pwrite(fd, random_.randbytes(CHUNK_BYTES), random_.randrange(VOLUME_BYTES // CHUNK_BYTES) * CHUNK_BYTES)
            if (early := begun + number * seconds / count - time.monotonic()) > 0:
                time.sleep(early)
        os.fsync(fd)
    finally:
        os.close(fd)


def test_memory_stays_while_the_link_is_down_under_load(tmp_path: Path) -> None:
    """More than the journal holds, with a mark each second; then the replica comes."""
    port = free_port()
    with Production(
        tmp_path, {"root": VOLUME_BYTES}, port=port, interval="1s", capacity="1GiB"
    ) as production:
        with Replica(tmp_path, port) as replica:
            production.snapshot()
            replica.terminate()
        found = []
        for number in range(10):
            write(production.volume(), 120 * MIB, 4, number)
            found.append(production.resident_bytes()["pss"])
        assert status_of(production)["passing"], "the journal was full"
        assert max(found) < LIMIT_BYTES + WINDOW_BYTES, found
        assert max(found[5:]) - max(found[:5]) < 30 * MIB, found
        with Replica(tmp_path, port) as replica:
            wait_until(lambda: not status_of(production)["passing"], "the journal has room again", 60, 0.5)
            last = production.snapshot(120)
            assert digest(replica.store(), last) == xxhsum(production.volume())
            assert production.resident_bytes()["pss"] < LIMIT_BYTES + WINDOW_BYTES
            assert replica.resident_bytes()["pss"] < LIMIT_BYTES + WINDOW_BYTES


def test_ten_groups_on_one_receiver_take_a_window_each(tmp_path: Path) -> None:
    with Replica(tmp_path) as replica, contextlib.ExitStack() as stack:
        groups = [
            stack.enter_context(
                Production(tmp_path, {"root": VOLUME_BYTES}, port=replica.port, interval="2s", group=f"g{number}")
            )
            for number in range(10)
        ]
        found = []
        for turn in range(6):
            for number, production in enumerate(groups):
                write(production.volume(), 8 * MIB, 0.2, 10 * turn + number)
            found.append(replica.resident_bytes()["pss"])
        for production in groups:
            last = production.snapshot(120)
            assert digest(replica.store(production.group), last) == xxhsum(production.volume())
        found.append(replica.resident_bytes()["pss"])
        assert max(found) < LIMIT_BYTES + 10 * WINDOW_BYTES, found
        assert max(found[3:]) - max(found[:3]) < 100 * MIB, found
