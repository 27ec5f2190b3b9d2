"""The splitter: journals each write of the group's volumes and passes it on. No FUSE, no event loop here.

What must hold: between taking a seq and the backing volume's pwrite there is no await, so the order of the
journal is the order of the writes, and a COPY_START or MARK stands exactly between two of them. All methods
but `checkpoint` and those of the journal that say so run in one thread.
"""

from __future__ import annotations

import errno
import logging
import os
import struct
from collections.abc import Callable
from typing import Final

import msgspec
from pyroaring import BitMap64
from xxhash import xxh3_64_intdigest

from pitfs.errors import CapacityError, PitfsError
from pitfs.journal.writer import Journal
from pitfs.model.record import CopyProgress, Mark, RecordKind, block_checksums
from pitfs.splitter.change_bitmap import ChangeBitmap, changes_limit_bytes, keep_changes, size_bytes
from pitfs.splitter.copy_before_write import begin_copy, preserve
from pitfs.splitter.progress import BackingState, Progress, ProgressFile
from pitfs.splitter.state import Marked, SplitterState
from pitfs.splitter.volume import Volume, is_copied

log = logging.getLogger(__name__)

_PACK_ONE: Final = struct.Struct("<Q").pack


class Splitter:
    """Splits the writes of a group.

    Args:
        volumes: in the group's order.
        journal: the local journal, at its tail.
        standing: as recovered.
        progress: where checkpoints go.
        clock_ns: UTC nanoseconds.
        boot_id: of this boot.
        block_when_full: on_full = "block": a full journal raises CapacityError instead of passing writes.
    """

    def __init__(
        self,
        volumes: list[Volume],
        journal: Journal,
        standing: SplitterState,
        progress: ProgressFile,
        generation: int,
        clock_ns: Callable[[], int],
        boot_id: str,
        block_when_full: bool,
    ) -> None:
        self.volumes = volumes
        self.journal = journal
        self.standing = standing
        self._progress = progress
        self._generation = generation
        self._clock_ns = clock_ns
        self._boot_id = boot_id
        self._block_when_full = block_when_full
        self._released_segment = self._wanted_segment = 0
        self._full_at_seq = -1
        self._passing_durable = True
        self._backing_failed: OSError | None = None
        self.recovery_segment = 0  # where a recovery would begin to read

    # -- the path of a write ---------------------------------------------------------------------------

    def write(self, index: int, offset: int, data: bytes, may_wait: bool = True) -> None:
        """Journals `data` (bytes) at byte `offset` of volume `index` and writes the backing volume.

        Args:
            may_wait: whether content that must be read first may come from the disk.

        Raises:
            NotCachedError: it would have to, and may not; nothing happened that doesn't hold for the next try.
            CapacityError: the journal is full and on_full is "block"; nothing happened.
            OSError: the backing volume refuses.
        """
        volume = self.volumes[index]
        standing = self.standing
        if standing.bypass_cause:
            if not self._passing_durable:
                self._write_progress()  # a redo over this write would undo it
            self._note_change(index, offset, len(data))
            self._write_backing(index, offset, data)
            return
        block_size = volume.block_size
        first = offset // block_size
        contents = (
            self._fill(volume, offset, data, may_wait)
            if offset % block_size or len(data) % block_size
            else data
        )
        count = len(contents) // block_size
        if count == 1:
            covered = _PACK_ONE(xxh3_64_intdigest(contents))
        else:
            covered = struct.pack(f"<{count}Q", *block_checksums(contents, block_size))
        now = self._clock_ns()
        if now <= standing.time_ns:
            now = standing.time_ns + 1
        try:
            try:
                if standing.copy is not None:
                    preserve(self.journal, standing, index, volume, first, count, may_wait)
                self.journal.append(RecordKind.WRITE, index, first, count, standing.seq + 1, now, covered, contents)
            except CapacityError:
                if not self._make_room():
                    raise
                if standing.copy is not None:
                    preserve(self.journal, standing, index, volume, first, count, may_wait)
                self.journal.append(RecordKind.WRITE, index, first, count, standing.seq + 1, now, covered, contents)
        except (PitfsError, OSError) as error:
            if self._block_when_full and isinstance(error, CapacityError):
                self._close_full_interval()
                raise
            self._pass_writes(f"the local journal can't be written: {error}")
        else:
            standing.seq += 1
            standing.time_ns = standing.position_time_ns = now
        if standing.change_bitmap is not None:
            self._note_change(index, offset, len(data))
        self._write_backing(index, offset, data)

    def read(self, index: int, offset: int, size: int, may_wait: bool = True) -> bytes:
        """Reads the volume: the backing has every write that was answered.

        Raises:
            NotCachedError: it isn't in memory, and may not come from the disk.
            OSError: the backing volume refuses.
        """
        volume = self.volumes[index]
        return volume.read(offset, max(0, min(size, volume.size_bytes - offset)), may_wait)

    def _write_backing(self, index: int, offset: int, data: bytes) -> None:
        volume = self.volumes[index]
        try:
            done = os.pwrite(volume.backing.fd, data, offset)
            while done < len(data):
                done += os.pwrite(volume.backing.fd, data[done:], offset + done)
        except OSError as error:
            # The journal has the write and the volume may have part of it: what is in these blocks must be read again.
            try:
                if not self.standing.bypass_cause:
                    self._pass_writes(f"{volume.backing.path}: a write failed: {os.strerror(error.errno or 0)}")
            finally:
                self._note_change(index, offset, len(data))
            raise

    def _note_change(self, index: int, offset: int, size: int) -> None:
        """Marks the blocks that a write touches, before it is done."""
        changes, block_size = self.standing.change_bitmap, self.volumes[index].block_size
        if changes is None:
            return
        first = offset // block_size
        if not changes.mark(index, first, -(-(offset + size) // block_size) - first):
            log.warning("what changes can't be remembered any more: it would take too much; a complete copy follows")
            self.standing.change_bitmap = None

    def _fill(self, volume: Volume, offset: int, data: bytes, may_wait: bool) -> bytes:
        """Whole blocks around an unaligned write: edges from the current content, zeros behind the volume's end."""
        block_size = volume.block_size
        head = offset % block_size
        end = offset + len(data)
        tail = -end % block_size
        before = volume.read(offset - head, head, may_wait) if head else b""
        after = volume.read(end, tail, may_wait).ljust(tail, b"\0") if tail else b""
        return b"".join((before, data, after))

    def _close_full_interval(self) -> None:
        """Closes the open interval where the journal is full, once: room only comes when it has been shipped."""
        if self.standing.seq == self._full_at_seq:
            return
        self._full_at_seq = self.standing.seq
        try:
            self.mark()
        except (PitfsError, OSError) as error:
            log.warning("the open interval can't be closed: %s", error)

    # -- passing -----------------------------------------------------------------------------------------

    def _pass_writes(self, cause: str) -> None:
        """From here on writes pass without being journalled. Durable before the first of them is answered."""
        log.error("%s: writes go on, but no instant after this can be given until it is mended", cause)
        standing = self.standing
        try:
            self.mark()  # what is journalled can go to the replica, and give room
        except (PitfsError, OSError) as error:
            log.warning("the open interval can't be closed: %s", error)
        if standing.copy is None:
            base = standing.seq, standing.position_time_ns
            limit_bytes = changes_limit_bytes(self.journal.capacity_bytes)
            standing.change_bitmap = ChangeBitmap(base, [BitMap64() for _ in self.volumes], limit_bytes)
        # Else a copy is given up: what was to come with it, and after it, is marked; of a complete one nothing is.
        standing.bypass_cause = cause
        standing.copy = None
        self._passing_durable = False
        self._write_progress()

    def resume_journal(self, cause: str) -> bool:
        """Journals again after passing, with a copy to follow. False where there's no room for it yet."""
        standing, journal, passing = self.standing, self.journal, self.standing.bypass_cause
        if journal.used_bytes > journal.capacity_bytes // 2:
            return False
        changes = standing.change_bitmap
        try:
            journal.begin_anew()
            begin_copy(journal, standing, self.volumes, self._clock_ns(), cause, changes)
            journal.sync()
            standing.bypass_cause = ""
            self._write_progress()
        except (PitfsError, OSError) as error:
            # Begun in vain: writes go on passing beside it, once that is on disk again.
            standing.copy, standing.bypass_cause, self._passing_durable = None, passing, False
            log.warning("%s: journalling can't begin again yet: %s", passing, error)
            return False
        what = "complete copy"
        if changes is not None:
            what = f"copy of the {size_bytes(changes.bitmaps, self.volumes)} bytes that changed"
        log.info("journalling again; a %s follows", what)
        return True

    def start_copy(self, cause: str) -> None:
        """Begins a complete copy: the first one (cause empty), or a rescan with a gap before it.

        Raises:
            PitfsError, OSError: the journal can't be written.
        """
        begin_copy(self.journal, self.standing, self.volumes, self._clock_ns(), cause, None)
        self.journal.sync()
        self.standing.bypass_cause = ""
        self._write_progress()

    # -- marks and the copy ------------------------------------------------------------------------------

    def mark(self, bookmark: str | None = None) -> Marked:
        """Closes the interval at the last write.

        Raises:
            CapacityError: writes are passing, so there is no position to name; retryable.
        """
        standing = self.standing
        if standing.bypass_cause:
            raise CapacityError(f"{standing.bypass_cause}: no snapshot can be taken until that is mended")
        time_ns = max(self._clock_ns(), standing.time_ns + 1)
        message = Mark(standing.mark + 1, standing.position_time_ns, bookmark)
        self.journal.append_message(RecordKind.MARK, standing.seq, time_ns, msgspec.msgpack.encode(message))
        standing.mark, standing.time_ns = message.mark, time_ns
        return Marked(message.mark, standing.seq, standing.position_time_ns, time_ns, self.journal.tail)

    def copied(self, progress: CopyProgress) -> None:
        """The replica durably has the running copy up to there: blocks before it needn't be preserved any more."""
        standing = self.standing
        if standing.copy is None or progress.mark != standing.copy.mark:
            return
        try:
            body = msgspec.msgpack.encode(progress)
            self.journal.append_message(RecordKind.COPY_PROGRESS, standing.seq, standing.time_ns, body)
        except CapacityError:
            # The end may go without its record: the replica's mark says it again. What comes before may not:
            # the record is how the shipper notices that the replica lost a part.
            if progress.volume < len(self.volumes):
                return
        if is_copied(self.volumes, progress):
            standing.copy = standing.change_bitmap = None

    def now_ns(self) -> int:
        """The time that no later record's comes before; as the last record's, if the clock stands behind that.

        While writes pass it stands still: it is what all writes up to then are in the journal for.
        """
        if not self.standing.bypass_cause:
            self.standing.time_ns = max(self.standing.time_ns, self._clock_ns())
        return self.standing.time_ns

    @property
    def clock_behind_ns(self) -> int:
        """How far the clock stands behind the last record's time: it was set back."""
        return max(0, self.standing.time_ns - self._clock_ns())

    # -- checkpoints -------------------------------------------------------------------------------------

    def sync_backings(self) -> None:
        """Blocks until the backing volumes are durable. Runs in a thread. Raises OSError."""
        if self._backing_failed is not None:
            # The kernel says it once, and drops the pages: only a redo helps.
            raise self._backing_failed
        for volume in self.volumes:
            try:
                os.fdatasync(volume.backing.fd)
            except OSError as error:
                self._backing_failed = OSError(error.errno, error.strerror, volume.backing.path)
                raise self._backing_failed from error

    def sync(self) -> None:
        """What fsync promises: all earlier writes are durable. Runs in a thread or inline. Raises OSError."""
        if self.standing.bypass_cause:
            if not self._passing_durable:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            self.sync_backings()
        else:
            self.journal.sync()

    def sync_failed(self, error: OSError) -> None:
        """A failed fsync poisons what wasn't durable yet: nothing of it is believed, a rescan must follow."""
        if self.standing.bypass_cause:
            return
        try:
            self._pass_writes(f"{self.journal.directory}: fsync failed: {os.strerror(error.errno or 0)}")
        except OSError as worse:  # writes are refused until this can be recorded
            log.error("%s: passing can't be recorded: %s", self.journal.directory, worse)

    def snapshot_progress(self, clean: bool = False, changes: int = 0) -> Progress:
        """The progress as of now, to be written once the backing volumes are durable. O(volumes).

        Args:
            changes: see `Progress`.
        """
        standing, journal = self.standing, self.journal
        self._generation += 1
        return Progress(
            generation=self._generation,
            clean=clean,
            boot_id=self._boot_id,
            passing=standing.bypass_cause,
            checkpoint_segment=journal.tail.segment,
            checkpoint_lsn=journal.lsn,
            seq=standing.seq,
            position_time_ns=standing.position_time_ns,
            time_ns=standing.time_ns,
            mark=standing.mark,
            copy_segment=standing.copy_location.segment if standing.copy else 0,
            backings=tuple(BackingState(v.size_bytes, v.backing.mtime_ns) for v in self.volumes),
            changes=changes,
        )

    def _write_progress(self, clean: bool = False, changes: int = 0) -> None:
        """A checkpoint right now. Blocks: for the rare turns at which it must be done before going on."""
        self.sync_backings()
        progress = self.snapshot_progress(clean, changes)
        self._record(progress)
        self._passing_durable = True

    def checkpoint(self, progress: Progress) -> None:
        """Syncs the backing volumes, then records `progress`, taken before. Runs in a thread. Raises OSError."""
        self.sync_backings()
        if not progress.passing:
            self.journal.sync()  # a checkpoint ahead of the journal's durable end couldn't be recovered
        self._record(progress)

    def _record(self, progress: Progress) -> None:
        self._progress.write(progress)
        begins = progress.checkpoint_segment
        self.recovery_segment = min(begins, progress.copy_segment or begins)

    def release(self, first_needed_segment: int, first_wanted_segment: int | None = None) -> None:
        """The shipper needs segments from that one on; earlier ones go once redo doesn't need them either.

        Args:
            first_wanted_segment: those from there on it would like to have as long as there is room.
        """
        self._released_segment = max(self._released_segment, first_needed_segment)
        wanted = first_needed_segment if first_wanted_segment is None else first_wanted_segment
        self._wanted_segment = min(wanted, self._released_segment)

    @property
    def releasable_segment(self) -> int:
        """Segments before this one are given back: needed by nobody, or wanted only, and there is no more room."""
        needed = self._needed_segment
        return self.journal.room_needed_before(min(self._wanted_segment, needed), needed)

    @property
    def _needed_segment(self) -> int:
        return min(self._shipping_segment, self.recovery_segment)

    @property
    def _shipping_segment(self) -> int:
        """Segments before this one aren't needed for shipping, nor for the running copy."""
        copy, released = self.standing.copy, self._released_segment
        return released if copy is None else min(released, self.standing.copy_location.segment)

    def _make_room(self) -> bool:
        """Gives back at once what is only wanted, or needed for a redo alone; False where there is nothing."""
        journal, before = self.journal, self.journal.used_bytes
        journal.release(self._needed_segment)
        if journal.used_bytes == before and self.recovery_segment < self._shipping_segment:
            self.checkpoint(self.snapshot_progress())  # passing would need one as well
            journal.release(self._needed_segment)
        given_back = before - journal.used_bytes
        if given_back and self._wanted_segment < self._needed_segment:
            log.info(
                "%s: full: %d bytes given up that were kept for backfill", journal.directory, given_back
            )
        return given_back > 0

    def close(self) -> None:
        """Closes in order: everything durable, the state marked clean. Raises OSError."""
        if not self.standing.bypass_cause:
            self.journal.sync()
        for volume in self.volumes:
            os.fsync(volume.backing.fd)  # the modification times as well, which the progress has
        self._write_progress(True, self._keep_changes())
        self.journal.close()
        self._progress.close()
        for volume in self.volumes:
            volume.backing.close()

    def _keep_changes(self) -> int:
        """What changed while writes passed is kept for the next start; 0: nothing is, and a complete copy follows."""
        if not self.standing.bypass_cause or self.standing.change_bitmap is None:
            return 0
        try:
            return keep_changes(os.path.dirname(self._progress.path), self.standing.change_bitmap)
        except OSError as error:
            log.warning("what changed can't be kept: %s; a complete copy follows", error.strerror)
            return 0
