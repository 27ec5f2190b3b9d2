"""The splitter: journals each write of the group's volumes, then does it on the backing. No FUSE, no event loop here.

No await between: a write takes its seq, is appended to the journal and goes to the backing volume in one method that
awaits nothing, in the one thread of the event loop. So no other write comes between these steps: the order in the
journal is the order on the backing volumes, and a MARK or COPY_START is exactly between two writes. All methods but
`sync` run in that thread, and wait for no disk: where a write can't go on before a disk has done something, it raises
NotReadyError, with what a thread has to do for it. Nothing of the write has happened then: it has no number yet, so
others may go first, and it is tried again.

Copy before write: while a copy runs, `preserve` journals what a write is going to overwrite (copy_before_write.py).

Bypass: where the journal can't take a write, writes go to the backing volumes alone, and the change bitmap has their
blocks. A crash must not redo older journalled writes over them: so before the first of them is done, a checkpoint
says durably that writes bypass the journal (checkpoints.py). A copy of the marked blocks ends the bypass.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import NoReturn

from pyroaring import BitMap64

from pitfs.errors import CapacityError, PitfsError
from pitfs.journal.search import last_seq_before
from pitfs.journal.writer import Journal
from pitfs.model.record import CopyProgress, Mark, RecordKind, packed_checksums
from pitfs.model.schedule import MAX_INTERVAL_PART, MAX_INTERVAL_ROWS
from pitfs.splitter.change_bitmap import ChangeBitmap, bitmap_limit_bytes, save_bitmap
from pitfs.splitter.checkpoints import Checkpoints
from pitfs.splitter.copy_before_write import begin_copy, note_copied, preserve
from pitfs.splitter.state import BackingState, Progress, ProgressFile, SplitterState
from pitfs.splitter.volume import Volume
from pitfs.storage.files import write_all

log = logging.getLogger(__name__)


class NotReadyError(Exception):
    """Not now: `make_ready` has to be called in a thread first; it may raise OSError. Nothing has happened."""

    def __init__(self, make_ready: Callable[[], None]) -> None:
        super().__init__(make_ready)
        self.make_ready = make_ready


class Splitter:
    """Splits the writes of a group.

    Args:
        volumes: in the group's order.
        journal: the local journal, at its tail.
        state: as recovered.
        progress: where checkpoints go; generation: of the last one.
        clock_ns: UTC nanoseconds.
        boot_id: of this boot.
        block_when_full: on_full = "block": writes of a full journal raise CapacityError instead of bypassing it.
    """

    def __init__(
        self, volumes: list[Volume], journal: Journal, state: SplitterState, progress: ProgressFile, generation: int,
        clock_ns: Callable[[], int], boot_id: str, block_when_full: bool,
    ) -> None:  # fmt: skip
        self.volumes, self.journal, self.state = volumes, journal, state
        self.checkpoints = Checkpoints(volumes, journal, progress)
        self._progress, self._generation = progress, generation
        self._clock_ns, self._boot_id = clock_ns, boot_id
        self._block_when_full = block_when_full
        # In time to be shipped, and its room given back, while the next interval fills the rest.
        self._max_interval_bytes = journal.capacity_bytes // MAX_INTERVAL_PART
        self._released_segment = self._wanted_segment = 0
        self._full_at_seq = -1  # the last write when the journal was found full
        self._no_room: tuple[int, PitfsError | OSError] | None = None  # the lsn when it was looked for, what was met

    # -- the path of a write ---------------------------------------------------------------------------

    def write(self, index: int, offset: int, data: bytes, may_read: bool = True) -> None:
        """Journals `data` (bytes) at byte `offset` of volume `index` and writes the backing volume.

        Args:
            may_read: whether content that must be read first may come from the disk.

        Raises:
            NotCachedError: it must come from the disk, and `may_read` is false; try again.
            NotReadyError: a disk must do something first; try again.
            CapacityError: the journal is full and on_full is "block"; nothing happened.
            OSError: the backing volume refuses.
        """
        volume = self.volumes[index]
        state = self.state
        if not self.checkpoints.is_settled:
            raise NotReadyError(self.checkpoints.settle)
        if state.bypass_cause:
            self._note_change(index, offset, len(data))
            self._write_backing(index, offset, data)
            return
        block_size = volume.block_size
        first = offset // block_size
        contents = data
        if offset % block_size or len(data) % block_size:
            contents = self._fill(volume, offset, data, may_read)
        count, journalled_bytes = len(contents) // block_size, self.journal.appended_bytes
        covered = packed_checksums(contents, block_size)
        now = self._clock_ns()
        if now <= state.time_ns:
            now = state.time_ns + 1
        try:
            if state.copy is not None:
                preserve(self.journal, state, index, volume, first, count, may_read)
            self.journal.append(RecordKind.WRITE, index, first, count, state.seq + 1, now, covered, contents)
        except (PitfsError, OSError) as error:
            self._not_journalled(error)
        state.seq += 1
        state.time_ns = state.position_time_ns = now
        state.interval_blocks += count
        state.interval_bytes += self.journal.appended_bytes - journalled_bytes
        if state.change_bitmap is not None:
            self._note_change(index, offset, len(data))
        self._write_backing(index, offset, data)
        if state.interval_blocks > MAX_INTERVAL_ROWS or state.interval_bytes > self._max_interval_bytes:
            self._try_mark()

    def _not_journalled(self, error: PitfsError | OSError) -> NoReturn:
        """A write can't be journalled: room is looked for first. If there is none, it waits, or writes bypass."""
        if isinstance(error, CapacityError):
            error = self._raise_unless_full(error)
            if self._block_when_full and isinstance(error, CapacityError):
                if self._full_at_seq != self.state.seq:  # once: the open interval must be shipped to give room
                    self._full_at_seq = self.state.seq
                    self._try_mark()
                raise error
        self._begin_bypass(f"the local journal can't be written: {error}")
        raise NotReadyError(self.checkpoints.settle)

    def read(self, index: int, offset: int, size: int, may_read: bool = True) -> bytes:
        """Reads the volume from the backing, which has every write that was answered.

        Raises:
            NotCachedError: it must come from the disk, and `may_read` is false.
            OSError: the backing volume refuses.
        """
        return self.volumes[index].read(offset, size, may_read)

    def _write_backing(self, index: int, offset: int, data: bytes) -> None:
        volume = self.volumes[index]
        try:
            if os.pwrite(volume.fd, data, offset) != len(data):
                # A short write means a full disk or a failing one: writing on says which.
                write_all(volume.fd, data, offset)
        except OSError as error:
            # The journal has the write, and the volume may have part of it: these blocks must be read again.
            if not self.state.bypass_cause:
                self._begin_bypass(f"{volume.path}: a write failed: {os.strerror(error.errno or 0)}")
            self._note_change(index, offset, len(data))
            raise

    def _note_change(self, index: int, offset: int, size: int) -> None:
        """Marks the blocks that a write is going to touch."""
        changes, block_size = self.state.change_bitmap, self.volumes[index].block_size
        if changes is None:
            return
        first = offset // block_size
        if not changes.mark(index, first, -(-(offset + size) // block_size) - first):
            log.warning("the change bitmap takes too much memory and is dropped: a full sync follows")
            self.state.change_bitmap = None

    def _fill(self, volume: Volume, offset: int, data: bytes, may_read: bool) -> bytes:
        """An unaligned write as whole blocks: edges have the current content, and zeros behind the volume's end."""
        block_size = volume.block_size
        head = offset % block_size
        end = offset + len(data)
        tail = -end % block_size
        before = volume.read(offset - head, head, may_read) if head else b""
        after = volume.read(end, tail, may_read).ljust(tail, b"\0") if tail else b""
        return b"".join((before, data, after))

    def _try_mark(self) -> None:
        """Closes the open interval, so that it can be shipped and give room."""
        try:
            self.mark()
        except NotReadyError:
            pass  # no segment is ready: the next write tries again
        except (PitfsError, OSError) as error:
            log.warning("the open interval can't be closed: %s", error)

    # -- bypass ------------------------------------------------------------------------------------------

    def _begin_bypass(self, cause: str) -> None:
        """From here on writes bypass the journal, once that is durable."""
        log.error("%s: writes go on, but no instant after this can be given until it is mended", cause)
        state = self.state
        self._try_mark()
        if state.copy is None:
            base = state.seq, state.position_time_ns
            limit_bytes = bitmap_limit_bytes(self.journal.capacity_bytes)
            state.change_bitmap = ChangeBitmap(base, [BitMap64() for _ in self.volumes], limit_bytes)
        # Else a copy is given up. One of changes has a bitmap of all that it copies and of all written since; a
        # complete one has none, and a complete one follows.
        state.bypass_cause, state.copy = cause, None
        self.checkpoints.require(self.snapshot_progress())

    def resume_failed(self, cause: str) -> None:
        """A bypass of that cause couldn't end: it goes on, once a checkpoint has it again.

        The journal may have a copy, or a checkpoint may say that it has.
        """
        state = self.state
        state.copy, state.bypass_cause = None, state.bypass_cause or cause
        self.checkpoints.require(self.snapshot_progress())

    def start_copy(self, cause: str, changes: ChangeBitmap | None = None) -> None:
        """Begins a copy: of these changes, or a complete one. Its cause is that of the gap before it, if there is one.

        That ends a bypass. Writes wait until a checkpoint has it (`Checkpoints.settle`).

        Raises:
            PitfsError, OSError: the journal can't be written.
        """
        begin_copy(self.journal, self.state, self.volumes, self._clock_ns(), cause, changes)
        self.state.bypass_cause = ""
        self.checkpoints.require(self.snapshot_progress())

    # -- marks and the copy ------------------------------------------------------------------------------

    def mark(self, bookmark: str | None = None) -> None:
        """Closes the interval at the last write.

        Raises:
            CapacityError: writes bypass the journal, so there is no position to name; retryable.
            NotReadyError: as in `write`.
        """
        state = self.state
        if state.bypass_cause:
            raise CapacityError(f"{state.bypass_cause}: no snapshot can be taken until that is mended")
        time_ns = max(self._clock_ns(), state.time_ns + 1)
        message = Mark(state.mark + 1, state.position_time_ns, bookmark)
        try:
            self.journal.append_message(message, state.seq, time_ns)
        except CapacityError as error:
            raise self._raise_unless_full(error) from error
        state.begin_interval(message.mark)
        state.time_ns = time_ns

    def copied(self, progress: CopyProgress) -> None:
        """The replica durably has the running copy up to there: blocks before it need not be preserved any more."""
        state = self.state
        if state.copy is None or progress.mark != state.copy.mark:
            return
        try:
            self.journal.append_message(progress, state.seq, state.time_ns)
        except CapacityError:
            # Only the last record may be missing: the replica's mark says the same. The records before it are how
            # the shipper notices that the replica lost a part.
            if progress.volume < len(self.volumes):
                return
        note_copied(state, self.volumes, progress)

    def now_ns(self) -> int:
        """A time that no later record is before: the clock's, or the last record's if the clock is behind it.

        During a bypass it stays the same: the journal has all writes up to this time.
        """
        if not self.state.bypass_cause:
            self.state.time_ns = max(self.state.time_ns, self._clock_ns())
        return self.state.time_ns

    @property
    def clock_behind_ns(self) -> int:
        """How far the clock is behind the last record's time, where it was set back."""
        return max(0, self.state.time_ns - self._clock_ns())

    # -- checkpoints -------------------------------------------------------------------------------------

    def sync(self) -> None:
        """Makes all earlier writes durable, as fsync promises. Blocks, in any thread. Raises OSError."""
        bypass = self.state.bypass_cause
        self.checkpoints.settle()  # else a crash could still redo older writes, or not redo these
        if bypass:
            self.checkpoints.sync_backings()
        else:
            self.journal.sync()

    def sync_failed(self, error: OSError) -> None:
        """After an fsync that failed, nothing of the journal that wasn't durable yet is believed: writes bypass it."""
        if not self.state.bypass_cause:
            self._begin_bypass(f"{self.journal.directory}: fsync failed: {os.strerror(error.errno or 0)}")

    def snapshot_progress(self, clean: bool = False, change_bitmap_checksum: int = 0) -> Progress:
        """The checkpoint of now, for `Checkpoints.write`. Takes no longer for more writes."""
        state, journal = self.state, self.journal
        self._generation += 1
        return Progress(
            generation=self._generation,
            clean=clean,
            boot_id=self._boot_id,
            bypass_cause=state.bypass_cause,
            checkpoint_segment=journal.tail.segment,
            checkpoint_lsn=journal.lsn,
            seq=state.seq,
            position_time_ns=state.position_time_ns,
            time_ns=state.time_ns,
            mark=state.mark,
            interval_blocks=state.interval_blocks,
            interval_bytes=state.interval_bytes,
            given_up_seq=state.given_up_seq,
            copy_segment=state.copy_location.segment if state.copy else 0,
            backings=tuple(BackingState(v.size_bytes, v.mtime_ns) for v in self.volumes),
            change_bitmap_checksum=change_bitmap_checksum,
        )

    # -- room in the journal -----------------------------------------------------------------------------

    def release(self, first_needed_segment: int, first_wanted_segment: int | None = None) -> None:
        """The shipper needs segments from that one on. Earlier ones are given back once a redo doesn't need them.

        Args:
            first_wanted_segment: those from this one on are kept as long as there is room.
        """
        self._released_segment = max(self._released_segment, first_needed_segment)
        wanted = first_needed_segment if first_wanted_segment is None else first_wanted_segment
        self._wanted_segment = min(wanted, self._released_segment)

    @property
    def releasable_segment(self) -> int:
        """Segments before this one are given back: none is needed, and none is wanted unless room is short."""
        needed = self._needed_segment
        return self.journal.room_needed_before(min(self._wanted_segment, needed), needed)

    @property
    def _needed_segment(self) -> int:
        """Segments before this one are needed for nothing."""
        return min(self._shipping_segment, self.checkpoints.recovery_segment)

    @property
    def _shipping_segment(self) -> int:
        """Segments before this one aren't needed for shipping, nor for the running copy."""
        state, released = self.state, self._released_segment
        return released if state.copy is None else min(released, state.copy_location.segment)

    def give_back(self, first_needed_segment: int) -> None:
        """Gives back segments before that one, and notes which writes were wanted for backfill. Blocks, in any thread.

        Raises OSError; PitfsError where this process lacks memory, descriptors or rights.
        """
        journal, state, tail = self.journal, self.state, self.journal.tail
        kept = min(first_needed_segment, tail.segment)
        if max(journal.first_segment, self._wanted_segment) < kept:  # noted first: who misses them asks why
            state.given_up_seq = max(state.given_up_seq, last_seq_before(journal.directory, kept, tail))
        journal.release(first_needed_segment)

    def _raise_unless_full(self, error: CapacityError) -> PitfsError | OSError:
        """Why there is no room, if it was looked for since the last record. Raises NotReadyError else."""
        lsn, no_room = self.journal.lsn, self._no_room
        if no_room is not None and no_room[0] == lsn:
            self._no_room = None
            return no_room[1]
        needed, shipping = self._needed_segment, self._shipping_segment
        # A bypass would take a checkpoint as well.
        progress = self.snapshot_progress() if self.checkpoints.recovery_segment < shipping else None
        raise NotReadyError(partial(self._find_room, lsn, needed, shipping, progress)) from error

    def _find_room(self, lsn: int, needed: int, shipping: int, progress: Progress | None) -> None:
        """Makes the next segment, else gives back what is only wanted, else what only a redo needs. Blocks."""
        journal = self.journal
        try:
            if not journal.has_spare:
                self._prepare_or_give_back(needed)
            if not journal.has_spare and progress is not None:
                self.checkpoints.write(progress)
                self._prepare_or_give_back(min(shipping, self.checkpoints.recovery_segment))
            if not journal.has_spare:
                journal.prepare_spare()
        except (PitfsError, OSError) as error:
            self._no_room = lsn, error

    def _prepare_or_give_back(self, needed: int) -> None:
        """Makes a segment ready; gives back those before segment `needed` where there is no other room."""
        journal, before = self.journal, self.journal.used_bytes
        with suppress(CapacityError):
            journal.prepare_spare()
            return
        self.give_back(needed)
        given_back = before - journal.used_bytes
        if given_back and self._wanted_segment < needed:
            log.info("%s: full: %d bytes given up that were kept for backfill", journal.directory, given_back)

    def close(self) -> None:
        """Makes everything durable, with a checkpoint that is marked clean, and closes the files. Raises OSError."""
        for volume in self.volumes:
            os.fsync(volume.fd)  # the modification times as well, which the checkpoint has
        self.checkpoints.write(self.snapshot_progress(clean=True, change_bitmap_checksum=self._save_bitmap()))
        self.journal.close()
        self._progress.close()
        for volume in self.volumes:
            volume.close()

    def _save_bitmap(self) -> int:
        """Saves the change bitmap of a bypass for the next start. Returns its checksum, 0 where nothing is saved."""
        if not self.state.bypass_cause or self.state.change_bitmap is None:
            return 0
        try:
            return save_bitmap(os.path.dirname(self._progress.path), self.state.change_bitmap)
        except OSError as error:
            log.warning("the change bitmap can't be saved: %s; a full sync follows", error.strerror)
            return 0
