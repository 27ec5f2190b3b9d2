"""Where a place is in the local journal: a binary search over its segments, then the records of one of them.

Of the records, WRITE, MARK and COPY_START have a *key*, which rises from each to the next: (seq, 0) of a WRITE, (seq,
mark) of the others. The first key of a segment says whether a place lies before it. So a journal of any length costs
some reads of 256 KiB, and needs no index on disk.
"""

from __future__ import annotations

import enum
from contextlib import closing, suppress

from pitfs.errors import CorruptionError
from pitfs.journal.writer import Location
from pitfs.model.record import CopyStart, Mark, Record, RecordKind
from pitfs.storage.segment import DATA_OFFSET, SegmentReader, list_segments, segment_error, segment_path

Key = tuple[int, int]


class Found(enum.Enum):
    """What became of a search: the record is there; the journal begins behind it; it was never there."""

    THERE = enum.auto()
    ERASED = enum.auto()
    NEVER = enum.auto()


def key_of(record: Record) -> Key | None:
    """The key of a WRITE, MARK or COPY_START; None for other records."""
    if record.kind is RecordKind.WRITE:
        return record.seq, 0
    message = record.message
    return (record.seq, message.mark) if isinstance(message, Mark | CopyStart) else None


class SegmentSearch:
    """Searches the segments that there were when it was made.

    Args:
        until: where the journal ended then.
    """

    def __init__(self, directory: str, until: Location) -> None:
        self._directory, self._until = directory, until
        self._numbers = [number for number in list_segments(directory) if number <= until.segment]
        self._first_keys: dict[int, Key | None] = {}

    def segment_of(self, key: Key) -> int | None:
        """The segment that has the record of that key, if there is one; None where the journal begins behind it.

        A segment that is damaged, or has no key, isn't looked at: then it may be one of those behind the answer.

        Raises PitfsError where this process lacks memory, descriptors or rights.
        """
        low, high = 0, len(self._numbers)
        while low < high:
            at = middle = (low + high) // 2
            while (first := self._first_key(at)) is None and at > low:
                at -= 1
            if first is not None and first > key:
                high = at
            else:
                low = middle + 1
        while low > 1 and self._first_key(low - 1) is None:
            low -= 1
        return self._numbers[low - 1] if low else None

    def _first_key(self, index: int) -> Key | None:
        number = self._numbers[index]
        if number not in self._first_keys:
            self._first_keys[number] = None
            with suppress(CorruptionError):
                self._first_keys[number] = _read_first_key(self._directory, number, self._until)
        return self._first_keys[number]


def last_seq_before(directory: str, number: int, until: Location) -> int:
    """The seq of the last write before a segment; 0 where the segment doesn't tell.

    Raises PitfsError where this process lacks memory, descriptors or rights.
    """
    with suppress(CorruptionError):
        key = _read_first_key(directory, number, until)
        if key is not None:
            return key[0] if key[1] else key[0] - 1
    return 0


def _read_first_key(directory: str, number: int, until: Location) -> Key | None:
    path = segment_path(directory, number)
    end = until.offset if number == until.segment else None
    try:
        with closing(SegmentReader(path)) as reader:
            if reader.header.number != number:  # recycled as it was opened
                return None
            keys = (key_of(record) for _, record in reader.heads(DATA_OFFSET, end))
            return next((key for key in keys if key is not None), None)
    except OSError as error:
        raise segment_error(error, path, 0) from error
