"""The difference journals of a store's intervals, each opened when it is needed and kept for a while."""

from __future__ import annotations

from functools import partial
from typing import Final

from pitfs.store.catalog.catalog import Catalog
from pitfs.store.catalog.records import Interval
from pitfs.store.index.reader import ChunkCache, JournalIndex
from pitfs.store.objects.cache import Cache
from pitfs.store.objects.format import ObjectKind, object_file
from pitfs.store.objects.pool import MissingObjectError, ObjectPool

MAX_CACHED_BYTES: Final = 4 << 20  # of sparse indexes: 40 bytes for 2048 entries, 300 KB for 10**7
_OVERHEAD_BYTES: Final = 1024


class Journals:
    """`chunks` is shared by all journals. Methods raise CorruptionError where one isn't what was written."""

    def __init__(self, catalog: Catalog, objects: ObjectPool, chunks: ChunkCache) -> None:
        self._catalog, self._objects, self._chunks = catalog, objects, chunks
        self._cache: Cache[tuple[int, int], JournalIndex] = Cache(
            MAX_CACHED_BYTES, lambda journal: journal.sparse_index_bytes + _OVERHEAD_BYTES
        )

    def ending_at(self, snapshot_id: int) -> JournalIndex:
        """That of the interval which ends at a snapshot."""
        interval = self._catalog.interval_to(snapshot_id)
        if interval is None:
            raise MissingObjectError(self._catalog.path, 0, f"interval {snapshot_id} is missing")
        return self.of(interval)

    def of(self, interval: Interval) -> JournalIndex:
        """The interval's, or the finer one that took its place: that has the same states, and more."""
        while True:
            try:
                return self._cache.get((interval.end_snapshot_id, interval.layer), partial(self._open, interval))
            except MissingObjectError:
                now = self._catalog.interval_to(interval.end_snapshot_id)
                if now is None or now.layer <= interval.layer:
                    raise
                interval = now

    def _open(self, interval: Interval) -> JournalIndex:
        name = object_file(ObjectKind.JOURNAL_INDEX, interval.end_snapshot_id, interval.layer)
        record = self._catalog.object(name)
        if record is None:
            raise MissingObjectError(self._catalog.path, 0, f"it lists an interval but not {name}")
        return JournalIndex(self._objects, interval, record, self._chunks)
