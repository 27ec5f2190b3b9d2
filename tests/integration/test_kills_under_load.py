"""Kills under a load that the link can't follow: every interval comes back to every write, and no cause is untrue.

Writes, more than the link carries, an fsync, then SIGKILL for one of the programs, which starts again. The seed decides
what is written and who is killed; the machine decides how far replication was then.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from tests.helpers.hosts import Mount, Production, Replica, digest, instant_name, instant_ns, xxhsum
from tests.helpers.processes import HostError, wait_until

VOLUME_BYTES: Final = 32 << 20
SECTOR_BYTES: Final = 512
MAX_SECTORS: Final = 32  # of a write
WRITES_PER_S: Final = 3000  # some 36 MB in the journal: with 12 times 3 s of that it stays far from full
CAPACITY_BYTES: Final = 2 << 30
CHECKED_WRITES: Final = 150
WAITS: Final = "until the link is idle"
IDLE_S: Final = 150.0  # for all of backfill; also while other tests have the cores


@dataclass(frozen=True, slots=True)
class Write:
    offset: int
    content: bytes
    done_ns: int


class Kills:
    """One run of the scenario.

    Args:
        tmp: for everything. seed: decides what is written, and who is killed.
    """

    def __init__(self, tmp: Path, seed: int) -> None:
        self.tmp, self.random = tmp, random.Random(seed)
        self.noise = self.random.randbytes(1 << 20)  # contents are cut from it: making them takes no time
        self.writes: list[Write] = []
        self.happened = [f"seed {seed}"]

    def run(self, rounds: int, longest_s: float) -> None:
        """Kills so often, each time behind writes for a second at least; then waits, and checks."""
        with (
            Replica(self.tmp) as self.replica,
            Production(
                self.tmp, {"root": VOLUME_BYTES}, port=self.replica.port, interval="1s", capacity=f"{CAPACITY_BYTES}B"
            ) as self.production,
        ):
            try:
                self.production.snapshot()
                for _ in range(rounds):
                    self.write(self.random.uniform(1.0, longest_s))
                    kill = self.random.choice([self.kill_protect, self.kill_part, self.kill_receive, self.kill_receive])
                    kill()
                last = self.last_snapshot()
                assert self.production.status()["journal_bytes"] < 0.8 * CAPACITY_BYTES, "no room was needed"
                self.wait_for_backfill()
                self.check(last)
            except BaseException as error:
                error.add_note(f"{'; '.join(self.happened)}; {self.replica.listing()['intervals']}")
                raise
        shutil.rmtree(self.tmp)  # it is large: a failure keeps it

    def write(self, duration_s: float) -> None:
        """Random writes, and an fsync."""
        fd = os.open(self.production.volume(), os.O_RDWR | os.O_DIRECT)
        begun, first = time.monotonic(), len(self.writes) + 1
        try:
            with mmap.mmap(-1, MAX_SECTORS * SECTOR_BYTES) as buffer:  # aligned, as O_DIRECT wants
                while (now := time.monotonic()) < begun + duration_s:
                    time.sleep(max(0.0, begun + (len(self.writes) + 1 - first) / WRITES_PER_S - now))
                    size = self.random.randint(1, MAX_SECTORS) * SECTOR_BYTES
                    offset = self.random.randrange((VOLUME_BYTES - size) // SECTOR_BYTES + 1) * SECTOR_BYTES
                    at = self.random.randrange(len(self.noise) - size)
                    content = self.noise[at : at + size]
                    buffer[:size] = content
                    os.pwritev(fd, [memoryview(buffer)[:size]], offset)
                    self.writes.append(Write(offset, content, time.time_ns()))
            os.fsync(fd)
        finally:
            os.close(fd)
        self.happened.append(f"writes {first} to {len(self.writes)}")

    # -- who is killed -----------------------------------------------------------------------------------

    def kill_protect(self) -> None:
        """All of it at once."""
        self.happened.append("protect")
        self.production.kill()
        self.production.restart()

    def kill_part(self) -> None:
        """Splitter, shipper or the minder of both."""
        part = self.random.choice(["pitfs-splitter", "pitfs-shipper", "minder"])
        self.happened.append(part)
        minder = self.production.process
        assert minder is not None
        if part == "minder":
            minder.kill()
            minder.wait(10)
            wait_until(lambda: not self.production.pids(), "splitter and shipper end without their minder", 60)
            self.production.restart()
            return
        for pid in self.production.pids(part):
            os.kill(pid, signal.SIGKILL)
        if part == "pitfs-splitter":
            wait_until(self.is_mounted_again, "the splitter is there again", 60, 0.1)

    def is_mounted_again(self) -> bool:
        with contextlib.suppress(OSError):  # of the dead one's mount
            return self.production.volume().exists()
        return False

    def kill_receive(self) -> None:
        self.happened.append("receive")
        self.replica.kill()
        self.replica.start()

    # -- all comes together ------------------------------------------------------------------------------

    def last_snapshot(self) -> str:
        """As soon as the shipper is there, and what was written before is through."""
        deadline = time.monotonic() + IDLE_S
        while True:
            try:
                return self.production.snapshot()
            except HostError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.5)

    def wait_for_backfill(self) -> None:
        """Until nothing waits. What is shown meanwhile is true: nothing is given up, for there is room enough."""
        deadline = time.monotonic() + IDLE_S
        while True:
            # In this order: what waits according to the status is only less a moment later.
            status, intervals = self.production.status(), self.replica.listing()["intervals"]
            coarse = [each for each in intervals if each["granularity_ns"] != 0]
            for each in coarse:
                assert each["cause"].endswith(WAITS), each
            if not coarse:
                return
            assert status["backfill_intervals"] or status["link"] != "connected", (status, coarse)
            assert time.monotonic() < deadline, (status, coarse)
            time.sleep(0.3)

    # -- every instant is exact --------------------------------------------------------------------------

    def check(self, last: str) -> None:
        listing = self.replica.listing()
        assert listing["gaps"] == []
        assert listing["snapshots"][-1]["seq"] == len(self.writes)
        model = bytearray(VOLUME_BYTES)
        picked = sorted(self.random.sample(range(len(self.writes)), min(CHECKED_WRITES, len(self.writes))))
        whole = set(self.random.sample(picked, 5))
        position = 0
        with Mount(self.replica.store(), self.tmp) as mount:
            for number in picked:
                position = self.apply(model, position, number)
                write = self.writes[number]
                end = write.offset + len(write.content)
                before = bytes(model[write.offset : end])
                assert self.read(mount, number - 1, write.offset, end) == before, (number, "before")
                position = self.apply(model, position, number + 1)
                assert self.read(mount, number, write.offset, end) == write.content, (number, "after")
                if number in whole:
                    assert self.read(mount, number, 0, VOLUME_BYTES) == model, (number, "whole")
            assert mount.complaints() == []
        assert digest(self.replica.store(), last) == xxhsum(self.production.volume())

    def apply(self, model: bytearray, position: int, end: int) -> int:
        for write in self.writes[position:end]:
            model[write.offset : write.offset + len(write.content)] = write.content
        return end

    def read(self, mount: Mount, number: int, start: int, end: int) -> bytes:
        """Of the image behind that write (counted from 0; -1 is before the first)."""
        time_ns = self.writes[number].done_ns if number >= 0 else self.first_ns()
        with mount.image(instant_name(time_ns)).open("rb") as image:
            assert int(os.getxattr(image.fileno(), "user.pitfs.seq")) == number + 1
            return os.pread(image.fileno(), end - start, start)

    def first_ns(self) -> int:
        snapshots: list[dict[str, Any]] = self.replica.listing()["snapshots"]
        return instant_ns(snapshots[0]["instant"])


@pytest.mark.fuse
@pytest.mark.timeout(400)
@pytest.mark.parametrize("seed", [1])
def test_after_kills_every_interval_is_back_at_every_write(tmp_path: Path, seed: int) -> None:
    Kills(tmp_path, seed).run(8, 2.0)


@pytest.mark.fuse
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(100, 120))
def test_for_longer(tmp_path: Path, seed: int) -> None:
    Kills(tmp_path, seed).run(12, 3.0)
