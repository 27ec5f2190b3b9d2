"""Where two instants of a volume differ: exactly, block by block.

    next leaf in which they may differ -> both tables of it -> pointers equal: the same
                                                            -> checksums differ: different
                                                            -> else both blocks are read: equal bytes, or not

Unequal checksums prove that blocks differ; equal ones never prove that they are the same. So blocks are read only
where the same content was written twice. The cost grows with what differs and with what was written in the intervals
that the two instants lie in, not with the volume's size or the history between them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from pitfs.model.blockmap import FANOUT, U64Array
from pitfs.store.store import Resolution, Store
from pitfs.view.ranges import cut, joined, runs
from pitfs.view.view import MAX_REQUEST_BYTES, PointInTimeView, ReadBuffer, TableCache

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class DifferingLeaf:
    """Blocks [first, first + 512) of a volume, some of which differ.

    Attributes:
        differs: bool[512].
        to_zeros: bool[512], known to be zeros at the second instant.
        from_checksums, to_checksums: uint64[512] at the two instants; of zeros too.
    """

    first: int
    differs: BoolArray
    to_zeros: BoolArray
    from_checksums: U64Array
    to_checksums: U64Array


class Difference:
    """What differs between two instants of a volume.

    Args:
        from_state, to_state: of the store; either may be the earlier one.
        volume: its index.

    Attributes:
        views: of the two, for reading where they differ.
    """

    def __init__(self, store: Store, from_state: Resolution, to_state: Resolution, volume: int) -> None:
        info = store.volumes[volume]
        self.block_size: int = info.block_size
        self.size_bytes: int = info.size_bytes
        self._store, self._volume = store, volume
        self._states = from_state, to_state
        tables = TableCache(max_bytes=0)  # it keeps a few all the same, and leaves come one after the other
        self.views = tuple(PointInTimeView(store, state, volume, tables) for state in self._states)
        self._zeros = np.uint64(xxh3_64_intdigest(bytes(info.block_size)))

    def leaves(self) -> Iterator[DifferingLeaf]:
        """All leaves with blocks that differ, ascending.

        Raises:
            CorruptionError: block map, journal, or a block that had to be read, is damaged.
            PitfsError: the disk refuses.
        """
        buffers = ReadBuffer(), ReadBuffer()
        index = self._store.next_difference(*self._states, self._volume, 0)
        while index is not None:
            tables = [self._store.leaf(state, self._volume, index) for state in self._states]
            one, other = (np.where(pointers == 0, self._zeros, sums) for pointers, sums in tables)
            is_elsewhere, same_sum = tables[0][0] != tables[1][0], one == other
            differs = is_elsewhere & ~same_sum
            for start, end in runs(is_elsewhere & same_sum).tolist():  # only their bytes can tell
                differs[start:end] = self._read_and_compare(index * FANOUT + start, end - start, buffers)
            if differs.any():
                yield DifferingLeaf(index * FANOUT, differs, tables[1][0] == 0, one, other)
            index = self._store.next_difference(*self._states, self._volume, index + 1)

    def ranges(self, leaves: Iterable[DifferingLeaf]) -> Iterator[tuple[int, int]]:
        """Byte ranges [start, end) that differ in these, ascending, coalesced; whole blocks up to the image's end."""
        return joined(((runs(leaf.differs) + leaf.first) * self.block_size).clip(0, self.size_bytes) for leaf in leaves)

    def _read_and_compare(self, first: int, count: int, buffers: tuple[ReadBuffer, ReadBuffer]) -> BoolArray:
        """Whether each of the blocks differs, by their bytes."""
        differs = np.ones(count, np.bool_)
        for start, end in cut(0, count, MAX_REQUEST_BYTES // self.block_size):
            offset, size = (first + start) * self.block_size, (end - start) * self.block_size
            both = (view.read(offset, size, buffer) for view, buffer in zip(self.views, buffers, strict=True))
            one, other = (np.frombuffer(data, np.uint8) for data in both)
            differs[start:end] = np.logical_or.reduceat(one != other, np.arange(0, len(one), self.block_size))
        return differs


def bitmap(leaf: DifferingLeaf) -> bytes:
    """A leaf's blocks as 64 bytes: bit i % 8 (1 << i % 8) of byte i // 8 is that of block `first` + i."""
    return np.packbits(leaf.differs, bitorder="little").tobytes()
