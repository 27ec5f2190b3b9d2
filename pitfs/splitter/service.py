"""The splitter's process beside its mount: the control socket, the spare segment, checkpoints, releasing."""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from pitfs.errors import CapacityError, PitfsError
from pitfs.splitter import messages
from pitfs.splitter.change_bitmap import marked_bytes
from pitfs.splitter.messages import SplitterRequest, SplitterStatus
from pitfs.splitter.splitter import Splitter
from pitfs.splitter.sync_gate import SyncGate
from pitfs.storage.files import storage_error

log = logging.getLogger(__name__)

KEEP_INTERVAL_S: Final = 0.25  # how soon a new spare follows a rolled segment
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
        self._stopping = False
        self._clock_warned = False
        self._checkpoint_at, self._checkpoint_segment, self._checkpoint_lsn = -math.inf, 0, -1  # the last one

    async def wait_for_room(self) -> bool:
        """Returns when the journal may have room; False: it will have none, the splitter stops."""
        if not self._stopping:
            await self._waiting_for_room.park()
        return not self._stopping

    async def written(self) -> bool:
        """A write was journalled. Returns when it may be answered; False: it must not be, the splitter stops."""
        if self._waiting_for_writes:
            self._waiting_for_writes.unpark_all()
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
            nursery.start_soon(self._repeat, self._prepare_spare)  # apart: a checkpoint may take long
            nursery.start_soon(self._repeat, self._keep)

    async def _repeat(self, step: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await step()
            except (OSError, PitfsError) as error:
                if isinstance(error, OSError):
                    error = storage_error(error, self._splitter.journal.directory, "keeping the journal")
                log.error("%s", error)
                await trio.sleep(RETRY_S)
            await trio.sleep(KEEP_INTERVAL_S)

    async def _prepare_spare(self) -> None:
        splitter = self._splitter
        if splitter.journal.needs_spare and not splitter.state.bypass_cause:
            await trio.to_thread.run_sync(splitter.journal.prepare_spare)

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
        segment, lsn = journal.tail.segment, journal.lsn
        since = trio.current_time() - self._checkpoint_at
        # Segments are only released behind a checkpoint: where the journal fills, room is urgent.
        filling = journal.used_bytes > journal.capacity_bytes // 2
        rolled = segment != self._checkpoint_segment and (since > ROLLED_CHECKPOINT_S or filling)
        due = since > CHECKPOINT_INTERVAL_S and lsn != self._checkpoint_lsn
        if (rolled or due) and not splitter.state.bypass_cause:
            await trio.to_thread.run_sync(splitter.checkpoint, splitter.snapshot_progress())
            self._checkpoint_segment, self._checkpoint_lsn = segment, lsn
            self._checkpoint_at = trio.current_time()
        await trio.to_thread.run_sync(splitter.give_back, splitter.releasable_segment)
        if journal.used_bytes < journal.capacity_bytes:
            self._waiting_for_room.unpark_all()
        if splitter.state.bypass_cause:
            # Only with room for a segment: the rest of the current one would be full again at once.
            has_room = await trio.to_thread.run_sync(journal.prepare_spare)
            if has_room:
                splitter.resume_journal()

    async def handle(self, request: SplitterRequest) -> SplitterStatus:
        """Answers one control request. Raises PitfsError."""
        splitter = self._splitter
        try:
            match request:
                case messages.SetMark(bookmark):
                    splitter.mark(bookmark)
                case messages.Copied(progress):
                    splitter.copied(progress)
                case messages.Release(segment, wanted):
                    splitter.release(segment, wanted)
                case messages.Rescan(cause):
                    if splitter.state.bypass_cause:
                        raise CapacityError(f"{splitter.state.bypass_cause}: a copy begins once that is mended")
                    splitter.start_copy(cause)
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
