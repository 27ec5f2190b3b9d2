"""Reading the local journal after a stop: the chain of segments, its tail, tears and damage.

What stands behind the first record that can't be read is a tear if no fsync had returned for it: it is cut.
It is damage if that record had been durable, which three things can tell: the last checkpoint, any later
record (each says what was durable when it was written), and a segment's header, which is synced with the first
record behind it and so may be missing or of the file's former use, but never half.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass

from pitfs.errors import CorruptionError
from pitfs.journal.writer import Location, journal_path
from pitfs.model.record import Record, RecordKind
from pitfs.storage.segment import DATA_OFFSET, SegmentReader, is_blank, list_segments

log = logging.getLogger(__name__)

Visit = Callable[[SegmentReader, int, Record], None]


@dataclass(frozen=True, slots=True)
class JournalTail:
    """Where the journal goes on: behind its last verifiable record, or in the place of a SEAL."""

    location: Location
    seed: int
    next_lsn: int


def replay(
    directory: str, first_segment: int, visit: Visit, history: bytes, durable_lsn: int = 0
) -> JournalTail | None:
    """Visits every record from segment `first_segment` on, in order, and finds the tail.

    `visit` may raise CorruptionError for a record whose contents aren't right; that counts as its end.
    Segments behind a tear are removed. Returns None if there is no segment.

    Args:
        first_segment: must be there, unless it is 0.
        durable_lsn: known to be durable.

    Raises:
        CorruptionError: a record that had been durable can't be read: damage, nothing is cut.
    """
    numbers = [number for number in list_segments(directory) if number >= first_segment]
    tail: JournalTail | None = None
    for index, number in enumerate(numbers):
        path = journal_path(directory, number)
        expected = numbers[index - 1] + 1 if index else first_segment or number
        if number != expected:
            raise CorruptionError(path, 0, f"segment {expected:016x} is missing before it")
        reader = _open_next(path, tail, history)
        if reader is None:
            assert tail is not None
            _cut(directory, numbers[index:], tail, durable_lsn, "the next segment was never written")
            return tail
        try:
            tail, problem = _replay_segment(reader, visit)
            if problem is not None:
                known = max(durable_lsn, _known_durable(reader, tail.location.offset))
                _cut(directory, numbers[index + 1 :], tail, known, problem)
                return tail
        finally:
            reader.close()
    # The last segment was sealed and its successor never reached the disk: on in place of the SEAL.
    return tail


def _open_next(path: str, before: JournalTail | None, history: bytes) -> SegmentReader | None:
    """The segment that follows; None if what the file holds isn't it yet: blank, or of its former use.

    Raises:
        CorruptionError: the first one isn't what its name says, or a header is damaged.
    """
    if before is not None and is_blank(path):
        return None
    reader = SegmentReader(path)
    if reader.header.history != history:
        reader.close()
        raise CorruptionError(path, 0, "a segment of another group's journal")
    # In place of the SEAL is the tail, and the SEAL takes an lsn.
    follows = before is None or reader.header.first_lsn == before.next_lsn + 1
    if reader.is_as_named and follows:
        return reader
    reader.close()
    if before is None:
        raise CorruptionError(path, 0, f"holds segment {reader.header.number:016x}: the disk lost a rename")
    return None


def _replay_segment(reader: SegmentReader, visit: Visit) -> tuple[JournalTail, str | None]:
    """Visits its records; the tail, and why it ends there, None behind a SEAL."""
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
    """The last record that records behind `offset` say was durable."""
    return max((record.durable_lsn for record in reader.records_after(offset)), default=0)


def _cut(directory: str, numbers: list[int], tail: JournalTail, durable_lsn: int, problem: str) -> None:
    """Removes the segments behind a tear, newest first, unless anything shows that it is damage."""
    where = journal_path(directory, tail.location.segment)
    for number in numbers:
        path = journal_path(directory, number)
        if is_blank(path):
            continue
        reader = SegmentReader(path)
        try:
            if reader.is_as_named:
                durable_lsn = max(durable_lsn, _known_durable(reader, DATA_OFFSET - 1))
        finally:
            reader.close()
    if durable_lsn >= tail.next_lsn:
        raise CorruptionError(
            where,
            tail.location.offset,
            f"record {tail.next_lsn} had been durable and can't be read ({problem}): the disk lost or changed it; "
            "nothing was cut. Move the state directory away to begin anew with a full copy",
        )
    if numbers:
        log.warning(
            "%s: the journal ends at record %d: %d segments behind it, which no fsync had waited for, are removed",
            where, tail.next_lsn - 1, len(numbers),
        )  # fmt: skip
    for number in reversed(numbers):
        os.unlink(journal_path(directory, number))
