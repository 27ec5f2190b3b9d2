"""The local journal's reading side: the shipper reads the splitter's records, interval by interval.

Memory holds the columns of one interval, some 40 bytes for each block written. Contents stay in the segments until
they are sent: `BlockSource` reads them.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from pitfs.errors import CorruptionError
from pitfs.journal.search import Found, Key, SegmentSearch, key_of
from pitfs.journal.writer import Location
from pitfs.model.difference import Columns, Rows
from pitfs.model.record import CopyStart, Mark, Record, RecordKind
from pitfs.storage.files import fsync_directory, open_fd, storage_error
from pitfs.storage.segment import DATA_OFFSET, SegmentReader, segment_error, segment_path

_LONG: Final = ("block", "seq", "time_ns", "segment", "contents")
_WRITE: Final = np.dtype([*((name, "<i8") for name in _LONG), ("block_count", "<i4"), ("volume", "<i4")])
_PACK_WRITE: Final = struct.Struct("<qqqqqii").pack


@dataclass(frozen=True, slots=True)
class Interval:
    """A closed interval: what was written, and its places in the journal.

    Attributes:
        mark, mark_time_ns, bookmark: of the MARK that closes it.
        from_seq, from_time_ns, to_seq, to_time_ns: its positions.
        columns: a row for each block written.
        segment, offset: int64[n], the place of each row's block.
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
    """A copy of the state at (seq, time_ns) begins with the COPY_START at `location`."""

    start: CopyStart
    seq: int
    time_ns: int
    location: Location

    @property
    def what(self) -> str:
        return "full sync" if self.start.is_complete else "full sync of what changed"


class JournalReader:
    """Reads the journal from a place on, while the splitter appends and recycles.

    Args:
        directory: of the segments.
        block_sizes: of the volumes, bytes.

    Attributes:
        location: behind the record that was read last.
        position: (seq, time_ns) of the last snapshot before the open interval; start: where that interval begins.
    """

    def __init__(self, directory: str, block_sizes: list[int]) -> None:
        self.directory = directory
        self.block_sizes = block_sizes
        self._reader: SegmentReader | None = None
        self.location = Location(0, 0)
        self._begin_interval((0, 0))

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def seek(self, location: Location, position: tuple[int, int]) -> None:
        """Goes on at `location`, behind the snapshot at `position` (seq, time_ns)."""
        self.close()
        self.location = location
        self._begin_interval(position)

    def restart(self) -> None:
        """Goes back to where the open interval begins."""
        self.seek(self.start, self.position)

    def seek_mark(self, mark: int, seq: int, until: Location) -> Found:
        """Goes on behind MARK or COPY_START number `mark`, which names the position of write `seq`.

        Raises:
            CorruptionError: the journal is damaged there.
            PitfsError: this process lacks memory, descriptors or rights to read it.
        """
        return self._seek((seq, mark), until)

    def seek_write(self, seq: int, until: Location) -> Found:
        """Goes on behind write `seq`. Raises as `seek_mark`."""
        return self._seek((seq, 0), until)

    def seek_writes_behind(self, position: tuple[int, int], until: Location) -> Found:
        """Goes on with the first write behind a position (seq, time_ns). Raises as `seek_mark`."""
        found, before, _ = self._search((position[0] + 1, 0), until)
        self.seek(before, position)
        return found

    def _seek(self, key: Key, until: Location) -> Found:
        found, _, record = self._search(key, until)
        if record is not None:
            message = record.message
            time_ns = message.position_time_ns if isinstance(message, Mark) else record.time_ns
            self._begin_interval((record.seq, time_ns))
        return found

    def _search(self, key: Key, until: Location) -> tuple[Found, Location, Record | None]:
        """Goes on behind the record with that key; with its place, or where the journal has it not."""
        number = SegmentSearch(self.directory, until).segment_of(key)
        if number is None:
            return Found.ERASED, self.location, None
        self.seek(Location(number, DATA_OFFSET), (0, 0))
        outcome = Found.ERASED
        for location, record in self.records(until):
            here = key_of(record)
            if here == key:
                return Found.THERE, location, record
            if here is not None and here > key:
                return outcome, location, None
            if here is not None:
                outcome = Found.NEVER
        return Found.NEVER, self.location, None

    def next(self, until: Location) -> Interval | Copy | None:
        """Reads until the next MARK or COPY_START; None where `until` comes before it (call again later).

        Raises:
            CorruptionError: the journal is damaged.
        """
        for location, record in self.records(until):
            if record.kind is RecordKind.WRITE:
                contents = location.offset + record.contents_offset
                place = record.block, record.seq, record.time_ns, location.segment, contents
                self._writes += _PACK_WRITE(*place, record.block_count, record.volume)
                self._checksums += record.covered
                continue
            message = record.message
            if isinstance(message, Mark):
                return self._close(location, record, message)
            if isinstance(message, CopyStart):
                self._begin_interval((record.seq, record.time_ns))
                return Copy(message, record.seq, record.time_ns, location)
        return None

    def records(self, until: Location) -> Iterator[tuple[Location, Record]]:
        """Yields the records up to `until` (exclusive) with their places. Stopped early, it goes on behind the last.

        Raises:
            CorruptionError: the journal is damaged, or a segment is unreadable.
            PitfsError: this process lacks memory, descriptors or rights to read it.
        """
        try:
            while self.location < until:
                if self._reader is None or self._reader.header.number != self.location.segment:
                    self.close()
                    self._reader = SegmentReader(segment_path(self.directory, self.location.segment))
                reader, number = self._reader, self._reader.header.number
                end = until.offset if number == until.segment else None
                here = self.location
                for offset, record in reader.heads(here.offset, end):
                    if record.kind is RecordKind.SEAL:
                        self.location = Location(number + 1, DATA_OFFSET)
                        break
                    self.location = behind = Location(number, offset + record.size_bytes)
                    yield here, record
                    here = behind
                else:
                    if end is None:
                        raise CorruptionError(reader.path, self.location.offset, "the segment has no end")
                    return
        except OSError as error:
            path = segment_path(self.directory, self.location.segment)
            raise segment_error(error, path, self.location.offset) from error

    def _begin_interval(self, position: tuple[int, int]) -> None:
        """The open interval begins at `location`, behind the snapshot at `position` (seq, time_ns)."""
        self.position, self.start = position, self.location
        self._writes, self._checksums = bytearray(), bytearray()  # its columns, growing

    def _close(self, location: Location, record: Record, message: Mark) -> Interval:
        """The interval that the MARK at `location` closes. Raises CorruptionError where writes of it are missing."""
        writes = np.frombuffer(bytes(self._writes), dtype=_WRITE)
        counts = writes["block_count"].astype(np.int64)
        starts = np.cumsum(counts) - counts
        within = np.arange(int(counts.sum()), dtype=np.int64) - np.repeat(starts, counts)
        volume = np.repeat(writes["volume"], counts)
        columns = Columns(
            volume.astype(np.uint16),
            np.repeat(writes["block"], counts) + within,
            np.repeat(writes["seq"], counts),
            np.frombuffer(bytes(self._checksums), dtype="<u8"),
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
            offset=np.repeat(writes["contents"], counts) + within * np.array(self.block_sizes, dtype=np.int64)[volume],
            times=writes["time_ns"].copy(),
            start=self.start,
            end=self.location,
        )
        if len(interval.times) != interval.to_seq - interval.from_seq:
            positions = f"seq {interval.from_seq} and {interval.to_seq} in segment {location.segment:016x}"
            problem = f"{len(interval.times)} writes between {positions}"
            raise CorruptionError(self.directory, location.offset, problem)
        self._begin_interval((interval.to_seq, interval.to_time_ns))
        return interval


class BlockSource:
    """Reads the contents of an interval's rows. Keeps at most OPEN_SEGMENTS files open.

    Args:
        interval: whose rows are read.
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
            path = segment_path(self._directory, number)
            fd = self._fds[number] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return fd

    def read(self, rows: Rows) -> bytearray:
        """The rows' blocks in their order, not verified. Blocks that are adjacent in a segment take one read.

        Raises:
            CorruptionError: a segment is missing, too short, or unreadable there.
            PitfsError: this process lacks memory, descriptors or rights to read it.
        """
        sizes = self._block_sizes[self._interval.columns.volume[rows]]
        segment, offset = self._interval.segment[rows], self._interval.offset[rows]
        adjacent = (segment[1:] == segment[:-1]) & (offset[1:] == offset[:-1] + sizes[:-1])
        begins = np.concatenate(([0], np.flatnonzero(~adjacent) + 1, [len(rows)]))
        ends = np.concatenate(([0], np.cumsum(sizes)))
        buffer = bytearray(int(ends[-1]))
        view = memoryview(buffer)
        places = ends[begins].tolist()
        firsts = begins[:-1]
        for number, at, start, end in zip(
            segment[firsts].tolist(), offset[firsts].tolist(), places[:-1], places[1:], strict=True
        ):
            path = segment_path(self._directory, number)
            try:
                done = os.preadv(self._fd(number), [view[start:end]], at)
            except OSError as error:
                raise segment_error(error, path, at) from error
            if done != end - start:
                raise CorruptionError(path, at, "the file ends inside a record")
        return buffer


class Durability:
    """Makes the journal durable before it is shipped, whatever the splitter has synced.

    The replica must never be ahead of what a power loss leaves here: nothing could follow its last mark then.
    """

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._named = 0  # the names of the segments up to this one are durable

    def make(self, first_segment: int, last_segment: int) -> None:
        """Syncs these segments, both inclusive, as far as they exist. Blocks. Raises PitfsError if the disk refuses."""
        try:
            for number in range(first_segment, last_segment + 1):
                path = segment_path(self._directory, number)
                # Where it was given back meanwhile, its reader will notice.
                with suppress(FileNotFoundError), open_fd(path, os.O_RDWR) as fd:
                    os.fdatasync(fd)
            if last_segment > self._named:
                fsync_directory(self._directory)
                self._named = last_segment
        except OSError as error:
            raise storage_error(error, self._directory, "making the journal durable") from error
