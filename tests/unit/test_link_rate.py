"""The rate of the link is what it carries, not what the replica's disk takes; what goes in time counts both."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import trio

from pitfs.link.sessions.connect import connect
from pitfs.model.transfer import Checkpoint, Data, End, Manifest, ResumePoint, Section, TransferFrame, Welcome
from pitfs.replication.bandwidth import LEAST_BUSY_S, Bandwidth
from pitfs.replication.sending import MEASURABLE_BYTES, Sender
from pitfs.replication.status import ReplicationStatus
from tests.helpers.links import HELLO, MANIFEST, FakeIngest, replica
from tests.helpers.shipper import Here

PAYLOAD = 1 << 20


def frames(count: int) -> Iterator[TransferFrame]:
    for number in range(count):
        yield Data(Section.DIFF_BLOCKS, number * PAYLOAD, bytes(PAYLOAD))
    yield End((0, count * PAYLOAD, 0, 0, 0))


class SlowDisk(Here):
    """A replica over a link of `rate` bytes per second, that takes `commit_s` to commit."""

    def __init__(self, rate: float, commit_s: float) -> None:
        self._rate, self._commit_s = rate, commit_s
        self.durable = ResumePoint()
        self.wire_bytes = self.payload_bytes = 0
        self.busy_s = 0.0

    async def send(self, frame: Data | Checkpoint) -> None:
        size = len(frame.payload) if isinstance(frame, Data) else 0
        await trio.sleep(size / self._rate)
        self.busy_s += size / self._rate
        self.payload_bytes += size
        self.wire_bytes += size // 2

    async def finish(self, end: End) -> Welcome:
        await trio.sleep(self._commit_s)
        return Welcome(1, 1, 1, 1)


@pytest.mark.parametrize("commit_s", [0.0, 9.0])
async def test_the_rate_is_the_links_however_long_the_replica_commits(autojump_clock: object, commit_s: float) -> None:
    bandwidth = Bandwidth(None)
    sender = Sender(ReplicationStatus("dynamic"), bandwidth)
    session = SlowDisk(8 * PAYLOAD, commit_s)
    assert await sender.send(session, frames(8))
    assert bandwidth.rate == pytest.approx(8 * PAYLOAD, rel=0.01)
    assert bandwidth.intake == pytest.approx(8 * PAYLOAD / (1 + commit_s), rel=0.05)
    bandwidth.next_diff_at = trio.current_time() + 10
    assert bandwidth.room_bytes() == pytest.approx(80 * PAYLOAD / (1 + commit_s), rel=0.05), "what is durable by then"
    assert bandwidth.carries(8 * PAYLOAD, 2 * 10**9) is (commit_s == 0)
    assert bandwidth.payload_bytes == PAYLOAD, "frames as for the link"


def test_less_than_a_tick_of_the_kernel_is_no_time() -> None:
    bandwidth = Bandwidth(None)
    bandwidth.measured(MEASURABLE_BYTES, 0.0, 0.5)
    assert bandwidth.rate == MEASURABLE_BYTES / LEAST_BUSY_S


def test_a_configured_rate_decides_whatever_is_measured() -> None:
    bandwidth = Bandwidth(1_000_000)
    bandwidth.measured(10**9, 1.0, 1000.0)
    assert (bandwidth.rate, bandwidth.intake) == (1_000_000, 1_000_000)


@dataclass
class SlowToCommit(FakeIngest):
    """Takes what comes at once, and commits a second later."""

    def end(self, end: End) -> Welcome:
        time.sleep(1.0)
        return super().end(end)


async def test_a_session_isnt_busy_while_the_replica_commits() -> None:
    """Over TCP, with the kernel's word for it."""
    manifest: Manifest = MANIFEST
    async with (
        replica(SlowToCommit) as port,
        connect("127.0.0.1", port, tls=None, hello=HELLO, rate_bytes_per_s=None) as session,
    ):
        await session.begin(manifest)
        begun = trio.current_time()
        for frame in frames(8):
            if isinstance(frame, Data):
                await session.send(frame)
            elif isinstance(frame, End):
                await session.finish(frame)
        elapsed_s = trio.current_time() - begun
        assert elapsed_s >= 1.0
        assert 0 <= session.busy_s <= elapsed_s - 0.9
