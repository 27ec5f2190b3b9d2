"""The splitter's process beside its mount: the control socket, the spare segment, checkpoints, releasing."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final

import trio

from pitfs.errors import CapacityError, PitfsError
from pitfs.splitter import messages
from pitfs.splitter.change_bitmap import marked_bytes
from pitfs.splitter.messages import Backing, SplitterRequest, SplitterStatus
from pitfs.splitter.splitter import NotReadyError, Splitter
from pitfs.splitter.sync_gate import SyncGate
from pitfs.storage.files import file_identity, storage_error

log = logging.getLogger(__name__)

KEEP_INTERVAL_S: Final = 0.25  # how soon segments are given back
CHECKPOINT_INTERVAL_S: Final = 30.0  # bounds what a crash leaves to redo where little is written
ROLLED_CHECKPOINT_S: Final = 5.0  # the same where much is written: each checkpoint writes all that is dirty
RETRY_S: Final = 5.0  # after an error
CLOCK_BEHIND_NS: Final = 10**9  # more than adjusting a running clock takes
WAIT_FOR_WRITES_S: Final = 0.25  # the shipper reports the time to the replica that often, even if nothing is written


class SplitterService:
    """Keeps a splitter going. `run` until cancelled; `handle` answers control requests.

    Args:
        gate: of mode sync.
    """

    def __init__(self, splitter: Splitter, gate: SyncGate) -> None:
        self._splitter = splitter
        self._gate = gate
        self._waiting_for_writes = trio.lowlevel.ParkingLot()
        self._waiting_for_room = trio.lowlevel.ParkingLot()
        self._making_ready = trio.Lock()
        self._spare_taken = trio.lowlevel.ParkingLot()  # of the task that makes spares
        self._stopping = False
        self._clock_warned = False
        self._checkpoint_at, self._checkpoint_segment, self._checkpoint_lsn = -math.inf, 0, -1  # the last one

    async def wait_for_room(self) -> bool:
        """Returns when the journal may have room; False: it will have none, the splitter stops."""
        if not self._stopping:
            await self._waiting_for_room.park()
        return not self._stopping

    async def make_ready(self, wait: NotReadyError) -> None:
        """Returns when a disk has done what a write waits for; other requests go on. Raises OSError."""
        with trio.CancelScope(shield=True):
            async with self._making_ready:  # for the next one in turn there may be nothing left to do
                await trio.to_thread.run_sync(wait.make_ready)

    async def written(self) -> bool:
        """A write was journalled. Returns when it may be answered; False: it must not be, the splitter stops."""
        if self._waiting_for_writes:
            self._waiting_for_writes.unpark_all()
        if self._spare_taken and self._splitter.journal.needs_spare:
            self._spare_taken.unpark_all()
        state = self._splitter.state
        if not self._gate.holds or state.bypass_cause:
            return True
        return await self._gate.wait(state.seq, state.copy is not None)

    def stop(self) -> None:
        """Releases the writes that wait: they are never answered, and the end must not wait for them."""
        self._stopping = True
        self._waiting_for_room.unpark_all()
        self._gate.stop()

    async def run(self) -> None:
        """Prepares spares, writes checkpoints, releases segments, and ends a bypass when there is room."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._repeat, self._prepare_spares, self._spare_taken.park)  # a checkpoint may be long
            nursery.start_soon(self._repeat, self._keep, None)

    async def _repeat(
        self, step: Callable[[], Awaitable[None]], woken: Callable[[], Awaitable[object]] | None
    ) -> None:
        while True:
            try:
                await step()
            except (OSError, PitfsError) as error:
                if isinstance(error, OSError):
                    error = storage_error(error, self._splitter.journal.directory, "keeping the journal")
                log.error("%s", error)
                await trio.sleep(RETRY_S)
            with trio.move_on_after(KEEP_INTERVAL_S):
                await (woken or trio.sleep_forever)()

    async def _prepare_spares(self) -> None:
        splitter = self._splitter
        try:
            while splitter.journal.needs_spare and not splitter.state.bypass_cause:
                await trio.to_thread.run_sync(splitter.journal.prepare_spare)
        except CapacityError:  # a write that needs one says it
            await trio.sleep(KEEP_INTERVAL_S)

    def _check_clock(self) -> None:
        behind_ns = self._splitter.clock_behind_ns
        if behind_ns > CLOCK_BEHIND_NS and not self._clock_warned:
            log.warning(
                "the clock is %.0f s behind the time of the last write (was it set back?): until it has caught up, "
                "each write gets a time 1 ns after the one before",
                behind_ns / 1e9,
            )
        self._clock_warned = behind_ns > CLOCK_BEHIND_NS

    async def _keep(self) -> None:
        self._check_clock()
        splitter, journal = self._splitter, self._splitter.journal
        if not splitter.checkpoints.is_settled:
            await trio.to_thread.run_sync(splitter.checkpoints.settle)
        segment, lsn = journal.tail.segment, journal.lsn
        since = trio.current_time() - self._checkpoint_at
        # Segments are only released behind a checkpoint: where the journal fills, room is urgent.
        filling = journal.used_bytes > journal.capacity_bytes // 2
        rolled = segment != self._checkpoint_segment and (since > ROLLED_CHECKPOINT_S or filling)
        due = since > CHECKPOINT_INTERVAL_S and lsn != self._checkpoint_lsn
        if (rolled or due) and not splitter.state.bypass_cause:
            await trio.to_thread.run_sync(splitter.checkpoints.write, splitter.snapshot_progress())
            self._checkpoint_segment, self._checkpoint_lsn = segment, lsn
            self._checkpoint_at = trio.current_time()
        await trio.to_thread.run_sync(splitter.give_back, splitter.releasable_segment)
        if journal.used_bytes < journal.capacity_bytes:
            self._waiting_for_room.unpark_all()
        if splitter.state.bypass_cause:
            await self.resume_journal()

    async def resume_journal(self) -> bool:
        """Ends the bypass: journals writes again, and begins a copy. False where there is no room for it yet."""
        splitter, journal = self._splitter, self._splitter.journal
        cause = splitter.state.bypass_cause
        if journal.used_bytes > journal.capacity_bytes // 2:
            return False
        # A new segment: the rest of the current one would be full again at once. Nobody appends during a bypass.
        try:
            await trio.to_thread.run_sync(journal.begin_new_segment)
        except CapacityError:
            return False
        changes = splitter.state.change_bitmap  # not before: writes that came meanwhile may have made it too large
        try:
            splitter.start_copy(cause, changes)
            await trio.to_thread.run_sync(splitter.checkpoints.settle)
        except (PitfsError, OSError) as error:
            splitter.resume_failed(cause)
            log.warning("%s: journalling can't begin again yet: %s", cause, error)
            return False
        what = "full sync"
        if changes is not None:
            what = f"full sync of the {marked_bytes(changes.bitmaps, splitter.volumes)} bytes that changed"
        log.info("journalling again; a %s follows", what)
        return True

    async def _rescan(self, cause: str) -> None:
        splitter = self._splitter
        with suppress(CapacityError):  # there may still be room in the current segment
            if not splitter.journal.has_spare:
                await trio.to_thread.run_sync(splitter.journal.prepare_spare)
        if splitter.state.bypass_cause:
            raise CapacityError(f"{splitter.state.bypass_cause}: a copy begins once that is mended")
        splitter.start_copy(cause)
        await trio.to_thread.run_sync(splitter.checkpoints.settle)

    async def _mark(self, bookmark: str | None) -> None:
        while True:
            try:
                return self._splitter.mark(bookmark)
            except NotReadyError as wait:
                await self.make_ready(wait)

    async def handle(self, request: SplitterRequest) -> SplitterStatus | Backing:
        """Answers one control request. Raises PitfsError."""
        splitter = self._splitter
        try:
            match request:
                case messages.ReadBacking(index):
                    return self._backing(index)
                case messages.SetMark(bookmark):
                    await self._mark(bookmark)
                case messages.Copied(progress):
                    splitter.copied(progress)
                case messages.Release(segment, wanted):
                    splitter.release(segment, wanted)
                case messages.Rescan(cause):
                    await self._rescan(cause)
                case messages.Replicated(seq, in_step, cause):
                    self._gate.replicated(seq, in_step, cause)
                case messages.WaitForWrites(lsn):
                    await self._wait_for_writes(lsn)
        except OSError as error:
            what = f"request {type(request).__name__}"
            raise storage_error(error, splitter.journal.directory, what) from error
        return self._status()

    async def _wait_for_writes(self, lsn: int) -> None:
        with trio.move_on_after(WAIT_FOR_WRITES_S):
            while self._splitter.journal.lsn <= lsn:
                await self._waiting_for_writes.park()

    def _backing(self, index: int) -> Backing:
        if not 0 <= index < len(self._splitter.volumes):
            raise PitfsError(f"the group has no volume {index}")
        volume = self._splitter.volumes[index]
        where = volume.path, os.getpid(), volume.fd
        return Backing(volume.name, volume.block_size, *where, file_identity(volume.fd))

    def _status(self) -> SplitterStatus:
        state, journal, volumes = self._splitter.state, self._splitter.journal, self._splitter.volumes
        changes = state.change_bitmap if state.bypass_cause else None
        copy = None
        if state.copy is not None:
            copying = [volume.copying for volume in volumes if volume.copying is not None]
            changed_bytes = marked_bytes(copying, volumes) if copying else None
            copy = messages.RunningCopy(state.copy.mark, state.copy_location, changed_bytes)
        return SplitterStatus(
            tail=journal.tail,
            lsn=journal.lsn,
            seq=state.seq,
            position_time_ns=state.position_time_ns,
            mark=state.mark,
            now_ns=self._splitter.now_ns(),
            used_bytes=journal.used_bytes,
            capacity_bytes=journal.capacity_bytes,
            bypass_cause=state.bypass_cause,
            changed_bytes=None if changes is None else marked_bytes(changes.bitmaps, volumes),
            waiting_count=len(self._waiting_for_room) + self._gate.waiting_count,
            copy=copy,
            sync=self._gate.text,
            given_up_seq=state.given_up_seq,
        )
