"""The splitter's state after a stop: that of the last checkpoint, and what the journal has behind it."""

from __future__ import annotations

import logging
import os

from pyroaring import BitMap64

from pitfs.errors import CorruptionError, UsageError
from pitfs.journal.reader import Durability
from pitfs.journal.recovery import replay
from pitfs.journal.writer import JournalTail, Location
from pitfs.model.record import CopyProgress, CopyStart, Mark, Record, RecordKind
from pitfs.splitter.change_bitmap import BitmapAssembler, ChangeBitmap
from pitfs.splitter.copy_before_write import note_copied
from pitfs.splitter.state import Progress, SplitterState
from pitfs.splitter.volume import Volume
from pitfs.storage.files import write_all
from pitfs.storage.segment import SegmentReader, list_segments, segment_path

log = logging.getLogger(__name__)


def recover(
    directory: str, history: bytes, volumes: list[Volume], progress: Progress | None, limit_bytes: int
) -> tuple[SplitterState, JournalTail | None]:
    """Redoes the journalled writes behind the checkpoint; the state then, and where the journal goes on.

    There is no tail for a journal that must begin a new segment: it is new, or is damaged after a bypass.

    Args:
        directory: of the journal. limit_bytes: of a change bitmap.

    Raises:
        CorruptionError: the journal is damaged.
        UsageError: segments are missing at its end.
        OSError: a disk refuses.
    """
    if progress is None:
        # The first start ended before its first checkpoint, so no write was accepted.
        for number in list_segments(directory):
            os.unlink(segment_path(directory, number))
        return SplitterState(), None
    state = SplitterState(
        progress.seq, progress.position_time_ns, progress.time_ns, progress.mark, progress.interval_blocks,
        progress.interval_bytes, given_up_seq=progress.given_up_seq,
    )  # fmt: skip
    found = _Replay(state, volumes, progress.checkpoint_lsn, limit_bytes)
    if progress.bypass_cause:
        # Nothing is redone, as the backing volumes are ahead of the journal. An attempt to end the bypass may have left
        # marks: they are taken in, so that no number is given twice.
        try:
            tail = replay(directory, progress.checkpoint_segment, found.advance, history)
        except CorruptionError as error:
            log.warning("%s; a full sync follows anyway", error)
            return state, None
        return state, tail if tail is not None and tail.next_lsn > progress.checkpoint_lsn else None
    tail = replay(directory, progress.recovery_segment, found.redo, history, progress.checkpoint_lsn)
    if tail is None or tail.next_lsn <= progress.checkpoint_lsn:
        raise UsageError(
            f"{directory}: the journal ends before its checkpoint: segments are missing; put them back, or move the "
            "state directory away to begin anew with a full sync"
        )
    found.finish_copy(directory)
    if found.redone:
        log.info("recovered: %d journalled writes redone", found.redone)
    numbers = list_segments(directory)
    Durability(directory).make(numbers[0], numbers[-1])
    return state, tail


class _Replay:
    """Brings the state, the volumes and their running copy up to each record of the journal in turn.

    The running copy may have begun before the checkpoint. Then the records before that are read for the copy alone.
    """

    def __init__(
        self, state: SplitterState, volumes: list[Volume], checkpoint_lsn: int, limit_bytes: int
    ) -> None:
        self._state, self._volumes = state, volumes
        self._checkpoint_lsn, self._limit_bytes = checkpoint_lsn, limit_bytes
        self._copy_blocks: BitmapAssembler | None = None  # of the running copy of changes
        self._copied: CopyProgress | None = None
        self.redone = 0

    def redo(self, reader: SegmentReader, offset: int, record: Record) -> None:
        """Takes in a record. Raises CorruptionError where a write's contents are bad."""
        message = record.message
        if record.kind is RecordKind.WRITE:
            if record.lsn > self._checkpoint_lsn:
                volume, contents = self._volumes[record.volume], reader.verified_contents(offset, record)
                start = record.block * volume.block_size
                write_all(volume.fd, contents[: volume.size_bytes - start], start)
                self.redone += 1
            changes = self._state.change_bitmap
            if changes is not None and not changes.mark(record.volume, record.block, record.block_count):
                self._state.change_bitmap = None
        elif record.kind is RecordKind.BEFORE_IMAGE:
            preserved = self._volumes[record.volume].preserved
            preserved.add_range(record.block, record.block + record.block_count)
        elif isinstance(message, CopyStart):
            self._begin_copy(message, Location(reader.header.number, offset))
        elif isinstance(message, CopyProgress):
            self._copied = message
        elif self._copy_blocks is not None:
            self._copy_blocks.add(record)
        self.advance(reader, offset, record)

    def advance(self, reader: SegmentReader, offset: int, record: Record) -> None:
        """Takes in a record's position, time and mark alone."""
        state, message = self._state, record.message
        if record.lsn <= self._checkpoint_lsn:
            return
        state.interval_bytes += record.size_bytes
        if isinstance(message, Mark | CopyStart):
            state.begin_interval(message.mark)
        elif record.kind is RecordKind.WRITE:
            state.interval_blocks += record.block_count
        else:
            return
        state.time_ns = max(state.time_ns, record.time_ns)
        if not isinstance(message, Mark):
            state.seq, state.position_time_ns = record.seq, record.time_ns

    def _begin_copy(self, start: CopyStart, location: Location) -> None:
        state = self._state
        state.copy, state.copy_location = start, location
        self._copy_blocks = state.change_bitmap = None
        if not start.is_complete:
            self._copy_blocks = BitmapAssembler(start)
            base = start.from_seq, start.from_time_ns
            state.change_bitmap = ChangeBitmap(base, [BitMap64() for _ in self._volumes], self._limit_bytes)
        for volume in self._volumes:
            volume.begin_copy(None)

    def finish_copy(self, directory: str) -> None:
        """Behind the last record: which blocks the running copy has, and whether it has arrived."""
        state = self._state
        if state.copy is not None and self._copy_blocks is not None:
            bitmaps = self._copy_blocks.bitmaps(directory)
            for volume, bitmap in zip(self._volumes, bitmaps, strict=True):
                volume.copying = bitmap
            if state.change_bitmap is not None and not state.change_bitmap.add(bitmaps):
                state.change_bitmap = None
        copied = self._copied
        if copied is not None and state.copy is not None and copied.mark == state.copy.mark:
            note_copied(state, self._volumes, copied)
