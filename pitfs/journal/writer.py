"""The local journal's writing side: append, sync, roll to the next segment, recycle. No event loop here.

One thread appends: the splitter's event loop. `sync`, `release` and `prepare_spare` run in other threads meanwhile.

Group commit: `sync` makes durable what was appended before it began, however many writes that is, and appending goes
on beside it. So a write that comes during a sync waits for the next one, which it shares with all others that come.

`durable_lsn` is written into each record. Recovery reads there which earlier records an fsync had waited for.
"""

from __future__ import annotations

import os
import secrets
import threading
from dataclasses import dataclass
from typing import Final

import msgspec

from pitfs.errors import CapacityError
from pitfs.model.record import HEADER_BYTES, Message, RecordKind, encode_head
from pitfs.storage.files import closed_on_error, fsync_directory, open_fd, storage_error, write_all
from pitfs.storage.segment import DATA_OFFSET, SegmentHeader, list_segments, segment_path

MIN_SEGMENT_BYTES: Final = 4 << 20  # holds a few records of the greatest size
MAX_SEGMENT_BYTES: Final = 64 << 20
# Where fewer bytes than this are written between two fsyncs, latency matters more than bandwidth: zeros are then
# written into a new segment ahead of the records, so that fsyncs there have no extents to convert (measured: 150
# instead of 260 µs each).
SYNC_HEAVY_BYTES: Final = 256 << 10
ZERO_AHEAD_BYTES: Final = 1 << 20
MAX_SPARES: Final = 4  # ready ahead: 256 MiB, what a fast disk takes while one of them is made
_ZEROS: Final = bytes(ZERO_AHEAD_BYTES)
PAGE_BYTES: Final = 4096
_PAGE_OF_ZEROS: Final = memoryview(bytes(PAGE_BYTES))
# Kept free behind the last write of a segment, for SEAL and for the MARK that closes the interval of a full journal:
# without that MARK the interval could never be shipped, nor its room be given back.
RESERVE_BYTES: Final = 1024
_MAY_USE_RESERVE: Final = frozenset({int(RecordKind.MARK), int(RecordKind.COPY_PROGRESS)})
_SPARE_PREFIX: Final = "spare-"
_USED_SUFFIX: Final = "-used"  # of a spare that was a segment: all of its blocks have been written


def segment_bytes_for(capacity_bytes: int) -> int:
    """Size of a segment: a sixteenth of the capacity, within limits, whole 4 KiB."""
    return max(MIN_SEGMENT_BYTES, min(MAX_SEGMENT_BYTES, capacity_bytes // 16)) & ~4095


@dataclass(frozen=True, slots=True, order=True)
class Location:
    """A place between two records of the journal: `offset` in segment `segment`."""

    segment: int
    offset: int


@dataclass(frozen=True, slots=True)
class JournalTail:
    """Where the journal goes on: behind its last good record, or in place of a SEAL. `seed` is the segment's."""

    location: Location
    seed: int
    next_lsn: int


@dataclass(slots=True)
class _OpenSegment:
    number: int
    fd: int
    named: bool = False  # whether the directory entry is durable


class Journal:
    """Appends records to the chain of segments in a directory.

    Args:
        directory: where the segments are; exists.
        history: 16 bytes, the group's history.
        capacity_bytes: limit of all segments together.
        tail: where to go on, as recovery found it; None begins a new segment.
        next_lsn: lsn of the first record of that new segment.

    Raises:
        PitfsError: the directory can't be used.
    """

    def __init__(
        self, directory: str, history: bytes, capacity_bytes: int, tail: JournalTail | None = None, next_lsn: int = 1
    ) -> None:
        self.directory = directory
        self.history = history
        self.segment_bytes = segment_bytes_for(capacity_bytes)
        self.limit_count = max(4, capacity_bytes // self.segment_bytes)
        self.lsn = (next_lsn if tail is None else tail.next_lsn) - 1
        self.durable_lsn = self.lsn if tail is None else 0
        self.appended_bytes = 0
        self.synced_bytes = 0
        self._numbers = list_segments(directory)
        self._lock = threading.RLock()  # guards _segment, _unsynced, _spares and _numbers
        self._sync_lock = threading.Lock()  # held while descriptors of _unsynced are in use; taken before _lock
        self._max_spares = max(2, min(MAX_SPARES, self.limit_count // 8))
        self._spares = self._find_spares()
        self._unsynced: list[_OpenSegment] = []
        self._failed: OSError | None = None  # of the sync that failed
        self._sync_heavy = True  # whether little was written between the last two syncs
        if tail is None:
            if not self._spares:
                self.prepare_spare()
            self._start_segment()
        else:
            number = tail.location.segment
            fd = os.open(segment_path(directory, number), os.O_RDWR | os.O_CLOEXEC)
            self._segment = _OpenSegment(number, fd, named=True)
            self._seed, self._offset = tail.seed, tail.location.offset
            self._end = os.fstat(fd).st_size
            self._written = self._offset  # blocks of the file before it need no extents converted

    @property
    def tail(self) -> Location:
        """Where the next record goes, or at a segment's end its SEAL."""
        return Location(self._segment.number, self._offset)

    @property
    def first_segment(self) -> int:
        return self._numbers[0]

    @property
    def used_bytes(self) -> int:
        return len(self._numbers) * self.segment_bytes

    @property
    def capacity_bytes(self) -> int:
        return self.limit_count * self.segment_bytes

    def room_needed_before(self, spared: int, needed: int) -> int:
        """The segment before which all should be given back so that there is room again.

        Args:
            spared: first of the segments that are kept as long as there is room. needed: first that is kept anyway.
        """
        with self._lock:
            excess = len(self._numbers) - (self.limit_count - max(2, self.limit_count // 8))
            first = self._numbers[0] if self._numbers else 0
        return min(needed, max(spared, first + max(excess, 0)))

    def append(
        self, kind: int, volume: int, block: int, block_count: int, seq: int, time_ns: int, covered: bytes,
        contents: bytes = b"",
    ) -> None:  # fmt: skip
        """Appends one record; it is durable after the next `sync`.

        Raises:
            CapacityError: no spare is ready for the next segment: see `prepare_spare`; nothing was appended.
            OSError: the disk refuses; nothing was appended.
        """
        offset = self._offset
        size = HEADER_BYTES + len(covered) + len(contents)
        if offset + size + RESERVE_BYTES > self._end and (
            kind not in _MAY_USE_RESERVE or offset + size + HEADER_BYTES > self._end
        ):
            self._roll()
            offset = self._offset
        end = offset + size
        if end > self._written:
            self._write_ahead(end)
        lsn = self.lsn + 1
        head = encode_head(
            kind, volume, block, block_count, seq, time_ns, lsn, self.durable_lsn, covered, len(contents), self._seed
        )  # fmt: skip
        # Up to the end of its last page: a recycled segment may have left the page cache, and the kernel would read
        # from the disk each page that isn't written whole (measured: 80 instead of 5 µs).
        padding = _PAGE_OF_ZEROS[: -end % PAGE_BYTES]
        if os.pwritev(self._segment.fd, (head, contents, padding), offset) != size + len(padding):
            # A short write means a full disk or a failing one: writing on says which.
            write_all(self._segment.fd, head + contents, offset)
        self.lsn = lsn
        self._offset = end
        self.appended_bytes += size

    def append_message(self, message: Message, seq: int, time_ns: int) -> Location:
        """Appends the record of a message, and returns its place. As `append`."""
        body = msgspec.msgpack.encode(message)
        self.append(message.kind, 0, 0, 0, seq, time_ns, body)
        return Location(self._segment.number, self._offset - HEADER_BYTES - len(body))

    def _write_ahead(self, end: int) -> None:
        """Writes zeros ahead of the records where fsyncs are many and the file's blocks were never written."""
        if not self._sync_heavy:
            self._written = end
            return
        start = max(self._written, self._offset)
        size = min(max(ZERO_AHEAD_BYTES, end - start), self._end - start)
        for at in range(start, start + size, ZERO_AHEAD_BYTES):
            write_all(self._segment.fd, _ZEROS[: start + size - at], at)
        self._written = start + size

    def _roll(self) -> None:
        """Closes the segment with SEAL and begins the next one. Raises CapacityError if no spare is ready.

        The next one comes first: where there is none, the segment stays open for records of the reserve.
        """
        with self._lock:  # a sync meanwhile must see both segments
            before, offset, seed = self._segment, self._offset, self._seed
            self._start_segment(sealed=1)
            self._unsynced.append(before)
            seal = encode_head(RecordKind.SEAL, 0, 0, 0, 0, 0, self.lsn, self.durable_lsn, b"", 0, seed)
            write_all(before.fd, seal, offset)

    def _start_segment(self, sealed: int = 0) -> None:
        with self._lock:
            if not self._spares:
                raise CapacityError(f"{self.directory}: no segment is ready")
            spare = self._spares.pop()
            number = (self._numbers[-1] if self._numbers else 0) + 1
        path = segment_path(self.directory, number)
        seed = secrets.randbits(64)
        with closed_on_error(os.open(spare, os.O_RDWR | os.O_CLOEXEC)) as fd:
            # The SEAL before it takes an lsn too, as lsns have no gaps.
            header = SegmentHeader(number, seed, self.lsn + 1 + sealed, self.segment_bytes, self.history)
            write_all(fd, header.encode(), 0)
            os.rename(spare, path)
        self.lsn += sealed
        with self._lock:
            self._numbers.append(number)
        self._segment = _OpenSegment(number, fd)
        self._seed, self._offset, self._end = seed, DATA_OFFSET, self.segment_bytes
        self._written = self.segment_bytes if spare.endswith(_USED_SUFFIX) else DATA_OFFSET

    def _find_spares(self) -> list[str]:
        """Spares that an earlier run left; removes others. What a spare holds doesn't matter."""
        found: list[str] = []
        for name in os.listdir(self.directory):
            path = os.path.join(self.directory, name)
            if not name.startswith(_SPARE_PREFIX):
                continue
            if len(found) < self._max_spares and os.path.getsize(path) == self.segment_bytes:
                found.append(path)
            else:
                os.unlink(path)
        return found

    def _spare_path(self, suffix: str = "") -> str:
        """A new name: two threads may make a spare at a time."""
        return os.path.join(self.directory, f"{_SPARE_PREFIX}{secrets.token_hex(8)}{suffix}")

    def _make_spare(self) -> str:
        """Makes a file for a segment. Raises CapacityError if the capacity or the disk is exhausted."""
        path = self._spare_path()
        if len(self._numbers) + len(self._spares) >= self.limit_count:
            problem = f"the journal's capacity of {self.capacity_bytes} bytes is used up"
            raise CapacityError(f"{self.directory}: {problem}: raise [journal] capacity, or let the replica catch up")
        try:
            with open_fd(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC) as fd:
                os.posix_fallocate(fd, 0, self.segment_bytes)
                os.fsync(fd)
        except OSError as error:
            if os.path.exists(path):
                os.unlink(path)
            raise storage_error(error, path, "making a journal segment") from error
        return path

    def prepare_spare(self) -> None:
        """Makes the file of a further segment ahead of its use. Blocks, in any thread.

        Raises:
            CapacityError: the capacity or the disk is exhausted.
        """
        self._offer_spare(self._make_spare())

    def _offer_spare(self, path: str) -> None:
        """Keeps the file as a spare, unless other threads have made enough meanwhile."""
        with self._lock:
            if self.needs_spare:
                self._spares.append(path)
                return
        os.unlink(path)

    @property
    def has_spare(self) -> bool:
        return bool(self._spares)

    @property
    def needs_spare(self) -> bool:
        """Whether one more should be made ahead, and the capacity has room for it."""
        spares = len(self._spares)
        return spares < self._max_spares and spares + len(self._numbers) < self.limit_count

    @property
    def syncing(self) -> bool:
        """Whether a thread syncs now: `sync` would wait until it is done."""
        return self._sync_lock.locked()

    @property
    def has_rolled(self) -> bool:
        """Whether the current segment began after the last `sync`, which then has more to do than a file's data."""
        return not self._segment.named

    @property
    def unsynced_bytes(self) -> int:
        return self.appended_bytes - self.synced_bytes

    def sync(self) -> None:
        """Makes all that was appended before the call durable. Blocks.

        Raises:
            OSError: the disk refused, now or in an earlier call: see `begin_new_segment`.
        """
        with self._sync_lock:
            with self._lock:
                sealed = list(self._unsynced)
                current, lsn, appended = self._segment, self.lsn, self.appended_bytes
            # The kernel reports a failure once and drops the pages: a retry would succeed without writing them.
            if self._failed is not None:
                raise self._failed
            try:
                for segment in (*sealed, current):
                    os.fdatasync(segment.fd)
                    if not segment.named:
                        fsync_directory(self.directory)
                        segment.named = True
            except OSError as error:
                self._failed = OSError(error.errno, error.strerror, self.directory)
                raise self._failed from error
            with self._lock:
                self._unsynced = [segment for segment in self._unsynced if segment not in sealed]
            for segment in sealed:
                os.close(segment.fd)
            self.durable_lsn = max(self.durable_lsn, lsn)
            self._sync_heavy = appended - self.synced_bytes < SYNC_HEAVY_BYTES
            self.synced_bytes = appended

    def begin_new_segment(self) -> None:
        """Begins a new segment; after a sync that failed, what isn't durable is given up. Blocks.

        Raises:
            CapacityError: the capacity or the disk is exhausted.
            OSError: the disk refuses.
        """
        if not self._spares:
            self.prepare_spare()
        with self._sync_lock, self._lock:
            if self._failed is None:
                self._roll()
                return
            before = [*self._unsynced, self._segment]
            self._start_segment()
            self._unsynced = []
            for segment in before:
                os.close(segment.fd)
            self._failed = None

    def release(self, first_needed: int) -> None:
        """Gives back segments before number `first_needed`: some become spares, the others are removed. Blocks.

        They need not be synced: what they hold is durable elsewhere. Else a load without fsync would fill the journal.
        """
        while True:
            with self._sync_lock, self._lock:
                if not self._numbers or self._numbers[0] >= min(first_needed, self._segment.number):
                    return
                number = self._numbers.pop(0)
                recycle = self.needs_spare
                for segment in [each for each in self._unsynced if each.number == number]:
                    self._unsynced.remove(segment)
                    os.close(segment.fd)
            path = segment_path(self.directory, number)
            if recycle and os.path.getsize(path) == self.segment_bytes:
                spare = self._spare_path(_USED_SUFFIX)
                os.rename(path, spare)
                self._offer_spare(spare)
            else:
                os.unlink(path)

    def close(self) -> None:
        """Closes the files; what isn't synced stays as it is."""
        for segment in (*self._unsynced, self._segment):
            os.close(segment.fd)
        self._unsynced = []
