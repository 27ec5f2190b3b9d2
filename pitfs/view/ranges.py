"""Where an image has data: found by the block map's tree and the journal, so that holes cost nothing.

A range is what may have other bytes than zeros: block by block, as the pointers say. A block of zeros that was
written, and is known to be zeros, has no pointer either. Ranges of a snapshot and of any instant are found alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from pitfs.model.blockmap import FANOUT, U64Array

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
    leaf_bytes = FANOUT * info.block_size
    range_start = range_end = max(start, 0)
    index = store.next_leaf(resolution, volume, range_start // leaf_bytes) if range_start < end else None
    while index is not None and index * leaf_bytes < end:
        pointers, _ = leaf(index) if leaf is not None else store.leaf(resolution, volume, index)
        edges = np.flatnonzero(np.diff(pointers != 0, prepend=False, append=False)) * info.block_size
        for a, b in (edges.reshape(-1, 2) + index * leaf_bytes).clip(max(start, 0), end).tolist():
            if a != range_end:
                if range_start < range_end:
                    yield range_start, range_end
                range_start = a
            range_end = b
        index = store.next_leaf(resolution, volume, index + 1)
    if range_start < range_end:
        yield range_start, range_end
