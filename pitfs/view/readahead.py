"""Cold data: what a sequential reader will want next is asked of the disk before it wants it.

The blocks of an image are strewn over objects, so the kernel's readahead below sees no sequence in them; read one
run after the other a disk has one request at a time. Asking is posix_fadvise(WILLNEED): it begins the reads and
doesn't wait for them. Blocks are asked for in the order in which they stand in the objects, gaps of up to GAP_BYTES
with them: fewer and larger requests. Over a disk that takes 1 ms for a request and has a readahead of 128 KiB that was
up to 1.6 times as fast; where a disk answers at once it makes no difference.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Final

import numpy as np

from pitfs.model.blockmap import U64Array
from pitfs.model.transfer import UNIT_BYTES
from pitfs.store.objects.format import HEADER_BYTES, UNIT_BITS, UNIT_MASK

# Asked for at once, and half of it again when half is read: a disk of 3 GB/s reads that much in 3 ms, which is
# more than what a request takes on its way; the pages may go again before they are read if memory is short.
AHEAD_BYTES: Final = 8 << 20
GAP_BYTES: Final = 16 << 10
LEAST_BYTES: Final = 64 << 10  # smaller reads aren't a readahead's, nor a copy's
NEAR_BYTES: Final = 4 << 20  # readahead's requests overtake each other, and go to several processes
NEVER: Final = 1 << 63  # a byte that no image has

Ranges = Iterator[tuple[int, int, int]]  # object number, byte in it, bytes


def ranges_of(pointers: U64Array, block_units: int) -> Ranges:
    """Where the blocks with those pointers (any order, zeros among them) stand: ascending, near ones together."""
    pointers = np.sort(pointers[pointers != 0])
    if not len(pointers):
        return
    breaks = np.flatnonzero(np.diff(pointers) > block_units + GAP_BYTES // UNIT_BYTES)
    firsts = pointers[np.concatenate([[0], breaks + 1])].tolist()
    lasts = pointers[np.concatenate([breaks, [len(pointers) - 1]])].tolist()
    for first, last in zip(firsts, lasts, strict=True):
        position = HEADER_BYTES + (first & UNIT_MASK) * UNIT_BYTES
        yield first >> UNIT_BITS, position, (last - first + block_units) * UNIT_BYTES


def ask(ranges: Ranges, open_object: Callable[[int], int]) -> bool:
    """Begins to read them; whether the last one isn't in the page cache yet."""
    is_cold = False
    for number, position, size in ranges:
        fd = open_object(number)  # held until it is asked: a descriptor that nobody holds is closed
        os.posix_fadvise(fd, position, size, os.POSIX_FADV_WILLNEED)
        is_cold = not _is_cached(fd, position + size - 1)
    return is_cold


def _is_cached(fd: int, position: int) -> bool:
    try:
        return os.preadv(fd, (bytearray(1),), position, os.RWF_NOWAIT) == 1
    except OSError:
        return False


class Sequence:
    """What one image's cold reads say of the next; used by several threads, at worst something is asked twice."""

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._last_end = -1  # of the last read that wasn't cached
        self._asked_end = 0
        self.ask_from = NEVER  # a read from here on isn't to be served inline: more is to be asked for

    def next(self, offset: int, size: int) -> tuple[int, int]:
        """Bytes [start, end) of the image to ask for, now that a read isn't cached, or has come to `ask_from`."""
        end = min(offset + size, self._size_bytes)
        is_near = self._last_end >= 0 and abs(offset - self._last_end) <= NEAR_BYTES
        follows = self.ask_from <= offset <= self._asked_end + NEAR_BYTES
        self._last_end = end
        if size < LEAST_BYTES or not (is_near or follows):
            self.stop()
            return offset, end
        until = min(end + AHEAD_BYTES, self._size_bytes)
        start = self._asked_end if offset < self._asked_end <= until else offset
        self._asked_end, self.ask_from = until, end + AHEAD_BYTES // 2 if until < self._size_bytes else NEVER
        return start, until

    def stop(self) -> None:
        """Nothing more is asked for until the next read that isn't cached."""
        self._asked_end, self.ask_from = 0, NEVER
