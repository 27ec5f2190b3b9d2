"""The local journal as a stream: the next writes with their contents, up to a mark.

Beside `reader.JournalReader`, which gathers whole intervals without contents: here nothing is held but one batch.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import msgspec
import numpy as np
from xxhash import xxh3_64_intdigest

from pitfs.errors import CorruptionError
from pitfs.journal.reader import JournalReader, unreadable
from pitfs.journal.writer import Location, journal_path
from pitfs.model.record import Mark, Record, RecordKind, block_checksums
from pitfs.model.transfer import MAX_BATCH_ROWS, WRITE, StreamMark, Writes

NOTHING_DIGEST = xxh3_64_intdigest(b"")


@dataclass(frozen=True, slots=True)
class StreamChunk:
    """What comes next in the journal.

    Attributes:
        writes: None if there are none before the mark.
        mark: behind them, None if it isn't known yet.
        begins_anew: behind them a complete copy begins: the stream can't lead on.
        position: (seq, time_ns) of the last write.
        segment: that has the last record of these.
    """

    writes: Writes | None
    mark: StreamMark | None
    begins_anew: bool
    position: tuple[int, int]
    segment: int


class _Gathered:
    """Records of a piece, and where their contents stand."""

    def __init__(self) -> None:
        self.records: list[tuple[Location, Record]] = []
        self.size_bytes = 0

    def add(self, location: Location, record: Record) -> None:
        self.records.append((location, record))
        self.size_bytes += record.size_bytes - record.contents_offset


def next_chunk(reader: JournalReader, until: Location, limit_bytes: int, block_sizes: list[int]) -> StreamChunk | None:
    """The next writes, some `limit_bytes` of contents at most, and the mark behind them; None if there is nothing.

    Blocks.

    Args:
        reader: moved on.
        block_sizes: of the volumes, bytes.

    Raises:
        CorruptionError: the journal is damaged.
        PitfsError: this process can't read it just now.
    """
    gathered, start = _Gathered(), reader.location
    marks: list[StreamMark] = []
    copies: list[Location] = []
    last_segment = [start.segment]

    def visit(location: Location, record: Record) -> bool:
        last_segment[0] = location.segment
        if record.kind is RecordKind.WRITE:
            gathered.add(location, record)
            return gathered.size_bytes >= limit_bytes or len(gathered.records) >= MAX_BATCH_ROWS
        if record.kind is RecordKind.MARK:
            message = msgspec.msgpack.decode(record.covered, type=Mark)
            marks.append(
                StreamMark(message.mark, record.seq, message.position_time_ns, record.time_ns, message.bookmark)
            )
        elif record.kind is RecordKind.COPY_START:
            copies.append(location)
        return bool(marks or copies)

    reader.follow(until, visit)
    if copies:
        reader.location = copies[0]  # for whoever ships the copy
    if not (gathered.records or marks or copies):
        return None
    writes, position = None, reader.position
    if gathered.records:
        last = gathered.records[-1][1]
        writes, position = _writes(reader, gathered, block_sizes), (last.seq, last.time_ns)
        if writes.first_seq != reader.position[0] + 1 or last.seq != reader.position[0] + len(writes.rows):
            raise CorruptionError(
                journal_path(reader.directory, start.segment), start.offset,
                f"writes {writes.first_seq} to {last.seq} follow write {reader.position[0]}",
            )  # fmt: skip
    reader.seek(reader.location, position)
    return StreamChunk(writes, marks[0] if marks else None, bool(copies), position, last_segment[0])


def _writes(reader: JournalReader, gathered: _Gathered, block_sizes: list[int]) -> Writes:
    rows = np.zeros(len(gathered.records), WRITE)
    records = [record for _, record in gathered.records]
    rows["time_ns"] = [record.time_ns for record in records]
    rows["block"] = [record.block for record in records]
    rows["block_count"] = [record.block_count for record in records]
    rows["volume"] = [record.volume for record in records]
    digest = xxh3_64_intdigest(b"".join([record.covered for record in records]))
    return Writes(records[0].seq, rows, _contents(reader.directory, gathered, block_sizes), digest)


def _contents(directory: str, gathered: _Gathered, block_sizes: list[int]) -> bytearray:
    """The records' contents, verified: one read for each segment, as they stand one behind the other there."""
    contents = bytearray()
    records = gathered.records
    while records:
        segment, start = records[0][0].segment, records[0][0].offset
        here = [each for each in records if each[0].segment == segment]
        records = records[len(here) :]
        end = here[-1][0].offset + here[-1][1].size_bytes
        data = memoryview(_read(journal_path(directory, segment), start, end))
        for location, record in here:
            at = location.offset - start
            content = data[at + record.contents_offset : at + record.size_bytes]
            if tuple(block_checksums(content, block_sizes[record.volume])) != record.checksums:
                raise CorruptionError(
                    journal_path(directory, segment), location.offset,
                    "a block doesn't match the checksum taken when it was written",
                )  # fmt: skip
            contents += content
    return contents


def _read(path: str, start: int, end: int) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            data = os.pread(fd, end - start, start)
        finally:
            os.close(fd)
    except OSError as error:
        raise unreadable(error, path, start) from error
    if len(data) != end - start:
        raise CorruptionError(path, start, "the file ends inside a record")
    return data
