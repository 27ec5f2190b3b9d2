"""Where an image has data, found by the block map's tree and the journal, so that holes cost nothing.

A range is what may have other bytes than zeros: block by block, as the pointers say. A block of zeros that was
written, and is known to be zeros, has no pointer either. Ranges of a snapshot and of any instant are found alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import numpy.typing as npt

from pitfs.model.blockmap import FANOUT, I64Array, U64Array
from pitfs.store.store import Resolution, Store


def data_ranges(
    store: Store,
    resolution: Resolution,
    volume: int,
    start: int = 0,
    end: int | None = None,
    leaf: Callable[[int], tuple[U64Array, U64Array]] | None = None,
) -> Iterator[tuple[int, int]]:
    """Byte ranges [a, b) within [start, end) of the image that aren't known to be zeros, ascending, coalesced.

    Empty leaves are skipped: the cost is that of the leaves (512 blocks each) that have data in [start, end).

    Args:
        start, end: bytes, any; `end` is the image's end unless given, and at most that.
        leaf: gives the pointers and checksums of a leaf by its index, from the caller's cache; default: the store.

    Raises:
        CorruptionError: block map or journal aren't what was written.
        PitfsError: the disk refuses.
    """
    info = store.volumes[volume]
    low, high = max(start, 0), info.size_bytes if end is None else min(end, info.size_bytes)
    leaf_bytes = FANOUT * info.block_size

    def ranges_of_leaves() -> Iterator[I64Array]:
        index = store.next_leaf(resolution, volume, low // leaf_bytes) if low < high else None
        while index is not None and index * leaf_bytes < high:
            pointers, _ = leaf(index) if leaf is not None else store.leaf(resolution, volume, index)
            yield (runs(pointers != 0) * info.block_size + index * leaf_bytes).clip(low, high)
            index = store.next_leaf(resolution, volume, index + 1)

    return joined(ranges_of_leaves())


def runs(mask: npt.NDArray[np.bool_]) -> I64Array:
    """[start, end) of each run of true values, shape (n, 2), ascending."""
    return np.flatnonzero(np.diff(mask, prepend=False, append=False)).reshape(-1, 2)


def joined(pieces: Iterable[I64Array]) -> Iterator[tuple[int, int]]:
    """Coalesces ascending ranges, given in arrays of shape (n, 2); empty ones are left out."""
    start = end = 0
    for piece in pieces:
        for a, b in piece.tolist():
            if a != end:
                if start < end:
                    yield start, end
                start = a
            end = b
    if start < end:
        yield start, end


def cut(start: int, end: int, step: int) -> Iterator[tuple[int, int]]:
    """[start, end) in pieces that end at multiples of `step`."""
    while start < end:
        middle = min(end, start - start % step + step)
        yield start, middle
        start = middle
