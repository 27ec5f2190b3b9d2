"""A shipper, splitter and replica in this process whose journal is full when a test says so."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from pitfs.errors import CapacityError, LinkError
from pitfs.journal.reader import Copy, Interval
from pitfs.model.record import RecordKind
from pitfs.model.transfer import DIFF_ENTRY, Checkpoint, Data, Section, TransferKind
from pitfs.replication import cursor, full_sync
from pitfs.splitter import splitter as splitter_module
from pitfs.splitter.service import SplitterService
from pitfs.splitter.sync_gate import SyncGate
from pitfs.store.store import Store
from tests.helpers.shipper import MARGIN_S, VOLUME_BYTES, Here, Parts
from tests.helpers.stores import read_image

BYPASS_S = 0.1
_IN_THE_RESERVE = (RecordKind.MARK, RecordKind.COPY_PROGRESS)


class Session(Here):
    """Remembers the kind of each transfer, and what came with it."""

    def __init__(self, ingest: Any) -> None:
        super().__init__(ingest)
        self.kinds: list[TransferKind] = []
        self.rows: list[int] = []
        self.contents_bytes: list[int] = []

    async def begin(self, manifest: Any) -> Any:
        self.kinds.append(manifest.kind)
        self.rows.append(0)
        self.contents_bytes.append(0)
        return await super().begin(manifest)

    async def send(self, frame: Data | Checkpoint) -> None:
        if isinstance(frame, Data) and frame.section is Section.DIFF:
            self.rows[-1] += len(frame.payload) // DIFF_ENTRY.itemsize
        if isinstance(frame, Data) and frame.section is Section.DIFF_BLOCKS:
            self.contents_bytes[-1] += len(frame.payload)
        await super().send(frame)


class Bypassing(Parts):
    """`at[seq]`: the naive model, the volume's bytes at each position that there was.

    `full`: writes can't be journalled.
    `during`: called each time before and after a copy reads the backing volume, for writes that race with it.
    """

    def __init__(self, tmp: Path, monkeypatch: pytest.MonkeyPatch, seed: int = 0) -> None:
        super().__init__(tmp, seed)
        self.full = False
        self.during: Callable[[], None] = lambda: None
        self.session = Session(self.pipeline.ingest)
        self.at = {self.splitter.state.seq: self.now}
        monkeypatch.setattr(cursor, "POLL_S", 0.001)
        begin = splitter_module.begin_copy

        def begin_copy(*arguments: Any) -> None:
            begin(*arguments)
            self.at[self.splitter.state.seq] = self.now

        monkeypatch.setattr(splitter_module, "begin_copy", begin_copy)
        for name in ("_read", "_read_picked"):
            monkeypatch.setattr(full_sync, name, self._around(getattr(full_sync, name)))
        self._limit()

    def _around(self, read: Callable[..., bytearray]) -> Callable[..., bytearray]:
        def reading(*arguments: Any) -> bytearray:
            self.during()
            buffer = read(*arguments)
            self.during()
            return buffer

        return reading

    def _limit(self) -> None:
        append = self.splitter.journal.append

        def limited(kind: int, *arguments: Any) -> None:
            if self.full and kind not in _IN_THE_RESERVE:
                raise CapacityError("the journal is full")
            append(kind, *arguments)

        find_room = self.splitter._find_room

        def searched(*arguments: Any) -> None:
            if self.full:
                self.splitter._no_room = arguments[0], CapacityError("the journal is full")
            else:
                find_room(*arguments)

        self.splitter.journal.append, self.splitter._find_room = limited, searched

    @property
    def splitter(self) -> Any:
        return self.pipeline.splitter

    @property
    def now(self) -> bytes:
        return self.pipeline.states[-1][0]

    def put(self, offset: int, data: bytes) -> None:
        """Writes, and remembers the state where it has a position of its own."""
        before = self.splitter.state.seq
        self.pipeline.write(0, offset, data)
        if self.splitter.state.seq > before:
            self.at[self.splitter.state.seq] = self.now

    def scatter(self, count: int = 1) -> None:
        """Small writes anywhere, some of zeros."""
        random = self.pipeline.random
        for _ in range(count):
            length = int(random.integers(1, 9000))
            zeros = random.random() < 0.2
            self.put(
                int(random.integers(VOLUME_BYTES - length)), bytes(length) if zeros else random.bytes(length)
            )

    def overflow(self, count: int = 3) -> None:
        """Writes of which none is journalled."""
        self.full = True
        self.scatter(count)
        assert self.splitter.state.bypass_cause

    async def room(self) -> bool:
        """What is shipped is given back, and writes are journalled again, if there is room for that."""
        self.full = False
        splitter = self.splitter
        if not splitter.state.bypass_cause:
            return True
        splitter.journal.release(splitter.releasable_segment)
        self.service._splitter = splitter
        return await self.service.resume_journal()

    def restart(self, clean: bool) -> None:
        """The splitter's process ends, in order or by a kill, and comes again."""
        if clean:
            self.splitter.close()
            os.close(self.pipeline.lock)
        else:
            self.pipeline.crash()
        self.pipeline.start()
        self.service = SplitterService(self.splitter, SyncGate(holds=False, blocks=False, copying=False))
        self._limit()

    async def connect_anew(self) -> None:
        kinds = self.session.kinds, self.session.rows, self.session.contents_bytes
        self.session = Session(self.pipeline.ingest)
        self.session.kinds, self.session.rows, self.session.contents_bytes = kinds
        await self.locate()

    async def ship_all(self) -> None:
        """All that there is, as `Shipper.run` does."""
        session = self.session
        while True:
            try:
                item: Interval | Copy | None = None
                with trio.move_on_after(BYPASS_S if self.splitter.state.bypass_cause else MARGIN_S) as waiting:
                    item = await self.shipper.cursor.next_item(session, wait=False)
                if waiting.cancelled_caught:  # it waits for a copy
                    assert self.splitter.state.bypass_cause
                    await self.connect_anew()
                    return
                if isinstance(item, Copy):
                    await self.shipper.full_sync.ship(session, item)
                elif isinstance(item, Interval):
                    await self.shipper.ship_interval(session, item)
                    await self.ship_layers()
                else:
                    return
            except (LinkError, CapacityError):
                self.full = False  # or a copy could never begin
                await self.connect_anew()
                session = self.session

    async def settle(self) -> None:
        """Everything is on the replica."""
        await self.ship_all()
        if self.splitter.state.bypass_cause:
            self.splitter.checkpoints.write(self.splitter.snapshot_progress())
            assert await self.room()
        self.mark()
        await self.ship_all()

    def check(self) -> None:
        """Every position that the replica lists is the model's, and the last one is the present."""
        store = Store.open(self.pipeline.ingest.path)
        try:
            listed = [each.seq for each in store.snapshots()]
            for seq in sorted(each for each in self.at if listed[0] <= each <= listed[-1]):
                resolution = store.at_seq(seq)
                assert resolution.seq <= seq
                assert read_image(store, resolution, 0) == self.at[resolution.seq], (seq, resolution.seq)
            snapshots = {(each.seq, each.time_ns) for each in store.snapshots()}
            for gap in store.gaps():
                assert {(gap.from_seq, gap.from_time_ns), (gap.to_seq, gap.to_time_ns)} <= snapshots
        finally:
            store.close()
        self.assert_replica_has_all()
