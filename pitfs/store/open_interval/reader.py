"""Tails as readers see them: instants between the last snapshot and the last write that can be read."""

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
from pitfs.store.open_interval.sorted_runs import open_piece

MAX_CACHED_FENCE_BYTES: Final = 4 << 20  # fence tables of pieces: 40 bytes for 2048 rows, and for each piece
_FENCE_OVERHEAD_BYTES: Final = 1024


class OpenIntervals:
    """The tails of a store; `chunks` is shared with its journals. Methods raise MissingObjectError where a log has
    been removed since: then an interval took the place of its tail."""

    def __init__(self, catalog: Catalog, objects: ObjectPool, chunks: ChunkCache) -> None:
        self._catalog, self._objects, self._chunks = catalog, objects, chunks
        self._known: tuple[int, tuple[OpenInterval, ...]] = -1, ()
        self._indexes: Cache[tuple[int, int], RowIndex] = Cache(
            MAX_CACHED_FENCE_BYTES, lambda index: index.sparse_index_bytes + _FENCE_OVERHEAD_BYTES
        )

    def now(self) -> tuple[OpenInterval, ...]:
        """All that there are, oldest first."""
        version = self._catalog.data_version()
        known, before = self._known
        if known == version:
            return before
        tails = self._catalog.open_intervals()
        for gone in {tail.id for tail in before} - {tail.id for tail in tails}:
            self._objects.forget(ObjectKind.JOURNAL_BLOCKS, gone)  # else its log would take room for ever
        self._known = version, tails
        return tails

    def latest(self, tails: Sequence[OpenInterval], after_seq: int) -> Resolution | None:
        """The newest state, if it is after the snapshot at `after_seq`."""
        for tail in reversed(tails):
            if tail.runs and tail.to_seq > after_seq:
                return _resolution(tail, Position(tail.to_seq, tail.to_time_ns))
        return None

    def at_seq(self, tails: Sequence[OpenInterval], after_seq: int, seq: int) -> Resolution | None:
        """The state after write `seq`, if it lies behind the snapshot at `after_seq` and can be read."""
        for tail in reversed(tails):
            if tail.from_seq >= after_seq and tail.from_seq < seq <= tail.to_seq:
                piece = [piece for piece in tail.runs if piece.first_seq <= seq][-1]
                position = self._index(piece).position_at_seq(seq)
                return _resolution(tail, position) if position is not None else None
        return None

    def at_time(self, tails: Sequence[OpenInterval], after_seq: int, time_ns: int) -> Resolution | None:
        """The newest state not after `time_ns`, if it lies behind the snapshot at `after_seq`."""
        for tail in reversed(tails):
            pieces = [piece for piece in tail.runs if piece.first_time_ns <= time_ns]
            if tail.from_seq >= after_seq and pieces:
                position = self._index(pieces[-1]).position_at_time(time_ns)
                return _resolution(tail, position) if position is not None else None
        return None

    def overlay(
        self, tail: OpenInterval, seq: int, volume: int, leaf_index: int, pointers: U64Array, checksums: U64Array
    ) -> None:
        """Puts what the tail's writes up to `seq` wrote into a leaf (figure 8: the journal comes before the third)."""
        start = leaf_index << FANOUT_BITS
        for piece in tail.runs:
            if piece.first_seq <= seq:
                blocks, newer, sums = self._index(piece).range(volume, start, start + FANOUT, seq)
                pointers[blocks - start] = newer
                checksums[blocks - start] = sums

    def next_leaf(self, tail: OpenInterval, volume: int, first: int, after_seq: int, through_seq: int) -> int | None:
        """Index of the first leaf, not before `first`, into which writes (after_seq, through_seq] of the tail went."""
        start = first << FANOUT_BITS
        pieces = (piece for piece in tail.runs if piece.to_seq > after_seq and piece.first_seq <= through_seq)
        found = (self._index(piece).next_block(volume, start, after_seq, through_seq) for piece in pieces)
        return min((block >> FANOUT_BITS for block in found if block is not None), default=None)

    def _index(self, piece: SortedRun) -> RowIndex:
        return self._indexes.get(
            (piece.open_interval_id, piece.sparse_index_offset), lambda: open_piece(self._objects, piece, self._chunks)
        )


def _resolution(tail: OpenInterval, position: Position) -> Resolution:
    return Resolution(
        position.seq, position.time_ns, "intermediary", 0, tail.base_snapshot_id, tail.end_snapshot_id
    )
