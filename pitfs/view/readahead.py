"""Readahead: the disk begins to read what a sequential reader will need next.

The blocks of an image are strewn over objects, so the kernel's readahead of the objects sees no sequence in them, and
a disk that is read run by run has one request at a time. A prefetch is posix_fadvise(WILLNEED), which begins the reads
and does not wait for them. Blocks are prefetched in the order in which they stand in the objects, gaps of up to
GAP_BYTES with them: fewer and larger requests. Over a disk that takes 1 ms for a request and has a readahead of
128 KiB this was up to 1.6 times as fast; where a disk answers at once it makes no difference.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Final

import numpy as np

from pitfs.model.blockmap import U64Array
from pitfs.store.objects.format import HEADER_BYTES, Layout
from pitfs.store.objects.pool import Descriptor

# Prefetched at once, and half of it again when half is read. A disk of 3 GB/s reads that much in 3 ms, longer than a
# request takes on its way. More pages could be dropped before they are read if memory is short.
AHEAD_BYTES: Final = 8 << 20
GAP_BYTES: Final = 16 << 10
LEAST_BYTES: Final = 64 << 10  # smaller reads come neither from the kernel's readahead nor from a copy
NEAR_BYTES: Final = 4 << 20  # the kernel's requests overtake each other, and go to several processes
NEVER: Final = 1 << 63  # an offset beyond any image

Ranges = Iterator[tuple[int, int, int]]  # object number, byte in it, bytes


def ranges_of(pointers: U64Array, block_units: int, layout: Layout) -> Ranges:
    """Where the blocks of these pointers (in any order, some 0) stand: ascending, near ones coalesced."""
    unit_bits, unit_mask, unit_bytes = layout.unit_bits, layout.max_units - 1, layout.unit_bytes
    pointers = np.sort(pointers[pointers != 0])
    if not len(pointers):
        return
    breaks = np.flatnonzero(np.diff(pointers) > block_units + GAP_BYTES // unit_bytes)
    firsts = pointers[np.concatenate([[0], breaks + 1])].tolist()
    lasts = pointers[np.concatenate([breaks, [len(pointers) - 1]])].tolist()
    for first, last in zip(firsts, lasts, strict=True):
        position = HEADER_BYTES + (first & unit_mask) * unit_bytes
        yield first >> unit_bits, position, (last - first + block_units) * unit_bytes


def prefetch(ranges: Ranges, open_object: Callable[[int], Descriptor]) -> bool:
    """Begins to read them; returns whether the last one was not in the page cache yet."""
    is_cold = False
    for number, position, size in ranges:
        fd = open_object(number)  # a name keeps it open: the pool closes a descriptor that nobody refers to
        position += fd.base
        os.posix_fadvise(fd, position, size, os.POSIX_FADV_WILLNEED)
        is_cold = not _is_cached(fd, position + size - 1)
    return is_cold


def _is_cached(fd: int, position: int) -> bool:
    try:
        return os.preadv(fd, (bytearray(1),), position, os.RWF_NOWAIT) == 1
    except OSError:
        return False


class Sequence:
    """Finds a sequence in one image's cold reads. Threads may share it: at worst a range is prefetched twice."""

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._last_end = -1  # of the last read that wasn't cached
        self._prefetched_end = 0
        self.prefetch_from = NEVER  # a read from here on is not served inline: it prefetches more

    def next(self, offset: int, size: int) -> tuple[int, int]:
        """Bytes [start, end) of the image to prefetch, for a read that is cold or has come to `prefetch_from`."""
        end = min(offset + size, self._size_bytes)
        is_near = self._last_end >= 0 and abs(offset - self._last_end) <= NEAR_BYTES
        follows = self.prefetch_from <= offset <= self._prefetched_end + NEAR_BYTES
        self._last_end = end
        if size < LEAST_BYTES or not (is_near or follows):
            self.stop()
            return offset, end
        until = min(end + AHEAD_BYTES, self._size_bytes)
        start = self._prefetched_end if offset < self._prefetched_end <= until else offset
        self._prefetched_end = until
        self.prefetch_from = end + AHEAD_BYTES // 2 if until < self._size_bytes else NEVER
        return start, until

    def stop(self) -> None:
        """Prefetches nothing more until the next cold read."""
        self._prefetched_end, self.prefetch_from = 0, NEVER
