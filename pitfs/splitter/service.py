"""The splitter's process beside its mount: the control socket, the spare segment, checkpoints, releasing."""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from pitfs.errors import CapacityError, PitfsError
from pitfs.splitter.change_bitmap import marked_bytes
from pitfs.splitter.messages import (
    Copied,
    ReadStatus,
    Release,
    Replicated,
    Rescan,
    RunningCopy,
    SetMark,
    SplitterRequest,
    SplitterStatus,
    WaitForWrites,
)
from pitfs.splitter.splitter import Splitter
from pitfs.splitter.sync_gate import SyncGate
from pitfs.storage.files import storage_error

log = logging.getLogger(__name__)

KEEP_INTERVAL_S: Final = 0.25  # how soon a rolled segment is followed by a new spare
CHECKPOINT_INTERVAL_S: Final = 30.0  # bounds what a crash leaves to redo where little is written
ROLLED_CHECKPOINT_S: Final = 5.0  # the same where much is: each one writes all that is dirty
RETRY_S: Final = 5.0  # after an error
CLOCK_BEHIND_NS: Final = 10**9  # more than what adjusts a running clock
FOLLOW_S: Final = 0.25  # who follows has something to tell the replica that often even if nothing is written


class SplitterService:
    """Keeps a splitter going. `run` until cancelled; `handle` answers control requests.

    Args:
        agreement: of mode sync.
    """

    def __init__(self, splitter: Splitter, agreement: SyncGate) -> None:
        self._splitter = splitter
        self._agreement = agreement
        self._followers = trio.lowlevel.ParkingLot()
        self._room = trio.Event()
        self._stopping = False
        self._waiting = 0  # writes that wait for room
        self._clock_said = False  # that it is behind
        self._checkpoint_at, self._checkpoint_segment, self._checkpoint_lsn = -math.inf, 0, -1  # the last one

    async def wait_for_room(self) -> bool:
        """Returns when room may have come into the journal; False: there will be none, the splitter stops."""
        if not self._stopping:
            self._waiting += 1
            try:
                await self._room.wait()
            finally:
                self._waiting -= 1
        return not self._stopping

    async def written(self) -> bool:
        """A write was journalled; True when it may be answered, False: it can't be any more."""
        if self._followers:
            self._followers.unpark_all()
        state = self._splitter.state
        if not self._agreement.holds or state.bypass_cause:
            return True
        return await self._agreement.wait(state.seq, state.copy is not None)

    def stop(self) -> None:
        """Lets go of writes that wait: they weren't answered, and the end mustn't wait for them."""
        self._stopping = True
        self._room.set()
        self._agreement.stop()

    async def run(self) -> None:
        """Prepares spares, writes checkpoints, releases segments, leaves passing when there is room."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._repeat, self._prepare_spare)  # a checkpoint may take long: not behind it
            nursery.start_soon(self._repeat, self._keep)

    async def _repeat(self, step: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await step()
            except (OSError, PitfsError) as error:
                directory = self._splitter.journal.directory
                log.error(
                    "%s",
                    storage_error(error, directory, "keeping the journal")
                    if isinstance(error, OSError)
                    else error,
                )
                await trio.sleep(RETRY_S)
            await trio.sleep(KEEP_INTERVAL_S)

    async def _prepare_spare(self) -> None:
        splitter = self._splitter
        if splitter.journal.needs_spare and not splitter.state.bypass_cause:
            await trio.to_thread.run_sync(splitter.journal.prepare_spare)

    def _look_at_clock(self) -> None:
        behind_ns = self._splitter.clock_behind_ns
        if behind_ns > CLOCK_BEHIND_NS and not self._clock_said:
            log.warning(
                "the clock stands %.0f s behind the time of the last write (was it set back?): until it has caught up, "
                "times of writes only count on by 1 ns each",
                behind_ns / 1e9,
            )
        self._clock_said = behind_ns > CLOCK_BEHIND_NS

    async def _keep(self) -> None:
        self._look_at_clock()
        splitter = self._splitter
        segment, lsn = splitter.journal.tail.segment, splitter.journal.lsn
        since = trio.current_time() - self._checkpoint_at
        rolled = segment != self._checkpoint_segment and (since > ROLLED_CHECKPOINT_S or self._is_filling)
        due = since > CHECKPOINT_INTERVAL_S and lsn != self._checkpoint_lsn
        if (rolled or due) and not splitter.state.bypass_cause:
            progress = splitter.snapshot_progress()
            await trio.to_thread.run_sync(splitter.checkpoint, progress)
            self._checkpoint_segment, self._checkpoint_lsn = segment, lsn
            self._checkpoint_at = trio.current_time()
        await self._release()
        if splitter.state.bypass_cause:
            # With room for a segment only: what is left of this one would be full again at once.
            roomy = await trio.to_thread.run_sync(splitter.journal.prepare_spare)
            if roomy:
                splitter.resume_journal()

    @property
    def _is_filling(self) -> bool:
        """Whether room is more urgent than sparing the disk: segments are only released behind a checkpoint."""
        return self._splitter.journal.used_bytes > self._splitter.journal.capacity_bytes // 2

    async def _release(self) -> None:
        await trio.to_thread.run_sync(self._splitter.journal.release, self._splitter.releasable_segment)
        if self._splitter.journal.used_bytes < self._splitter.journal.capacity_bytes:
            self._room.set()
            self._room = trio.Event()

    async def handle(self, request: SplitterRequest) -> SplitterStatus:
        """Answers one control request. Raises PitfsError."""
        splitter = self._splitter
        try:
            match request:
                case ReadStatus():
                    pass
                case SetMark(bookmark):
                    splitter.mark(bookmark)
                case Copied(progress):
                    splitter.copied(progress)
                case Release(segment, wanted):
                    splitter.release(segment, wanted)
                case Rescan(cause):
                    if splitter.state.bypass_cause:
                        raise CapacityError(f"{splitter.state.bypass_cause}: a copy begins once that is mended")
                    splitter.start_copy(cause)
                case Replicated(seq, in_step, cause):
                    self._agreement.replicated(seq, in_step, cause)
                case WaitForWrites(lsn):
                    await self._wait_for_writes(lsn)
        except OSError as error:
            what = f"request {type(request).__name__}"
            raise storage_error(error, splitter.journal.directory, what) from error
        return self._status()

    async def _wait_for_writes(self, lsn: int) -> None:
        with trio.move_on_after(FOLLOW_S):
            while self._splitter.journal.lsn <= lsn:
                await self._followers.park()

    def _status(self) -> SplitterStatus:
        state, journal, volumes = self._splitter.state, self._splitter.journal, self._splitter.volumes
        changes = state.change_bitmap if state.bypass_cause else None
        copy = None
        if state.copy is not None:
            copying = [volume.copying for volume in volumes if volume.copying is not None]
            changed_bytes = marked_bytes(copying, volumes) if copying else None
            copy = RunningCopy(state.copy.mark, state.copy_location, changed_bytes)
        now_ns = self._splitter.now_ns()  # first: it may move the state's time on
        return SplitterStatus(
            tail=journal.tail,
            lsn=journal.lsn,
            seq=state.seq,
            position_time_ns=state.position_time_ns,
            time_ns=state.time_ns,
            mark=state.mark,
            now_ns=now_ns,
            used_bytes=journal.used_bytes,
            capacity_bytes=journal.capacity_bytes,
            bypass_cause=state.bypass_cause,
            changed_bytes=None if changes is None else marked_bytes(changes.bitmaps, volumes),
            waiting_count=self._waiting + self._agreement.waiting_count,
            copy=copy,
            sync=self._agreement.text,
        )
