"""The splitter's event loop waits for no disk: writes that need one wait beside it, and all else goes on."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from pitfs.fuse.splitter import FIRST_INODE, SplitterOperations
from pitfs.model.record import CopyProgress
from pitfs.splitter import messages
from pitfs.splitter.group_commit import GroupCommit
from pitfs.splitter.service import SplitterService
from pitfs.splitter.sync_gate import SyncGate
from tests.helpers.pipeline import Pipeline

MARGIN_S = 10.0
SLOW_S = 0.3
BLOCK = 4096
CALLS = ("fdatasync", "fsync", "posix_fallocate")


class Disk:
    """Stands before all calls that wait for a disk. `in_loop`: those that were made in the test's own thread.

    They take `slow_s`, or while it is `held` until it isn't.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._loop = threading.get_ident()
        self._passing = threading.Event()
        self._passing.set()
        self.in_loop: list[str] = []
        self.waiting = 0
        self.slow_s = 0.0
        for name in CALLS:
            patch.setattr(os, name, self._before(name, getattr(os, name)))

    def _before(self, name: str, real: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            if threading.get_ident() == self._loop:
                self.in_loop.append(name)
            else:
                self.waiting += 1
                assert self._passing.wait(MARGIN_S)
                self.waiting -= 1
            time.sleep(self.slow_s)
            real(*arguments)

        return call

    def hold(self) -> None:
        self._passing.clear()

    def let_go(self) -> None:
        self._passing.set()


class Production:
    """A splitter with its service and the kernel's requests, in the event loop of the test."""

    def __init__(self, tmp: Path, patch: pytest.MonkeyPatch) -> None:
        self.pipeline = Pipeline(tmp, [8 << 20], [BLOCK], capacity_bytes=16 << 20)
        self.splitter = self.pipeline.splitter
        self.splitter.copied(CopyProgress(1, 1, 0))
        self.service = SplitterService(self.splitter, SyncGate(holds=False, blocks=False, copying=False))
        self.operations = SplitterOperations(self.splitter, GroupCommit(self.splitter), self.service)
        self.content = bytearray(self.pipeline.backings[0].read_bytes())
        self.disk = Disk(patch)

    async def write(self, offset: int, data: bytes) -> None:
        assert await self.operations.write(FIRST_INODE, offset, data) == len(data)
        self.content[offset : offset + len(data)] = data

    async def fsync(self) -> None:
        await self.operations.fsync(FIRST_INODE, True)

    async def read_and_ask(self) -> messages.SplitterStatus:
        """What must go on always."""
        with trio.fail_after(MARGIN_S):
            assert await self.operations.read(FIRST_INODE, 0, BLOCK) == self.content[:BLOCK]
            return await self.service.handle(messages.ReadStatus())

    async def fill(self) -> None:
        """Writes until the journal has no room for another."""
        while self.splitter.journal.used_bytes < self.splitter.journal.capacity_bytes:
            await self.write(0, os.urandom(1 << 20))
        journal = self.splitter.journal
        while journal.tail.offset + (1 << 20) + (1 << 16) < journal.segment_bytes:
            await self.write(0, os.urandom(1 << 20))

    def release(self) -> None:
        """The replica has everything."""
        self.splitter.release(self.splitter.journal.tail.segment)

    def check(self) -> None:
        assert self.disk.in_loop == [], "the event loop waited for the disk"
        assert self.pipeline.backings[0].read_bytes() == self.content
        assert self.splitter.read(0, 0, len(self.content)) == self.content


@pytest.fixture
def production(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Production]:
    made = Production(tmp_path, monkeypatch)
    yield made
    made.disk.let_go()
    made.disk.slow_s = 0.0
    made.pipeline.close()


async def test_while_a_bypass_is_made_durable_all_but_writes_goes_on(production: Production) -> None:
    await production.fill()
    done: list[str] = []

    async def noted(name: str, action: Callable[[], Any]) -> None:
        await action()
        done.append(name)

    production.disk.hold()
    async with trio.open_nursery() as nursery:
        for index in range(2):
            data = bytes([index + 1]) * (1 << 20)
            nursery.start_soon(noted, "write", lambda at=index, data=data: production.write((2 + at) << 20, data))
        await wait_all_tasks_blocked()
        for _ in range(5):  # the search for room first, then the bypass
            await trio.sleep(0.01)
        nursery.start_soon(noted, "fsync", production.fsync)
        await wait_all_tasks_blocked()
        seq = (await production.read_and_ask()).seq
        assert done == [] and production.disk.waiting, "nothing is answered before it is durable"
        production.disk.let_go()
    assert sorted(done) == ["fsync", "write", "write"]
    assert production.splitter.state.bypass_cause and production.splitter.state.seq == seq
    production.check()


async def test_a_write_that_waits_for_a_segment_holds_up_nothing_else(production: Production) -> None:
    journal = production.splitter.journal
    production.disk.hold()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(production.service.run)

        async def write() -> None:
            for at in range(6):
                await production.write(at << 20, os.urandom(1 << 20))
            nursery.cancel_scope.cancel()

        nursery.start_soon(write)
        while not production.disk.waiting or journal.tail.offset + (1 << 20) < journal.segment_bytes:
            await trio.sleep(0.01)
        await wait_all_tasks_blocked()
        assert (await production.read_and_ask()).tail.segment == 1
        await production.write(7 << 20, b"small" * 100)  # there is room for it
        production.disk.let_go()
    assert journal.tail.segment == 2 and not production.splitter.state.bypass_cause
    production.check()


async def test_a_write_waits_until_the_end_of_a_bypass_is_durable(production: Production) -> None:
    await production.fill()
    await production.write(0, os.urandom(1 << 20))
    splitter = production.splitter
    assert splitter.state.bypass_cause
    await production.service._keep()
    production.release()
    splitter.journal.release(splitter.journal.tail.segment)
    production.disk.hold()
    done: list[int] = []

    async def write() -> None:
        await production.write(0, b"after")
        done.append(splitter.state.seq)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(production.service.resume_journal)
        await wait_all_tasks_blocked()
        while not production.disk.waiting:
            await trio.sleep(0.01)
        nursery.start_soon(write)
        await wait_all_tasks_blocked()
        await production.read_and_ask()
        assert done == []
        production.disk.let_go()
    assert not splitter.state.bypass_cause and splitter.state.copy is not None
    assert done == [splitter.state.seq]
    production.check()


async def test_a_room_that_was_not_found_once_is_looked_for_again_later(production: Production) -> None:
    """Two writes learn that there is none; room comes before the second says so."""
    splitter = production.splitter
    await production.fill()
    production.disk.hold()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(production.write, 0, os.urandom(1 << 20))
        await wait_all_tasks_blocked()
        splitter.release(splitter.journal.tail.segment)
        production.disk.let_go()
    before = splitter.state.seq
    if splitter.state.bypass_cause:
        await production.service._keep()
        assert not splitter.state.bypass_cause
    await production.write(0, os.urandom(1 << 20))
    assert splitter.state.seq > before
    production.check()


async def test_the_event_loop_runs_on_whatever_the_disk_does(production: Production) -> None:
    """A watchdog: no gap is as long as one call of a slow disk, from the first segment to the end of a copy."""
    splitter, disk = production.splitter, production.disk
    gaps = [0.0]

    async def watch() -> None:
        before = time.monotonic()
        while True:
            await trio.sleep(0.001)
            now = time.monotonic()
            gaps.append(now - before)
            before = now

    disk.slow_s = SLOW_S
    with trio.fail_after(4 * MARGIN_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(production.service.run)
            nursery.start_soon(watch)
            while splitter.journal.tail.segment < 4:  # rolls, checkpoints
                await production.write(0, os.urandom(1 << 20))
                production.release()
            await production.fsync()
            await production.service.handle(messages.Rescan("to try it"))
            await production.write(0, b"1")
            while not splitter.state.bypass_cause:
                await production.write(0, os.urandom(1 << 20))
            await production.fsync()
            await production.service.handle(messages.Copied(CopyProgress(splitter.state.mark, 1, 0)))
            production.release()
            while splitter.state.bypass_cause:
                await production.write(0, os.urandom(1 << 20))
                await trio.sleep(0.01)
            await production.write(0, b"2")
            await production.fsync()
            nursery.cancel_scope.cancel()
    assert max(gaps) < SLOW_S
    production.check()
