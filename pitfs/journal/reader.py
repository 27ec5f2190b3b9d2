"""The local journal's reading side: the shipper follows the splitter's records, interval by interval.

Only what one interval's columns take is held (some 40 bytes for each block written); contents stay in the
segments until they are sent.
"""

from __future__ import annotations

import errno
import os
import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from pitfs.errors import CorruptionError, PitfsError
from pitfs.journal.writer import Location, journal_path
from pitfs.model.difference import Columns, Rows
from pitfs.model.record import CopyStart, Mark, Record, RecordKind
from pitfs.storage.files import fsync_directory, storage_error
from pitfs.storage.segment import DATA_OFFSET, SegmentReader, list_segments

_WRITE: Final = np.dtype(
    [
        ("block", "<i8"),
        ("seq", "<i8"),
        ("time_ns", "<i8"),
        ("segment", "<i8"),
        ("contents", "<i8"),
        ("block_count", "<i4"),
        ("volume", "<i4"),
    ]
)
_PACK_WRITE: Final = struct.Struct("<qqqqqii").pack
MAX_SEEN: Final = 4096  # marks remembered from looking for one
_NOT_THE_FILES: Final = frozenset({errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EPERM})


def unreadable(error: OSError, path: str, offset: int) -> PitfsError:
    """A segment that is missing or has a bad sector is damaged: what it held must come from elsewhere.

    Not so where this process has no memory, descriptors or rights: then it is all still there.
    """
    if error.errno in _NOT_THE_FILES:
        return storage_error(error, path, "reading the journal")
    return CorruptionError(path, offset, f"it can't be read: {os.strerror(error.errno or errno.EIO)}")


@dataclass(frozen=True, slots=True)
class Interval:
    """A closed interval: what was written, and where it stands in the journal.

    Attributes:
        mark, mark_time_ns, bookmark: of the MARK that closes it.
        from_seq, from_time_ns, to_seq, to_time_ns: its positions.
        columns: a row for each block written.
        segment, offset: int64[n], where each row's block stands.
        times: int64[to_seq - from_seq], time_ns of each write.
        start: behind the MARK or COPY_START before; end: behind the MARK.
    """

    mark: int
    mark_time_ns: int
    bookmark: str | None
    from_seq: int
    from_time_ns: int
    to_seq: int
    to_time_ns: int
    columns: Columns
    segment: Rows
    offset: Rows
    times: npt.NDArray[np.int64]
    start: Location
    end: Location


@dataclass(frozen=True, slots=True)
class Copy:
    """A COPY_START that was met: a copy of the state at (seq, time_ns) begins at `location`."""

    start: CopyStart
    seq: int
    time_ns: int
    location: Location

    @property
    def what(self) -> str:
        """For people."""
        return "complete copy" if self.start.is_complete else "copy of what changed"


@dataclass(frozen=True, slots=True)
class SeenMark:
    """A MARK or COPY_START that the journal has.

    Attributes:
        position: (seq, time_ns) that it names. location: behind it.
        begins_anew: a COPY_START: the interval before it can't be given.
    """

    mark: int
    position: tuple[int, int]
    location: Location
    begins_anew: bool


@dataclass(slots=True)
class _Pending:
    """Columns of the open interval, growing."""

    writes: bytearray = field(default_factory=bytearray)
    checksums: bytearray = field(default_factory=bytearray)

    def add(self, record: Record, location: Location) -> None:
        self.writes += _PACK_WRITE(
            record.block,
            record.seq,
            record.time_ns,
            location.segment,
            location.offset + record.contents_offset,
            record.block_count,
            record.volume,
        )
        self.checksums += record.covered


class JournalReader:
    """Reads the journal from a place on; the splitter may be appending and recycling meanwhile.

    Args:
        directory: of the segments.
        block_sizes: of the volumes, bytes.
    """

    def __init__(self, directory: str, block_sizes: list[int]) -> None:
        self.directory = directory
        self._block_sizes = np.array(block_sizes, dtype=np.int64)
        self._reader: SegmentReader | None = None
        self.location = Location(0, 0)
        self.position: tuple[int, int] = (0, 0)  # seq, time_ns of the last snapshot
        self._pending = _Pending()
        self._start = self.location  # of the open interval
        self.seen: deque[SeenMark] = deque(maxlen=MAX_SEEN)  # by `seek_mark`: up to and with the one looked for

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def seek(self, location: Location, position: tuple[int, int]) -> None:
        """Goes on at `location`, where the snapshot at `position` (seq, time_ns) is the one before."""
        self.close()
        self.location, self.position, self._pending = location, position, _Pending()
        self._start = location

    def restart(self) -> None:
        """Goes back to where the open interval begins."""
        self.seek(self._start, self.position)

    @property
    def start(self) -> Location:
        """Where the open interval begins."""
        return self._start

    def seek_mark(self, mark: int, until: Location, tail_seq: int = 0) -> bool:
        """Goes on behind MARK or COPY_START number `mark`. False where the journal doesn't have it any more.

        Args:
            tail_seq: if it isn't 0, behind that write instead.

        Raises:
            CorruptionError: the journal is damaged before it.
        """
        numbers = list_segments(self.directory)
        if not numbers:
            return False
        self.seek(Location(numbers[0], DATA_OFFSET), (0, 0))
        self.seen.clear()

        def visit(location: Location, record: Record) -> bool:
            if record.kind is RecordKind.MARK:
                message = msgspec.msgpack.decode(record.covered, type=Mark)
                position = record.seq, message.position_time_ns
                self.seen.append(SeenMark(message.mark, position, self.location, begins_anew=False))
            elif record.kind is RecordKind.COPY_START:
                start = msgspec.msgpack.decode(record.covered, type=CopyStart)
                position = record.seq, record.time_ns
                self.seen.append(SeenMark(start.mark, position, self.location, begins_anew=True))
            if tail_seq:
                if record.kind is RecordKind.WRITE and record.seq == tail_seq:
                    found.append((record.seq, record.time_ns))
            elif self.seen and self.seen[-1].mark == mark:
                found.append(self.seen[-1].position)
            return bool(found)

        found: list[tuple[int, int]] = []
        self.follow(until, visit)
        if not found:
            return False
        self.position, self._start = found[0], self.location
        return True

    def next(self, until: Location) -> Interval | Copy | None:
        """Reads until the next MARK or COPY_START; None where `until` comes before it (call again later).

        Raises:
            CorruptionError: the journal is damaged.
        """
        result: list[Interval | Copy] = []

        def visit(location: Location, record: Record) -> bool:
            if record.kind is RecordKind.WRITE:
                self._pending.add(record, location)
            elif record.kind is RecordKind.MARK:
                result.append(self._close(location, record))
            elif record.kind is RecordKind.COPY_START:
                start = msgspec.msgpack.decode(record.covered, type=CopyStart)
                result.append(Copy(start, record.seq, record.time_ns, location))
                self._pending, self.position = _Pending(), (record.seq, record.time_ns)
                self._start = self.location
            return bool(result)

        self.follow(until, visit)
        return result[0] if result else None

    def follow(self, until: Location, visit: Callable[[Location, Record], bool]) -> None:
        """Visits records up to `until` (exclusive); stops behind one for which `visit` returns True.

        Raises:
            CorruptionError: the journal is damaged, or can't be read there.
            PitfsError: this process can't read it just now.
        """
        try:
            while self.location < until:
                reader = self._open(self.location.segment)
                end = until.offset if reader.header.number == until.segment else None
                for offset, record in reader.heads(self.location.offset, end):
                    if record.kind is RecordKind.SEAL:
                        self.location = Location(reader.header.number + 1, DATA_OFFSET)
                        break
                    here = Location(reader.header.number, offset)
                    self.location = Location(reader.header.number, offset + record.size_bytes)
                    if visit(here, record):
                        return
                else:
                    if end is None:
                        raise CorruptionError(reader.path, self.location.offset, "the segment has no end")
                    return
        except OSError as error:
            path = journal_path(self.directory, self.location.segment)
            raise unreadable(error, path, self.location.offset) from error

    def _open(self, number: int) -> SegmentReader:
        if self._reader is None or self._reader.header.number != number:
            self.close()
            self._reader = SegmentReader(journal_path(self.directory, number))
        return self._reader

    def _close(self, location: Location, record: Record) -> Interval:
        message = msgspec.msgpack.decode(record.covered, type=Mark)
        writes = np.frombuffer(bytes(self._pending.writes), dtype=_WRITE)
        counts = writes["block_count"].astype(np.int64)
        starts = np.cumsum(counts) - counts
        within = np.arange(int(counts.sum()), dtype=np.int64) - np.repeat(starts, counts)
        volume = np.repeat(writes["volume"], counts)
        columns = Columns(
            volume.astype(np.uint16),
            np.repeat(writes["block"], counts) + within,
            np.repeat(writes["seq"], counts),
            np.frombuffer(bytes(self._pending.checksums), dtype="<u8"),
        )
        interval = Interval(
            mark=message.mark,
            mark_time_ns=record.time_ns,
            bookmark=message.bookmark,
            from_seq=self.position[0],
            from_time_ns=self.position[1],
            to_seq=record.seq,
            to_time_ns=message.position_time_ns,
            columns=columns,
            segment=np.repeat(writes["segment"], counts),
            offset=np.repeat(writes["contents"], counts) + within * self._block_sizes[volume],
            times=writes["time_ns"].copy(),
            start=self._start,
            end=self.location,
        )
        if len(interval.times) != interval.to_seq - interval.from_seq:
            raise CorruptionError(
                self.directory,
                location.offset,
                f"{len(interval.times)} writes between seq {interval.from_seq} "
                f"and {interval.to_seq} in segment {location.segment:016x}",
            )
        self._pending, self.position = _Pending(), (interval.to_seq, interval.to_time_ns)
        self._start = self.location
        return interval


def after(interval: Interval, position: tuple[int, int]) -> Interval:
    """What of an interval lies behind a position (seq, time_ns) in it."""
    if position[0] == interval.from_seq:
        return interval
    kept = np.flatnonzero(interval.columns.seq > position[0])
    columns = interval.columns
    return replace(
        interval,
        from_seq=position[0],
        from_time_ns=position[1],
        columns=Columns(columns.volume[kept], columns.block[kept], columns.seq[kept], columns.checksum[kept]),
        segment=interval.segment[kept],
        offset=interval.offset[kept],
        times=interval.times[position[0] - interval.from_seq :],
    )


class Durability:
    """Makes the journal durable that is about to be shipped, whatever the splitter has synced.

    The replica mustn't have what a power loss takes from here: its marks couldn't be led on from.
    """

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._named = 0  # up to this segment their names are durable

    def make(self, first_segment: int, last_segment: int) -> None:
        """Of these segments (both inclusive), as far as they are there. Blocks.

        Raises:
            PitfsError: the journal's disk refuses.
        """
        try:
            for number in range(first_segment, last_segment + 1):
                try:
                    fd = os.open(journal_path(self._directory, number), os.O_RDWR | os.O_CLOEXEC)
                except FileNotFoundError:  # given back meanwhile: whoever reads it finds out
                    continue
                try:
                    os.fdatasync(fd)
                finally:
                    os.close(fd)
            if last_segment > self._named:
                fsync_directory(self._directory)
                self._named = last_segment
        except OSError as error:
            raise storage_error(error, self._directory, "making the journal durable") from error


class BlockSource:
    """Contents of an interval's rows, read from the segments and verified. Keeps few files open.

    Args:
        interval: whose rows these are.
        block_sizes: of the volumes, bytes.
    """

    OPEN_SEGMENTS: Final = 64

    def __init__(self, directory: str, interval: Interval, block_sizes: list[int]) -> None:
        self._directory = directory
        self._interval = interval
        self._block_sizes = np.array(block_sizes, dtype=np.int64)
        self._fds: dict[int, int] = {}

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def _fd(self, number: int) -> int:
        fd = self._fds.get(number)
        if fd is None:
            if len(self._fds) >= self.OPEN_SEGMENTS:
                os.close(self._fds.pop(next(iter(self._fds))))
            fd = self._fds[number] = os.open(
                journal_path(self._directory, number), os.O_RDONLY | os.O_CLOEXEC
            )
        return fd

    def read(self, rows: Rows) -> bytearray:
        """The rows' blocks one behind the other, not verified; one read for each stretch that stands together.

        Raises:
            CorruptionError: a segment is too short, missing, or can't be read there.
            PitfsError: this process can't read it just now.
        """
        sizes = self._block_sizes[self._interval.columns.volume[rows]]
        segment, offset = self._interval.segment[rows], self._interval.offset[rows]
        together = (segment[1:] == segment[:-1]) & (offset[1:] == offset[:-1] + sizes[:-1])
        begins = np.concatenate(([0], np.flatnonzero(~together) + 1, [len(rows)]))
        ends = np.concatenate(([0], np.cumsum(sizes)))
        buffer = bytearray(int(ends[-1]))
        view = memoryview(buffer)
        places = ends[begins].tolist()
        firsts = begins[:-1]
        for number, at, start, end in zip(
            segment[firsts].tolist(), offset[firsts].tolist(), places[:-1], places[1:], strict=True
        ):
            path = journal_path(self._directory, number)
            try:
                done = os.preadv(self._fd(number), [view[start:end]], at)
            except OSError as error:
                raise unreadable(error, path, at) from error
            if done != end - start:
                raise CorruptionError(path, at, "the file ends inside a record")
        return buffer
