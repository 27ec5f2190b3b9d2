"""Open intervals as readers see them: instants between the last snapshot and the last write that can be read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from pitfs.model.blockmap import FANOUT, FANOUT_BITS, U64Array
from pitfs.model.position import Position
from pitfs.store.catalog.catalog import Catalog
from pitfs.store.catalog.records import OpenInterval, Resolution, SortedRun
from pitfs.store.index.reader import ChunkCache, RowIndex
from pitfs.store.objects.cache import Cache
from pitfs.store.objects.format import ObjectKind
from pitfs.store.objects.pool import ObjectPool
from pitfs.store.open_interval.sorted_runs import open_run

MAX_CACHED_SPARSE_BYTES: Final = 4 << 20  # sparse indexes of runs: 40 bytes for 2048 rows, and for each run
_OVERHEAD_BYTES: Final = 1024


class OpenIntervals:
    """The open intervals of a store: the one that grows, and the one before it while that is being closed.

    Methods raise MissingObjectError where a WAL has been removed since: a snapshot took the place of its interval.

    Args:
        chunks: shared with the store's journals.
    """

    def __init__(self, catalog: Catalog, objects: ObjectPool, chunks: ChunkCache) -> None:
        self._catalog, self._objects, self._chunks = catalog, objects, chunks
        self._known: tuple[int, tuple[OpenInterval, ...]] = -1, ()
        self._indexes: Cache[tuple[int, int], RowIndex] = Cache(
            MAX_CACHED_SPARSE_BYTES, lambda index: index.sparse_index_bytes + _OVERHEAD_BYTES
        )

    def now(self) -> tuple[OpenInterval, ...]:
        """All that there are, oldest first."""
        version = self._catalog.data_version()
        known, before = self._known
        if known == version:
            return before
        intervals = self._catalog.open_intervals()
        for gone in {interval.id for interval in before} - {interval.id for interval in intervals}:
            self._objects.forget(ObjectKind.JOURNAL_BLOCKS, gone)  # else its WAL would take room for ever
        self._known = version, intervals
        return intervals

    def latest(self, intervals: Sequence[OpenInterval], after_seq: int) -> Resolution | None:
        """The newest state, if it is after the snapshot at `after_seq`."""
        for interval in reversed(intervals):
            if interval.runs and interval.to_seq > after_seq:
                return _resolution(interval, Position(interval.to_seq, interval.to_time_ns))
        return None

    def at_seq(self, intervals: Sequence[OpenInterval], after_seq: int, seq: int) -> Resolution | None:
        """The state after write `seq`, if it lies behind the snapshot at `after_seq` and can be read."""
        for interval in reversed(intervals):
            if after_seq <= interval.from_seq < seq <= interval.to_seq:
                run = [run for run in interval.runs if run.first_seq <= seq][-1]
                return _resolution(interval, self._index(run).position_at_seq(seq))
        return None

    def at_time(self, intervals: Sequence[OpenInterval], after_seq: int, time_ns: int) -> Resolution | None:
        """The newest state not after `time_ns`, if it lies behind the snapshot at `after_seq`."""
        for interval in reversed(intervals):
            runs = [run for run in interval.runs if run.first_time_ns <= time_ns]
            if interval.from_seq >= after_seq and runs:
                return _resolution(interval, self._index(runs[-1]).position_at_time(time_ns))
        return None

    def overlay(
        self, interval: OpenInterval, seq: int, volume: int, leaf_index: int, pointers: U64Array, checksums: U64Array
    ) -> None:
        """Puts what the interval's writes up to `seq` wrote into a leaf (figure 8: the journal comes before the
        base snapshot)."""
        start = leaf_index << FANOUT_BITS
        for run in interval.runs:
            if run.first_seq <= seq:
                blocks, newer, sums = self._index(run).range(volume, start, start + FANOUT, seq)
                pointers[blocks - start] = newer
                checksums[blocks - start] = sums

    def next_leaf(
        self, interval: OpenInterval, volume: int, first: int, after_seq: int, through_seq: int
    ) -> int | None:
        """Index of the first leaf, not before `first`, into which its writes (after_seq, through_seq] went."""
        start = first << FANOUT_BITS
        runs = (run for run in interval.runs if run.to_seq > after_seq and run.first_seq <= through_seq)
        found = (self._index(run).next_block(volume, start, after_seq, through_seq) for run in runs)
        return min((block >> FANOUT_BITS for block in found if block is not None), default=None)

    def _index(self, run: SortedRun) -> RowIndex:
        key = run.open_interval_id, run.sparse_index_offset
        return self._indexes.get(key, lambda: open_run(self._objects, run, self._chunks))


def _resolution(interval: OpenInterval, position: Position | None) -> Resolution | None:
    if position is None:
        return None
    return Resolution(
        position.seq, position.time_ns, "intermediary", 0, interval.base_snapshot_id, interval.end_snapshot_id
    )
