"""Open intervals as readers see them: instants between the last snapshot and the last readable write."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pitfs.model.blockmap import U64Array
from pitfs.model.position import Position
from pitfs.store.catalog.catalog import Catalog
from pitfs.store.catalog.records import OpenInterval, Resolution, SortedRun
from pitfs.store.index.reader import Cache, ChunkCache, RowIndex, WrittenRows, index_cache
from pitfs.store.objects.format import ObjectKind, ObjectName
from pitfs.store.objects.pool import ObjectPool
from pitfs.store.open_interval.sorted_runs import open_run


class WrittenBlocks:
    """What an open interval's sorted runs have; an open interval's counterpart of a difference journal."""

    def __init__(self, runs: Sequence[SortedRun], index_of: Callable[[SortedRun], RowIndex]) -> None:
        self._runs, self._index_of = runs, index_of

    def overlay(self, seq: int, volume: int, leaf_index: int, pointers: U64Array, checksums: U64Array) -> None:
        """Puts into a leaf what was written to its blocks up to `seq`: later runs over earlier ones (figure 8)."""
        for run in self._runs:
            if run.first_seq <= seq:
                self._index_of(run).overlay(seq, volume, leaf_index, pointers, checksums)

    def written(self, after_seq: int, through_seq: int) -> list[WrittenRows]:
        """Writes (after_seq, through_seq], by the runs that have some of them."""
        runs = (run for run in self._runs if run.to_seq > after_seq and run.first_seq <= through_seq)
        return [WrittenRows(self._index_of(run), after_seq, through_seq) for run in runs]


class OpenIntervals:
    """The open intervals of a store: one, or two while the earlier one is being closed.

    Methods raise MissingObjectError where a WAL has been removed since: then a snapshot took the place of
    its open interval.

    Args:
        chunks: shared with the store's difference journals.
    """

    def __init__(self, catalog: Catalog, objects: ObjectPool, chunks: ChunkCache) -> None:
        self._catalog, self._objects, self._chunks = catalog, objects, chunks
        self._known: tuple[int, tuple[OpenInterval, ...]] = -1, ()
        self._indexes: Cache[tuple[int, int], RowIndex] = index_cache()

    def now(self) -> tuple[OpenInterval, ...]:
        """All that there are, oldest first. Every look-up begins here: objects that were removed are let go of, too."""
        self._objects.sweep()
        version = self._catalog.data_version()
        known, before = self._known
        if known == version:
            return before
        now = self._catalog.open_intervals()
        for gone in {each.id for each in before} - {each.id for each in now}:
            self._objects.forget(ObjectName(ObjectKind.JOURNAL_BLOCKS, gone))  # else its WAL would take room for ever
        self._known = version, now
        return now

    def latest(self, now: Sequence[OpenInterval], after_seq: int) -> Resolution | None:
        """The newest state, if it is after the snapshot at `after_seq`."""
        for each in reversed(now):
            if each.runs and each.to_seq > after_seq:
                return each.interval.at(Position(each.to_seq, each.to_time_ns))
        return None

    def at_seq(self, now: Sequence[OpenInterval], after_seq: int, seq: int) -> Resolution | None:
        """The state after write `seq`, if that is behind the snapshot at `after_seq` and readable."""
        for each in reversed(now):
            if each.from_seq >= after_seq and each.from_seq < seq <= each.to_seq:
                run = [run for run in each.runs if run.first_seq <= seq][-1]
                return each.interval.at(self._index(run).position_at_seq(seq))
        return None

    def at_time(self, now: Sequence[OpenInterval], after_seq: int, time_ns: int) -> Resolution | None:
        """The newest state not after `time_ns`, if that is behind the snapshot at `after_seq`."""
        for each in reversed(now):
            runs = [run for run in each.runs if run.first_time_ns <= time_ns]
            if each.from_seq >= after_seq and runs:
                return each.interval.at(self._index(runs[-1]).position_at_time(time_ns))
        return None

    def written(self, interval: OpenInterval) -> WrittenBlocks:
        return WrittenBlocks(interval.runs, self._index)

    def _index(self, run: SortedRun) -> RowIndex:
        return self._indexes.get(
            (run.open_interval_id, run.sparse_index_offset), lambda: open_run(self._objects, run, self._chunks)
        )
