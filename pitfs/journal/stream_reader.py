"""The local journal as a stream: the next writes with their contents, up to a mark.

`JournalReader.next` gathers whole intervals without contents. Here memory holds the contents of one batch.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass

import numpy as np
from xxhash import xxh3_64_intdigest

from pitfs.errors import CorruptionError
from pitfs.journal.reader import JournalReader
from pitfs.journal.writer import Location
from pitfs.model.record import CopyStart, Mark, Record, RecordKind, packed_checksums
from pitfs.model.transfer import MAX_BATCH_ROWS, WRITE, StreamMark, Writes
from pitfs.storage.files import open_fd, read_exactly
from pitfs.storage.segment import segment_error, segment_path

NOTHING_DIGEST = xxh3_64_intdigest(b"")


@dataclass(frozen=True, slots=True)
class StreamChunk:
    """What comes next in the journal.

    Attributes:
        writes: None if there are none before the mark.
        checksums: xxh3_64 of each block of the writes, 8 bytes each.
        mark: behind them; None if the journal doesn't have it yet, or it is further on.
        begins_anew: a copy begins behind them, which the stream can't lead on over.
        position: (seq, time_ns) of the last write.
        segment: the one that has the last of these records.
    """

    writes: Writes | None
    checksums: bytes
    mark: StreamMark | None
    begins_anew: bool
    position: tuple[int, int]
    segment: int


def next_chunk(reader: JournalReader, until: Location, limit_bytes: int) -> StreamChunk | None:
    """The next writes, about `limit_bytes` of contents at most, and the mark behind them; None if there is nothing.

    Blocks.

    Args:
        reader: moved on, but not past a COPY_START, which is for the one who ships the copy.

    Raises:
        CorruptionError: the journal is damaged.
        PitfsError: this process lacks memory, descriptors or rights to read it.
    """
    start, records, size_bytes = reader.location, list[tuple[Location, Record]](), 0
    mark: StreamMark | None = None
    copy: Location | None = None
    last_segment = start.segment
    for location, record in reader.records(until):
        last_segment = location.segment
        if record.kind is RecordKind.WRITE:
            records.append((location, record))
            size_bytes += record.size_bytes - record.contents_offset
            if size_bytes >= limit_bytes or len(records) >= MAX_BATCH_ROWS:
                break
            continue
        message = record.message
        if isinstance(message, Mark):
            times = message.position_time_ns, record.time_ns
            mark = StreamMark(message.mark, record.seq, *times, message.bookmark)
            break
        if isinstance(message, CopyStart):
            copy = location
            break
    if not (records or mark or copy):
        return None
    writes, checksums, position = None, b"", reader.position
    if records:
        last = records[-1][1]
        checksums = b"".join([record.covered for _, record in records])
        writes, position = _writes(reader, records, checksums), (last.seq, last.time_ns)
        if writes.first_seq != reader.position[0] + 1 or last.seq != reader.position[0] + len(writes.rows):
            problem = f"writes {writes.first_seq} to {last.seq} follow write {reader.position[0]}"
            raise CorruptionError(segment_path(reader.directory, start.segment), start.offset, problem)
    reader.seek(copy or reader.location, position)
    return StreamChunk(writes, checksums, mark, copy is not None, position, last_segment)


def _writes(reader: JournalReader, records: list[tuple[Location, Record]], checksums: bytes) -> Writes:
    rows = np.zeros(len(records), WRITE)
    rows["time_ns"] = [record.time_ns for _, record in records]
    rows["block"] = [record.block for _, record in records]
    rows["block_count"] = [record.block_count for _, record in records]
    rows["volume"] = [record.volume for _, record in records]
    return Writes(records[0][1].seq, rows, _contents(reader, records), xxh3_64_intdigest(checksums))


def _contents(reader: JournalReader, records: list[tuple[Location, Record]]) -> bytearray:
    """The records' contents, verified. The records of a segment are adjacent, and take one read."""
    contents = bytearray()
    for segment, group in itertools.groupby(records, lambda each: each[0].segment):
        here, path = list(group), segment_path(reader.directory, segment)
        start, end = here[0][0].offset, here[-1][0].offset + here[-1][1].size_bytes
        try:
            with open_fd(path, os.O_RDONLY) as fd:
                data = memoryview(read_exactly(fd, end - start, start, path))
        except OSError as error:
            raise segment_error(error, path, start) from error
        for location, record in here:
            at = location.offset - start
            content = data[at + record.contents_offset : at + record.size_bytes]
            if packed_checksums(content, reader.block_sizes[record.volume]) != record.covered:
                problem = "a block doesn't match the checksum taken when it was written"
                raise CorruptionError(path, location.offset, problem)
            contents += content
    return contents
