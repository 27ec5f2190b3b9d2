"""The contents of an interval that is closed: each is copied from the WAL once, however often it came (figure 9).

Contents with equal checksums are proposed as equal, and their bytes decide (invariant 6). A bounded table remembers
where contents with a checksum are stored. If a content isn't in it any more, it is stored once more: that takes room,
nothing else.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Final

import numpy as np

from pitfs.errors import CorruptionError
from pitfs.model.blockmap import U64Array
from pitfs.storage.files import write_all
from pitfs.store.objects.format import HEADER_BYTES, ObjectName, ObjectRecord
from pitfs.store.objects.pool import ObjectPool
from pitfs.store.transfer.sections import checksums_of
from pitfs.store.transfer.writable_store import WritableStore

log = logging.getLogger(__name__)

PART_BYTES: Final = 1 << 20  # contents in memory at once, and one block
WAYS: Final = 16  # half of them are used where the table is as large as it wants to be
MAX_BUCKETS: Final = 1 << 16  # 18 MiB: half a million contents, as many as an interval of the shipper has rows


class StoredContents:
    """Where contents are stored, by checksum and size; as many as fit.

    A checksum says which bucket of WAYS slots it is in. A bucket that is full takes no more.
    """

    def __init__(self, row_count: int) -> None:
        bits = min(max(4, (2 * row_count // WAYS).bit_length()), MAX_BUCKETS.bit_length() - 1)
        self._shift = np.uint64(64 - bits)
        self._used = np.zeros(1 << bits, np.int64)
        self._checksums, self._pointers = np.zeros((2, 1 << bits, WAYS), "<u8")
        self._units = np.zeros((1 << bits, WAYS), np.uint16)

    def find(self, checksums: U64Array, units: U64Array) -> U64Array:
        """Pointers to contents that have these checksums and sizes, 0 where none is known."""
        bucket = checksums >> self._shift
        fits = (self._checksums[bucket] == checksums[:, None]) & (self._units[bucket] == units[:, None])
        found: U64Array = np.where(fits.any(axis=1), self._pointers[bucket, fits.argmax(axis=1)], 0)
        return found

    def add(self, checksums: U64Array, units: U64Array, pointers: U64Array) -> None:
        """Remembers these, whose checksums differ, as far as there is room."""
        order = np.argsort(checksums)
        bucket = checksums[order] >> self._shift
        way = self._used[bucket] + np.arange(len(bucket)) - np.searchsorted(bucket, bucket)
        fits = way < WAYS
        place, order = (bucket[fits], way[fits]), order[fits]
        self._checksums[place], self._units[place], self._pointers[place] = (
            checksums[order], units[order], pointers[order],
        )  # fmt: skip
        np.maximum.at(self._used, place[0], place[1] + 1)


class ContentReader:
    """Reads contents by their pointers, in bounded parts.

    Args:
        fds: by number, of objects that aren't in the pool.

    Attributes:
        layout: of the store.
    """

    def __init__(self, fds: Mapping[int, int], objects: ObjectPool) -> None:
        self._fds, self._objects, self.layout = fds, objects, objects.layout
        self._buffers = [memoryview(bytearray(PART_BYTES + (1 << 16))) for _ in range(3)]

    def parts(self, pointers: U64Array, units: U64Array, buffer: int = 0) -> Iterator[tuple[slice, memoryview]]:
        """Stretches of these blocks, of so many units each, with their contents; good until the next one is taken.

        Raises:
            CorruptionError: an object ends before that.
            OSError: the disk refuses.
        """
        group = (np.cumsum(units) - 1) // (PART_BYTES // self.layout.unit_bytes)
        cuts = [0, *(np.flatnonzero(group[1:] != group[:-1]) + 1).tolist(), len(pointers)]
        for first, end in itertools.pairwise(cuts):
            if first < end:
                yield slice(first, end), self._read(pointers[first:end], units[first:end], self._buffers[buffer])

    def _read(self, pointers: U64Array, units: U64Array, buffer: memoryview) -> memoryview:
        """The contents, with one read for those that follow each other in an object."""
        follows = pointers[1:] == pointers[:-1] + units[:-1]
        firsts = np.concatenate([[0], np.flatnonzero(~follows) + 1])
        ends = (np.cumsum(np.add.reduceat(units, firsts)) * self.layout.unit_bytes).tolist()
        used = 0
        for pointer, end in zip(pointers[firsts].tolist(), ends, strict=True):
            number, offset = self.layout.object_of(pointer), self.layout.offset_of(pointer)
            fd = self._fds.get(number)
            if fd is None:
                fd = hosted = self._objects.fd(number)
                offset += hosted.base
            while used < end:
                count = os.preadv(fd, (buffer[used:end],), offset)
                if not count:
                    path = self._objects.place(ObjectName.of_number(number), 0)[0]
                    raise CorruptionError(path, offset, "it ends inside a content")
                used, offset = used + count, offset + count
        return buffer[:used]

    def confirmed(self, pointers: U64Array, proposed: U64Array, units: U64Array) -> U64Array:
        """The proposed pointers that lead to the same bytes as `pointers`, else 0. Raises as `parts`."""
        found, places = np.zeros(len(pointers), "<u8"), np.flatnonzero(proposed)
        ours, theirs, units = pointers[places], proposed[places], units[places]
        for (part, one), (_, other) in zip(self.parts(ours, units), self.parts(theirs, units, 1), strict=True):
            differs = np.frombuffer(one, "<u8") != np.frombuffer(other, "<u8")
            starts = (np.cumsum(units[part]) - units[part]).astype(np.intp) * (self.layout.unit_bytes // 8)
            same = ~np.logical_or.reduceat(differs, starts)
            found[places[part]] = np.where(same, theirs[part], 0)
        return found


class ContentWriter:
    """A contents object that is filled from the WAL. Each content is compared with its checksum when it is copied.

    What doesn't match is damage that no copy mends: it is copied as it is, so that whoever reads that block gets an
    error, and all others stay readable.
    """

    def __init__(self, fd: int, name: ObjectName, reader: ContentReader) -> None:
        self._fd, self._name, self._reader, self._layout = fd, name, reader, reader.layout
        self._units = 0
        self._damaged = 0

    def add(self, pointers: U64Array, units: U64Array, checksums: U64Array) -> U64Array:
        """Copies the blocks at these pointers; returns pointers to the copies. Raises as `ContentReader.parts`."""
        first, unit_bytes = self._layout.pointer(self._name, self._units), self._layout.unit_bytes
        found: U64Array = np.uint64(first) + np.cumsum(units, dtype="<u8") - units
        for part, data in self._reader.parts(pointers, units):
            sizes = units[part].astype("<i8") * unit_bytes
            self._damaged += int((checksums_of(data, sizes) != checksums[part]).sum())
            write_all(self._fd, data, HEADER_BYTES + self._units * unit_bytes)
            self._units += len(data) // unit_bytes
        return found

    def finish(self, store: WritableStore) -> list[ObjectRecord]:
        """The object, durable; none if nothing is in it."""
        if self._damaged:
            problem = "contents of the log don't match their checksums: reading them gives an error"
            log.error("%s: %d %s", self._name.file, self._damaged, problem)
        return [store.complete(self._fd, self._name, self._units * self._layout.unit_bytes)] if self._units else []


class Deduplication:
    """Stores contents, unless they are stored. Methods raise as `ContentReader.parts`."""

    def __init__(self, reader: ContentReader, row_count: int) -> None:
        self._reader, self._stored = reader, StoredContents(row_count)

    def store(self, pointers: U64Array, units: U64Array, checksums: U64Array, writer: ContentWriter) -> U64Array:
        """Pointers to where these blocks of the WAL are stored: in `writer` unless they were before."""
        found = self._known(pointers, units, checksums)
        new = np.flatnonzero(found == 0)
        _, places = np.unique(checksums[new], return_index=True)
        firsts = np.sort(new[places])
        found[firsts] = writer.add(pointers[firsts], units[firsts], checksums[firsts])
        self._stored.add(checksums[firsts], units[firsts], found[firsts])
        again = np.setdiff1d(new, firsts)
        found[again] = self._known(pointers[again], units[again], checksums[again])
        left = again[found[again] == 0]
        found[left] = writer.add(pointers[left], units[left], checksums[left])
        return found

    def _known(self, pointers: U64Array, units: U64Array, checksums: U64Array) -> U64Array:
        return self._reader.confirmed(pointers, self._stored.find(checksums, units), units)
