"""A shipper beside the real splitter, its service and the store, in this process: without processes and a link."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from pitfs.journal.reader import Copy, Interval
from pitfs.model.transfer import (
    Checkpoint,
    Data,
    Durable,
    End,
    FindContents,
    Flush,
    Manifest,
    ResumePoint,
    StreamMark,
    Welcome,
    Writes,
)
from pitfs.replication.phases import Phase
from pitfs.replication.ports import ShipperSettings
from pitfs.replication.shipper import Shipper
from pitfs.splitter.service import SplitterService
from pitfs.splitter.startup import VolumeSpec, journal_directory
from pitfs.splitter.sync_gate import SyncGate
from pitfs.store.catalog.records import Interval as Facts
from pitfs.store.ingest import Ingest
from pitfs.store.store import Store
from tests.helpers.channel import client_of
from tests.helpers.pipeline import Pipeline
from tests.helpers.stores import feed, read_image

VOLUME_BYTES = 300_000
MARGIN_S = 30.0


def settings_of(pipeline: Pipeline, mode: str = "dynamic", rate_bytes_per_s: int | None = None) -> ShipperSettings:
    return ShipperSettings(
        hello=pipeline.hello,
        peer="here",
        journal_directory=journal_directory(pipeline.state),
        capacity_bytes=pipeline.capacity_bytes,
        configured=lambda: pipeline.specs,
        mode=mode,
        interval_ns=2 * 10**9,
        rate_bytes_per_s=rate_bytes_per_s,
    )


class Here:
    """A session with a replica that is in this process. `begun` counts the transfers that were offered to it."""

    def __init__(self, ingest: Ingest) -> None:
        self.peer = "here"
        self._ingest = ingest
        self.failure: Exception | None = None
        self.welcome: Welcome = ingest.welcome()
        self.durable = ResumePoint()
        self.on_progress: Callable[[ResumePoint], None] | None = None
        self.on_durable: Callable[[Durable], None] | None = None
        self.wire_bytes = self.payload_bytes = self.begun = 0
        self.busy_s = 0.0
        self.resumed: list[ResumePoint] = []  # of each transfer, where it went on
        self.flushed: list[Flush] = []

    async def begin(self, manifest: Manifest) -> ResumePoint:
        self.begun += 1
        self.resumed.append(self._ingest.begin(manifest))
        return self.resumed[-1]

    async def send(self, frame: Data | Checkpoint) -> None:
        feed(self._ingest, frame)

    async def park(self) -> ResumePoint:
        return self._ingest.park(())

    async def stream(self, writes: Writes | None, flush: Flush, window_bytes: int = 0) -> None:
        if writes is not None:
            self._ingest.write(writes)
        self.flushed.append(flush)
        self._answer(self._ingest.flush(flush.protected_through_ns))

    async def stream_mark(self, mark: StreamMark) -> None:
        self._answer(self._ingest.mark(mark))

    async def wait_durable(self) -> None:
        """Each is answered at once."""

    def answer_wants(self, find: FindContents) -> None:
        """This replica wants nothing."""

    def _answer(self, durable: Durable) -> None:
        assert self.on_durable is not None
        self.on_durable(durable)

    async def finish(self, end: End) -> Welcome:
        self.welcome = self._ingest.end(end)
        return self.welcome


class Parts:
    """A pipeline whose journal a shipper follows."""

    def __init__(self, tmp: Path, seed: int = 0, mode: str = "dynamic") -> None:
        self.pipeline = Pipeline(tmp, [VOLUME_BYTES], [4096], capacity_bytes=16 << 20, seed=seed)
        self.service = SplitterService(self.pipeline.splitter, SyncGate(holds=False, blocks=False, copying=False))
        self.session = Here(self.pipeline.ingest)
        self.client = client_of(lambda: self.service)
        self._settings = settings_of(self.pipeline, mode)
        self.shipper = self._new_shipper()

    def _new_shipper(self) -> Shipper:
        return Shipper(self._settings, self.client, self.client, self._connect)

    def use_configuration(self, configured: tuple[VolumeSpec, ...]) -> None:
        """As a shipper that is started again with an edited file."""
        self._settings = dataclasses.replace(self._settings, configured=lambda: configured)
        self.restart_shipper()

    @asynccontextmanager
    async def _connect(self, queue_bytes: int) -> AsyncIterator[Here]:
        yield self.session

    async def locate(self) -> None:
        """As on a connection that has just been made."""
        status = self.shipper.status
        if status.phase is not Phase.DISCONNECTED:
            status.enter(Phase.DISCONNECTED)
        status.enter(Phase.CONNECTING)
        await self.shipper.locate(self.session)

    async def connect_anew(self) -> None:
        """As after a connection that broke."""
        self.session = Here(self.pipeline.ingest)
        await self.locate()

    def save_replica(self) -> Path:
        """A copy of the store as it is now, as a backup has it."""
        return Path(shutil.copytree(self.pipeline.ingest.path, self.pipeline.tmp / "saved"))

    def restore_replica(self, saved: Path) -> None:
        ingest = self.pipeline.ingest
        ingest.close()
        shutil.rmtree(ingest.path)
        saved.rename(ingest.path)
        self.pipeline.ingest = Ingest(str(self.pipeline.tmp), self.pipeline.hello)

    async def next(self) -> Interval | Copy:
        with trio.fail_after(MARGIN_S):
            item = await self.shipper.cursor.next_item(self.session)
            assert item is not None
            return item

    async def ship(self, layers: bool = True) -> Interval | Copy:
        """The next item, to its end; the layers of all journals that wait as well."""
        item, session = await self.next(), self.session
        if isinstance(item, Copy):
            await self.shipper.full_sync.ship(session, item)
        else:
            await self.shipper.ship_interval(session, item)
            while layers and self.shipper.backfill.waiting and not self.shipper.cursor.wake.is_set():
                await self.shipper.ship_layers(session)
        return item

    async def ship_marked(self) -> None:
        """All intervals that are closed, without layers: a large one was closed in parts."""
        while self.session.welcome.mark < self.pipeline.splitter.state.mark:
            assert isinstance(await self.ship(layers=False), Interval)

    async def ship_layers(self, steps: int | None = None) -> None:
        """Layers of the journals that wait, as many steps; all of them if None."""
        while self.shipper.backfill.waiting and steps != 0:
            self.shipper.cursor.wake = trio.Event()
            await self.shipper.ship_layers(self.session)
            steps = None if steps is None else steps - 1

    def restart_shipper(self) -> None:
        """Another one takes over, as after a kill."""
        self.shipper.close()
        self.shipper = self._new_shipper()

    def granularities(self) -> list[int | None]:
        """Of the replica's intervals, oldest first."""
        return [interval.granularity_ns for interval in self._intervals()]

    def causes(self) -> list[str]:
        return [interval.cause for interval in self._intervals()]

    def _intervals(self) -> list[Facts]:
        store = Store.open(self.pipeline.ingest.path)
        try:
            return list(store.intervals())
        finally:
            store.close()

    def fill(self) -> None:
        """Writes until they bypass the journal, and one more."""
        while not self.pipeline.splitter.state.bypass_cause:
            self.write(100_000)
        self.write(100_000)

    def write(self, length: int = 5000) -> None:
        pipeline = self.pipeline
        at = int(pipeline.random.integers(VOLUME_BYTES - length))
        pipeline.write(0, at, pipeline.random.bytes(length))

    def mark(self) -> None:
        self.pipeline.splitter.mark()

    def assert_replica_has_all(self) -> None:
        store = Store.open(self.pipeline.ingest.path)
        try:
            latest = store.latest()
            assert latest is not None
            assert read_image(store, latest, 0) == self.pipeline.states[-1][0]
        finally:
            store.close()

    def close(self) -> None:
        self.shipper.close()
        self.pipeline.close()


async def recovers(parts: Parts) -> None:
    """A new copy comes by itself, then intervals as ever."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(parts.service.run)
        assert isinstance(await parts.ship(), Copy)
        parts.assert_replica_has_all()
        parts.write()
        parts.mark()
        assert isinstance(await parts.ship(), Interval)
        parts.assert_replica_has_all()
        nursery.cancel_scope.cancel()


async def stream(parts: Parts, count: int = 3, leave: bool = True) -> None:
    """Streams some writes, and leaves the stream in the middle of the interval."""
    shipper, session = parts.shipper, parts.session
    if shipper.status.phase is not Phase.STREAMING:
        shipper.stream.begin(session)
    for _ in range(count):
        parts.write()
    await shipper.stream.pump(60.0)
    if leave:
        await shipper.stream.finish()
        shipper.status.enter(Phase.WAITING)
