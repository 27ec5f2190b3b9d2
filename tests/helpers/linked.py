"""Both sides in this process, and between them TCP through a proxy: splitter, shipper and link, receiver and store.

    async with linked(tmp, monkeypatch) as both:
        both.write(); both.mark()
        await both.arrived()
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Final

import pytest
import trio

from pitfs.link.sessions.connect import SenderSession, Timeouts, connect, serve
from pitfs.link.sessions.receiver import Limits
from pitfs.model import schedule
from pitfs.replication import status, stream
from pitfs.replication.bandwidth import Bandwidth
from pitfs.replication.shipper import Shipper
from pitfs.splitter.service import SplitterService
from pitfs.splitter.sync_gate import SyncGate
from pitfs.store.check.heal import Healer
from pitfs.store.ingest import Ingest
from pitfs.store.store import Store
from tests.helpers.channel import client_of
from tests.helpers.netlink import Proxy
from tests.helpers.pipeline import Pipeline
from tests.helpers.shipper import settings_of
from tests.helpers.stores import read_image

FRAME_BYTES: Final = 8 << 10  # small, so that a conversation has many and a cut loses little
MARGIN_S: Final = 20.0
RATE_BYTES_PER_S: Final = 10**9


class Linked:
    """`sessions`: all that the shipper has had, oldest first."""

    def __init__(self, pipeline: Pipeline, proxy: Proxy, timeouts: Timeouts) -> None:
        self.pipeline, self.proxy = pipeline, proxy
        self.service = SplitterService(pipeline.splitter, SyncGate(holds=False, blocks=False, copying=False))
        self._timeouts = timeouts
        client = client_of(lambda: self.service)
        # The rate is never reached, and makes the room for layers known: none, so that each goes for itself.
        settings = settings_of(pipeline, rate_bytes_per_s=RATE_BYTES_PER_S)
        self.shipper = Shipper(settings, client, client, self._connect)
        self.sessions: list[SenderSession] = []

    @asynccontextmanager
    async def _connect(self, queue_bytes: int) -> AsyncIterator[SenderSession]:
        async with connect(
            "127.0.0.1", self.proxy.port, tls=None, hello=self.pipeline.hello, rate_bytes_per_s=RATE_BYTES_PER_S,
            timeouts=self._timeouts, queue_bytes=queue_bytes,
        ) as session:  # fmt: skip
            self.sessions.append(session)
            yield session

    def write(self, count: int = 1) -> None:
        for _ in range(count):
            self.pipeline.random_write()

    def mark(self) -> None:
        self.pipeline.splitter.mark()
        self.shipper.cursor.wake.set()

    @property
    def payload_bytes(self) -> int:
        """Sent so far, on all connections."""
        return sum(session.payload_bytes for session in self.sessions)

    async def arrived(self) -> None:
        """Until the replica has all that is marked, at every write."""
        with trio.fail_after(MARGIN_S):
            while True:
                changed, there = self.shipper.status.changed, self.shipper.status.committed
                newest = there is not None and there.mark == self.pipeline.splitter.state.mark
                if newest and not self.shipper.backfill.waiting and self._coarse_count() == 0:
                    return
                with trio.move_on_after(0.01):
                    await changed.wait()

    def _coarse_count(self) -> int:
        store = self.store()
        try:
            return sum(interval.granularity_ns != 0 for interval in store.intervals())
        finally:
            store.close()

    def store(self) -> Store:
        return Store.open(str(self.pipeline.tmp / "g"))

    def assert_every_write_is_there(self) -> None:
        """Each state since the first copy, exact, and nothing of a transfer is left."""
        pipeline, store = self.pipeline, self.store()
        try:
            assert list(store.gaps()) == []
            first = next(iter(store.snapshots())).seq
            for seq in range(first, len(pipeline.states)):
                resolution = store.at_seq(seq)
                assert resolution.seq == seq
                for volume in range(len(pipeline.sizes)):
                    assert read_image(store, resolution, volume) == pipeline.states[seq][volume], (seq, volume)
        finally:
            store.close()
        assert list((pipeline.tmp / "g" / "staging").iterdir()) == []


@asynccontextmanager
async def linked(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, *, streams: bool = False,
    timeouts: Timeouts | None = None, limits: Limits | None = None, proxy: Proxy | None = None,
) -> AsyncIterator[Linked]:  # fmt: skip
    """Runs both sides for as long as the context.

    Args:
        streams: writes go as they come; else as intervals, each with its layers.
        proxy: it may have been told what to do already.
    """
    monkeypatch.setattr(status, "BACKOFF_S", (0.001,))
    monkeypatch.setattr(Bandwidth, "payload_bytes", FRAME_BYTES)
    monkeypatch.setattr(schedule, "choose_shipping_mode", lambda **_: schedule.ShippingMode(streams, "for the test"))
    for name in ("MIN_WINDOW_BYTES", "MAX_WINDOW_BYTES"):
        monkeypatch.setattr(stream, name, 2 * FRAME_BYTES)
    pipeline.ingest.close()  # the receiver opens the store
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    proxy = proxy or Proxy(0)
    proxy.to_port = listeners[0].socket.getsockname()[1]
    with proxy:
        both = Linked(pipeline, proxy, timeouts or Timeouts())
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(both.service.run)
                opening = partial(Ingest, str(pipeline.tmp))
                healer = partial(Healer, str(pipeline.tmp))
                nursery.start_soon(
                    partial(serve, listeners, opening, tls=None, limits=limits or Limits(), open_healer=healer)
                )
                nursery.start_soon(both.shipper.run)
                yield both
                nursery.cancel_scope.cancel()
        finally:
            both.shipper.close()
