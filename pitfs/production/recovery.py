"""Reading the local journal after a stop: the chain of segments, its tail, tears and damage."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from pitfs.errors import CorruptionError
from pitfs.model.record import Kind, Record
from pitfs.production.journal import Location
from pitfs.storage.segment import DATA_OFFSET, SegmentReader, list_segments, segment_name

Visit = Callable[[SegmentReader, int, Record], None]


@dataclass(frozen=True, slots=True)
class Tail:
    """Where the journal goes on: behind its last verifiable record."""

    location: Location
    seed: int
    next_lsn: int
    torn: bool  # something unverifiable stood behind it and was cut


def replay(directory: str, first_segment: int, visit: Visit, history: bytes) -> Tail | None:
    """Visits every record from segment `first_segment` on, in order, and finds the tail.

    `visit` may raise CorruptionError for a record whose contents aren't right; that counts as its end.
    What stands behind a tear was never promised to anybody (no fsync had returned for it), and is cut:
    segments behind it are removed. Returns None if there is no segment.

    Raises:
        CorruptionError: a record that had been durable can't be read: damage, nothing is cut.
    """
    numbers = [number for number in list_segments(directory) if number >= first_segment]
    tail: Tail | None = None
    for index, number in enumerate(numbers):
        path = os.path.join(directory, segment_name(number))
        if tail is not None and number != numbers[index - 1] + 1:
            raise CorruptionError(path, 0, f"segment {number - 1:016x} is missing before it")
        try:
            reader = SegmentReader(path)
            if reader.header.history != history:
                reader.close()
                raise CorruptionError(path, 0, "a segment of another group's journal")
        except CorruptionError as error:
            if tail is None:
                raise
            _cut(directory, numbers[index:], tail.next_lsn, error)
            return Tail(tail.location, tail.seed, tail.next_lsn, torn=True)
        try:
            tail, sealed, problem = _replay_segment(reader, tail, visit)
            if sealed:
                continue
            _refuse_damage(reader, tail, problem)
        finally:
            reader.close()
        _cut(directory, numbers[index + 1 :], tail.next_lsn, problem)
        return tail
    if tail is None:
        return None
    # The last segment was sealed and its successor never reached the disk: go on in place of the SEAL.
    return Tail(tail.location, tail.seed, tail.next_lsn - 1, torn=True)


def _replay_segment(
    reader: SegmentReader, before: Tail | None, visit: Visit
) -> tuple[Tail, bool, CorruptionError | None]:
    lsn = reader.header.first_lsn
    offset = DATA_OFFSET
    if before is not None and lsn != before.next_lsn:
        error = CorruptionError(reader.path, 0, f"begins with lsn {lsn}, expected {before.next_lsn}")
        return before, False, error
    try:
        for at, record in reader.heads():
            if record.lsn != lsn:
                raise CorruptionError(reader.path, at, f"lsn {record.lsn}, expected {lsn}")
            visit(reader, at, record)
            lsn, offset = lsn + 1, at + record.size_bytes
            if record.kind is Kind.SEAL:
                return Tail(Location(reader.header.number, at), reader.header.seed, lsn, False), True, None
    except CorruptionError as error:
        torn = any(os.pread(reader.fd, 4, offset))
        return Tail(Location(reader.header.number, offset), reader.header.seed, lsn, torn), False, error
    return Tail(Location(reader.header.number, offset), reader.header.seed, lsn, False), False, None


def _refuse_damage(reader: SegmentReader, tail: Tail, error: CorruptionError | None) -> None:
    later = reader.find_record_after(tail.location.offset)
    if later is not None and later.durable_lsn >= tail.next_lsn:
        raise CorruptionError(
            reader.path,
            tail.location.offset,
            f"record {tail.next_lsn} had been durable and can't be read ({error.problem if error else 'cut short'}): "
            "the disk lost or changed it; nothing was cut. Move the state directory away to begin anew "
            "with a full copy",
        )


def _cut(directory: str, numbers: list[int], next_lsn: int, error: CorruptionError | None) -> None:
    """Removes segments behind a tear, newest first, unless one of them shows that it is damage."""
    for number in numbers:
        path = os.path.join(directory, segment_name(number))
        try:
            reader = SegmentReader(path)
        except CorruptionError:
            continue
        try:
            record = reader.find_record_after(DATA_OFFSET - 1)
        finally:
            reader.close()
        if record is not None and record.durable_lsn >= next_lsn:
            raise CorruptionError(
                error.what if error else path,
                error.offset if error else 0,
                f"record {next_lsn} had been durable and can't be read; nothing was cut",
            )
    for number in reversed(numbers):
        os.unlink(os.path.join(directory, segment_name(number)))
