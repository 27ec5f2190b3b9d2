"""Reading the local journal after a stop: the chain of segments, where it ends, torn ends and damage.

The journal ends at the first record that fails verification. There are two reasons for that:

    a torn end   No fsync had returned for that record: the power failed while it was being written, or before the
                 disk had it. Nobody was promised it. It is cut with everything behind it.
    damage       The record had been durable, and the disk lost or changed it. Nothing is cut: a person must decide.

They are told apart by what is known to have been durable: the last checkpoint says so, and so does every record
behind the bad one, since each has the `durable_lsn` of when it was appended. Two more rules are for headers:

    A header is synced with the first records behind it. So it may be missing (blank), or be that of the file's former
    use, and then the segment was never written: a torn end. A header that is neither is damage.

    SEAL is written after its successor has been made, and takes an lsn. So where the last segment ends with SEAL,
    its successor is a torn end: the journal goes on in place of that SEAL. If the SEAL is missing, the successor is
    cut with the rest.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import closing

from pitfs.errors import CorruptionError
from pitfs.journal.writer import JournalTail, Location
from pitfs.model.record import Record, RecordKind
from pitfs.storage.segment import DATA_OFFSET, SegmentReader, is_blank, list_segments, segment_path

log = logging.getLogger(__name__)

Visit = Callable[[SegmentReader, int, Record], None]


def replay(
    directory: str, first_segment: int, visit: Visit, history: bytes, durable_lsn: int = 0
) -> JournalTail | None:
    """Visits every record from segment `first_segment` on, in order, and returns where the journal goes on.

    Removes the segments behind a torn end. Returns None if there is no segment.

    Args:
        first_segment: must exist, unless it is 0: then the first one that exists.
        visit: may raise CorruptionError for a record whose contents are bad: the journal ends before it.
        durable_lsn: known to be durable.

    Raises:
        CorruptionError: the journal is damaged; nothing was cut.
    """
    numbers = [number for number in list_segments(directory) if number >= first_segment]
    tail: JournalTail | None = None
    for index, number in enumerate(numbers):
        path = segment_path(directory, number)
        expected = numbers[index - 1] + 1 if index else first_segment or number
        if number != expected:
            raise CorruptionError(path, 0, f"segment {expected:016x} is missing before it")
        written = _was_written(path, number, tail, history)
        if tail is not None and not written:
            _cut(directory, numbers[index:], tail, durable_lsn, "the next segment was never written")
            return tail
        with closing(SegmentReader(path)) as reader:
            tail, problem = _replay_segment(reader, visit)
            if problem is not None:
                known = max(durable_lsn, _known_durable(reader, tail.location.offset))
                _cut(directory, numbers[index + 1 :], tail, known, problem)
                return tail
    return tail


def _was_written(path: str, number: int, before: JournalTail | None, history: bytes) -> bool:
    """Whether the segment follows; False if it was never written: the file is blank, or is that of its former use.

    Raises:
        CorruptionError: a header is damaged, or the first segment isn't the one of its name.
    """
    if before is not None and is_blank(path):
        return False
    with closing(SegmentReader(path)) as reader:
        header = reader.header
    if header.history != history:
        raise CorruptionError(path, 0, "a segment of another group's journal")
    if before is not None:  # `before.next_lsn` is the SEAL's
        return header.number == number and header.first_lsn == before.next_lsn + 1
    if header.number != number:
        raise CorruptionError(path, 0, f"holds segment {header.number:016x}: the disk lost a rename")
    return True


def _replay_segment(reader: SegmentReader, visit: Visit) -> tuple[JournalTail, str | None]:
    """Visits a segment's records. Returns where they end, and why they end there: None for a SEAL."""
    number, seed = reader.header.number, reader.header.seed
    lsn, offset = reader.header.first_lsn, DATA_OFFSET
    problem = "it ends without a SEAL"
    try:
        for at, record in reader.heads():
            if record.lsn != lsn:
                raise CorruptionError(reader.path, at, f"lsn {record.lsn}, expected {lsn}")
            if record.kind is RecordKind.SEAL:
                return JournalTail(Location(number, at), seed, lsn), None
            visit(reader, at, record)
            lsn, offset = lsn + 1, at + record.size_bytes
    except CorruptionError as error:
        problem = error.problem
    return JournalTail(Location(number, offset), seed, lsn), problem


def _known_durable(reader: SegmentReader, offset: int) -> int:
    """Up to which lsn the records behind `offset` say that all was durable."""
    return max((record.durable_lsn for record in reader.records_after(offset)), default=0)


def _cut(directory: str, numbers: list[int], tail: JournalTail, durable_lsn: int, problem: str) -> None:
    """Removes the segments behind a torn end, newest first, unless one of them shows that it is damage."""
    for number in numbers:
        path = segment_path(directory, number)
        if is_blank(path):
            continue
        with closing(SegmentReader(path)) as reader:
            if reader.header.number == number:  # else the disk lost a rename: it is of the file's former use
                durable_lsn = max(durable_lsn, _known_durable(reader, DATA_OFFSET - 1))
    where = segment_path(directory, tail.location.segment)
    if durable_lsn >= tail.next_lsn:
        what = f"record {tail.next_lsn} had been durable and can't be read ({problem})"
        raise CorruptionError(
            where,
            tail.location.offset,
            f"{what}: the disk lost or changed it; nothing was cut. "
            "Move the state directory away to begin anew with a full sync",
        )
    if numbers:
        problem = "segments behind it, which no fsync had waited for, are removed"
        log.warning("%s: the journal ends at record %d: %d %s", where, tail.next_lsn - 1, len(numbers), problem)
    for number in reversed(numbers):
        os.unlink(segment_path(directory, number))
