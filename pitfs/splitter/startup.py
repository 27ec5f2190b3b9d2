"""Starting the splitter: open the backing volumes, recover the local journal, redo, decide whether to rescan."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import msgspec
from pyroaring import BitMap64

from pitfs.errors import CorruptionError, UsageError
from pitfs.journal.recovery import replay
from pitfs.journal.writer import Journal, JournalTail, Location
from pitfs.model.record import CopyProgress, CopyStart, Mark, Record, RecordKind
from pitfs.model.transfer import VolumeInfo
from pitfs.splitter.backing import open_backing
from pitfs.splitter.change_bitmap import (
    ChangeBitmap,
    Pieces,
    changes_limit_bytes,
    forget_changes,
    kept_changes,
)
from pitfs.splitter.progress import Progress, ProgressFile, boot_id, open_group
from pitfs.splitter.splitter import Splitter
from pitfs.splitter.state import SplitterState
from pitfs.splitter.volume import Volume, is_copied
from pitfs.storage.files import FULL_ERRNOS, fsync_directory, storage_error, write_all
from pitfs.storage.segment import SegmentReader, list_segments, segment_name

log = logging.getLogger(__name__)

MTIME_MARGIN_NS: Final = 2_000_000_000  # from journalling a write to its place in the backing volume, at most


@dataclass(frozen=True, slots=True)
class VolumeSpec:
    """What the configuration says of a volume."""

    name: str
    backing: str
    block_size: int


def journal_directory(state: str) -> str:
    return os.path.join(state, "journal")


def lock_state(state: str) -> int:
    """Makes the state directory if missing and locks it; the descriptor holds the lock until it is closed.

    Raises:
        UsageError: it can't be made, or another splitter has it.
    """
    try:
        os.makedirs(journal_directory(state), mode=0o700, exist_ok=True)
        fsync_directory(state)
        fd = os.open(os.path.join(state, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno in FULL_ERRNOS:
            raise storage_error(error, state, "making the state directory") from error
        raise UsageError(f"{error.filename}: state directory: {os.strerror(error.errno or 0)}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise UsageError(
            f"{state}: another 'pitfs protect' is running with this state: stop it first"
        ) from error
    return fd


def open_splitter(
    state: str,
    group: str,
    specs: list[VolumeSpec],
    capacity_bytes: int,
    block_when_full: bool,
    clock_ns: Callable[[], int],
) -> Splitter:
    """Brings the group to where writes can be accepted: recovered, redone, and with a copy begun if one is due.

    Args:
        state: directory, locked by `lock_state`.

    Raises:
        UsageError: a backing volume or the state doesn't fit the configuration.
        CorruptionError: the journal is damaged.
        PitfsError: a disk refuses.
    """
    volumes = [Volume(spec.name, open_backing(spec.backing), spec.block_size) for spec in specs]
    infos = tuple(VolumeInfo(volume.name, volume.size_bytes, volume.block_size) for volume in volumes)
    history = bytes.fromhex(open_group(state, group, infos).history)
    directory = journal_directory(state)
    progress_file = ProgressFile(state, begins=not list_segments(directory))
    progress = progress_file.read()
    boot = boot_id()
    mtimes_ns = [volume.backing.mtime_ns for volume in volumes]  # before redo changes them
    try:
        limit_bytes = changes_limit_bytes(capacity_bytes)
        standing, tail = _recover(directory, history, volumes, progress, limit_bytes)
        journal = Journal(directory, history, capacity_bytes, tail, progress.checkpoint_lsn + 1 if progress else 1)
        generation = progress.generation if progress else 0
        splitter = Splitter(
            volumes, journal, standing, progress_file, generation, clock_ns, boot, block_when_full
        )
        cause = _copy_cause(progress, boot, volumes, mtimes_ns, standing.time_ns)
        if progress is not None and progress.passing:
            # The copy begins when there is room; production doesn't wait for it.
            standing.bypass_cause = progress.passing
            standing.copy = None  # given up, or begun and not made durable: writes pass beside it
            if progress.clean and progress.changes and cause is None:
                standing.change_bitmap = kept_changes(state, progress.changes, len(volumes), limit_bytes)
            splitter.checkpoint(splitter.snapshot_progress())
            forget_changes(state)
        elif cause is not None:
            if cause:
                log.warning("%s: a complete copy follows, instants until now stay as they are", cause)
            splitter.start_copy(cause)
        else:
            journal.sync()
            splitter.checkpoint(splitter.snapshot_progress())
    except OSError as error:
        raise storage_error(error, error.filename or directory, "starting the splitter") from error
    return splitter


def _copy_cause(
    progress: Progress | None, boot: str, volumes: list[Volume], mtimes_ns: list[int], last_time_ns: int
) -> str | None:
    """Why a complete copy must begin now: "" for the first one, None for none.

    Args:
        mtimes_ns: of the backing volumes as they were found. last_time_ns: of the last record of the journal.
    """
    if progress is None:
        return ""
    if not progress.clean:
        # Writes that reached the backing volume but neither fsync nor the journal's disk can't be told.
        if progress.boot_id != boot:
            return "power was lost on the production host"
        # What the splitter wrote, it had just journalled.
        changed = [mtime_ns > last_time_ns + MTIME_MARGIN_NS for mtime_ns in mtimes_ns]
    else:
        pairs = zip(mtimes_ns, progress.backings, strict=True)
        changed = [mtime_ns != before.mtime_ns for mtime_ns, before in pairs]
    for volume, by_others in zip(volumes, changed, strict=True):
        if by_others:
            return f"{volume.backing.path}: was changed while pitfs wasn't running"
    return None


def _recover(
    directory: str, history: bytes, volumes: list[Volume], progress: Progress | None, limit_bytes: int
) -> tuple[SplitterState, JournalTail | None]:
    """Replays the journal: redo onto the backing volumes behind the checkpoint, and the standing at its tail."""
    standing = SplitterState()
    first_segment, checkpoint_lsn = 0, 0
    if progress is None:
        # The first start never got as far as its first checkpoint: nothing was accepted yet.
        for number in list_segments(directory):
            os.unlink(os.path.join(directory, segment_name(number)))
        return standing, None
    standing.seq, standing.position_time_ns = progress.seq, progress.position_time_ns
    standing.time_ns, standing.mark = progress.time_ns, progress.mark
    checkpoint_lsn = progress.checkpoint_lsn
    first_segment = min(progress.checkpoint_segment, progress.copy_segment or progress.checkpoint_segment)
    redone = 0
    latest: CopyProgress | None = None
    pieces: Pieces | None = None  # of the running copy's bitmaps

    def visit(reader: SegmentReader, offset: int, record: Record) -> None:
        nonlocal redone, latest, pieces
        if record.kind is RecordKind.WRITE and record.lsn > checkpoint_lsn:
            _redo(volumes[record.volume], record, reader.verified_contents(offset, record))
            redone += 1
        elif record.kind is RecordKind.BEFORE_IMAGE:
            volumes[record.volume].preserved.add_range(record.block, record.block + record.block_count)
        elif record.kind is RecordKind.COPY_START:
            start = msgspec.msgpack.decode(record.covered, type=CopyStart)
            standing.copy, standing.copy_location = start, Location(reader.header.number, offset)
            pieces = None if start.is_complete else Pieces(start)
            base = start.from_seq, start.from_time_ns
            nothing = [BitMap64() for _ in volumes]
            standing.change_bitmap = None if pieces is None else ChangeBitmap(base, nothing, limit_bytes)
            for volume in volumes:
                volume.begin_copy(None)
        elif record.kind is RecordKind.COPY_BLOCKS and pieces is not None:
            pieces.take(record)
        elif record.kind is RecordKind.COPY_PROGRESS:
            latest = msgspec.msgpack.decode(record.covered, type=CopyProgress)
        changes = standing.change_bitmap
        if (
            changes is not None
            and record.kind is RecordKind.WRITE
            and not changes.mark(record.volume, record.block, record.block_count)
        ):
            standing.change_bitmap = None
        if record.lsn > checkpoint_lsn and record.kind in (RecordKind.WRITE, RecordKind.MARK, RecordKind.COPY_START):
            _advance(standing, record)

    if progress.passing:
        return standing, _tail_while_passing(directory, history, progress, standing)
    tail = replay(directory, first_segment, visit, history, checkpoint_lsn)
    if tail is None or tail.next_lsn <= checkpoint_lsn:
        raise UsageError(
            f"{directory}: the journal ends before its checkpoint: segments are missing; put them back, or move the "
            "state directory away to begin anew with a full copy"
        )
    if standing.copy is not None and pieces is not None:
        _go_on_copying(standing, volumes, pieces.bitmaps(directory))
    if latest and standing.copy and latest.mark == standing.copy.mark and is_copied(volumes, latest):
        standing.copy = standing.change_bitmap = None
    if redone:
        log.info("recovered: %d journalled writes redone", redone)
    for number in list_segments(directory):
        _sync_file(os.path.join(directory, segment_name(number)))
    return standing, tail


def _go_on_copying(standing: SplitterState, volumes: list[Volume], bitmaps: list[BitMap64]) -> None:
    """A copy of changes was running: of these blocks."""
    for volume, bitmap in zip(volumes, bitmaps, strict=True):
        volume.copying = bitmap
    if standing.change_bitmap is not None and not standing.change_bitmap.add(bitmaps):
        standing.change_bitmap = None


def _tail_while_passing(
    directory: str, history: bytes, progress: Progress, standing: SplitterState
) -> JournalTail | None:
    """The tail of a journal that wasn't written any more; None, for a new segment, where it can't be read.

    Nothing is redone: the backing volumes are ahead. But marks that an attempt to go on left aren't given twice.
    """

    def visit(reader: SegmentReader, offset: int, record: Record) -> None:
        advancing = (RecordKind.WRITE, RecordKind.MARK, RecordKind.COPY_START)
        if record.lsn > progress.checkpoint_lsn and record.kind in advancing:
            _advance(standing, record)

    try:
        tail = replay(directory, progress.checkpoint_segment, visit, history)
    except CorruptionError as error:
        log.warning("%s; a complete copy follows anyway", error)
        return None
    return tail if tail is not None and tail.next_lsn > progress.checkpoint_lsn else None


def _advance(standing: SplitterState, record: Record) -> None:
    standing.time_ns = max(standing.time_ns, record.time_ns)
    if record.kind is RecordKind.MARK:
        standing.mark = msgspec.msgpack.decode(record.covered, type=Mark).mark
        return
    standing.seq, standing.position_time_ns = record.seq, record.time_ns
    if record.kind is RecordKind.COPY_START:
        standing.mark = msgspec.msgpack.decode(record.covered, type=CopyStart).mark


def _redo(volume: Volume, record: Record, contents: bytes) -> None:
    offset = record.block * volume.block_size
    write_all(volume.backing.fd, contents[: volume.size_bytes - offset], offset)


def _sync_file(path: str) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.fdatasync(fd)
    finally:
        os.close(fd)
