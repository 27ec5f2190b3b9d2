"""Where an image has data: found by the block map's tree and the journal, so that holes cost nothing.

A range is what may have other bytes than zeros: block by block, as the pointers say. A block of zeros that was
written, and is known to be zeros, has no pointer either. Ranges of a snapshot and of any instant are found alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pitfs.model.blockmap import FANOUT, I64Array, U64Array

if TYPE_CHECKING:
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

    What is empty isn't walked: the cost is that of the leaves (512 blocks each) that have data in [start, end).

    Args:
        start, end: bytes, any; `end` defaults to the image's, and is cut to it.
        leaf: pointers and checksums of a leaf by its index, where the caller keeps them; else the store is asked.

    Raises:
        CorruptionError: block map or journal aren't what was written.
        PitfsError: the disk refuses.
    """
    info = store.volumes[volume]
    end = info.size_bytes if end is None else min(end, info.size_bytes)
    return joined(_pieces(store, resolution, volume, max(start, 0), end, leaf))


def _pieces(
    store: Store,
    resolution: Resolution,
    volume: int,
    start: int,
    end: int,
    leaf: Callable[[int], tuple[U64Array, U64Array]] | None,
) -> Iterator[I64Array]:
    """The ranges of each leaf."""
    block_size = store.volumes[volume].block_size
    leaf_bytes = FANOUT * block_size
    index = store.next_leaf(resolution, volume, start // leaf_bytes) if start < end else None
    while index is not None and index * leaf_bytes < end:
        pointers, _ = leaf(index) if leaf is not None else store.leaf(resolution, volume, index)
        yield (runs(pointers != 0) * block_size + index * leaf_bytes).clip(start, end)
        index = store.next_leaf(resolution, volume, index + 1)


def runs(mask: npt.NDArray[np.bool_]) -> I64Array:
    """[start, end) of each run of true values, shape (n, 2), ascending."""
    return np.flatnonzero(np.diff(mask, prepend=False, append=False)).reshape(-1, 2)


def joined(pieces: Iterable[I64Array]) -> Iterator[tuple[int, int]]:
    """Ascending ranges, given in arrays of shape (n, 2), with those that touch made one and empty ones left out."""
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
