"""Where the blocks of an image are (figure 8): in a snapshot's block map, under what intervals wrote over it.

A state is layers. Undermost is a snapshot, whose map has every block. Over it lie the writes of the interval in which
the state is, up to the state; they are in a difference journal, or in sorted runs while the interval is open. Between
the two there is a whole open interval where one has been closed and its snapshot is still being made.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from pitfs.errors import CorruptionError
from pitfs.model.blockmap import BlockMap, U64Array
from pitfs.model.transfer import VolumeInfo
from pitfs.store.catalog.catalog import Catalog
from pitfs.store.catalog.records import OpenInterval, Resolution
from pitfs.store.index.maps import block_maps, node_loader
from pitfs.store.index.reader import JournalIndex, Journals, WrittenRows, chunk_cache, next_leaf
from pitfs.store.objects.pool import ObjectPool, again_if_replaced
from pitfs.store.open_interval.reader import OpenIntervals, WrittenBlocks

MAX_CACHED_MAPS: Final = 256  # snapshots whose roots are kept


class Blocks:
    """Look-ups of blocks, by leaves of the block map: 512 blocks each.

    Methods raise CorruptionError where a block map or a journal isn't what was written.

    Attributes:
        journals, open_intervals: of the store; they share a cache of chunks.
    """

    def __init__(self, catalog: Catalog, objects: ObjectPool, volumes: Sequence[VolumeInfo]) -> None:
        self._catalog, self._volumes, chunks = catalog, volumes, chunk_cache()
        self.journals = Journals(catalog, objects, chunks)
        self.open_intervals = OpenIntervals(catalog, objects, chunks)
        self._load_node = node_loader(objects)
        self._maps_of = lru_cache(MAX_CACHED_MAPS)(self._read_maps)

    @again_if_replaced
    def leaf(self, resolution: Resolution, volume: int, leaf_index: int) -> tuple[U64Array, U64Array]:
        """Where blocks [leaf_index * 512, + 512) of a volume are in that state.

        Returns:
            pointers uint64[512] (0: zeros) and checksums uint64[512], the caller's own.
        """
        now = self.open_intervals.now()  # first: open intervals become intervals, not the reverse
        base, over = _layers(now, resolution)
        pointers, checksums = self._maps_of(base)[volume].leaf(leaf_index).copy()
        for end_snapshot_id, seq in reversed(over.items()):
            self._written(now, end_snapshot_id).overlay(seq, volume, leaf_index, pointers, checksums)
        return pointers, checksums

    @again_if_replaced
    def next_leaf(self, resolution: Resolution, volume: int, first: int, end: int) -> int | None:
        """Index of the first leaf in [first, end) that may have other than zeros in that state; None if there is none.

        Takes no longer where there is nothing for TiB: whoever walks an image asks this, not each leaf.
        """
        now = self.open_intervals.now()
        base, over = _layers(now, resolution)
        in_map = self._maps_of(base)[volume].next_leaf(first)
        written = [rows for each, seq in over.items() for rows in self._written(now, each).written(-1, seq)]
        found = next_leaf(written, volume, first, end if in_map is None else min(in_map, end))
        return found if found < end else None

    @again_if_replaced
    def next_difference(self, one: Resolution, other: Resolution, volume: int, first: int) -> int | None:
        """Index of the first leaf, not before `first`, in which two states may differ.

        A leaf may differ if the maps of the two base snapshots differ there, or if one state has writes over its base
        that the other doesn't have. The maps are compared from their roots down without what they share, so neither
        the volume's size nor the history between the two counts. Of an interval that lies over both bases only the
        writes between the two states count; of one that lies over one base, all writes up to the state.
        """
        now = self.open_intervals.now()
        (base, over), (other_base, other_over) = _layers(now, one), _layers(now, other)
        written: list[WrittenRows] = []
        for end_snapshot_id in over.keys() | other_over.keys():
            after, through = sorted((over.get(end_snapshot_id, -1), other_over.get(end_snapshot_id, -1)))
            if after != through:
                written += self._written(now, end_snapshot_id).written(after, through)
        maps = self._maps_of(base)[volume], self._maps_of(other_base)[volume]
        in_maps, end = maps[0].next_difference(maps[1], first), maps[0].leaf_count
        found = next_leaf(written, volume, first, end if in_maps is None else in_maps)
        return found if found < end else None

    def _written(self, now: Sequence[OpenInterval], end_snapshot_id: int) -> JournalIndex | WrittenBlocks:
        """What was written in the interval that ends at a snapshot."""
        interval = _ending_at(now, end_snapshot_id)
        return self.journals.ending_at(end_snapshot_id) if interval is None else self.open_intervals.written(interval)

    def _read_maps(self, snapshot_id: int) -> list[BlockMap]:
        roots = self._catalog.roots(snapshot_id)
        if len(roots) != len(self._volumes):
            what = f"snapshot {snapshot_id} doesn't have a root for each volume"
            raise CorruptionError(self._catalog.path, 0, what)
        return block_maps(self._load_node, roots, self._volumes)


def _layers(now: Sequence[OpenInterval], resolution: Resolution) -> tuple[int, dict[int, int]]:
    """Id of the snapshot that a state stands on, and the intervals over it, the uppermost first.

    An interval is given by the id of its end snapshot, and by the last of its writes that the state has.
    """
    over = {} if resolution.end_snapshot_id is None else {resolution.end_snapshot_id: resolution.seq}
    base = resolution.base_snapshot_id
    while (closed := _ending_at(now, base)) is not None:
        over[base] = closed.to_seq
        base = closed.base_snapshot_id
    return base, over


def _ending_at(now: Sequence[OpenInterval], snapshot_id: int) -> OpenInterval | None:
    """The open interval of which that snapshot will be made."""
    for each in now:
        if each.end_snapshot_id == snapshot_id:
            return each
    return None
