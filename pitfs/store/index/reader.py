"""Difference journals and sorted runs as readers see them: rows are found by the sparse index, in verified chunks.

The sparse index stays in memory: where each chunk begins, 40 bytes for up to 2048 rows. A look-up is a binary search
in it, which gives the few chunks that may have an answer, then one in each of those. So it reads some chunks of 64 KiB
however long the journal is.
"""

from __future__ import annotations

import heapq
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Final, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from pitfs.errors import CorruptionError
from pitfs.model.blockmap import FANOUT, FANOUT_BITS, I64Array, U64Array
from pitfs.model.position import Position
from pitfs.model.transfer import POSITION
from pitfs.store.catalog.catalog import Catalog
from pitfs.store.catalog.records import Interval
from pitfs.store.index.format import INDEX_ROW, POSITIONS_VOLUME, SPARSE_INDEX, Chunk
from pitfs.store.objects.format import HEADER_BYTES, ObjectKind, ObjectName, ObjectRecord
from pitfs.store.objects.pool import MissingObjectError, ObjectPool

MAX_CACHED_CHUNKS: Final = 64  # 4 MiB: an interval of 100,000 rows; a leaf of a longer one has 3 or 4
MAX_CACHED_INDEX_BYTES: Final = 4 << 20  # of sparse indexes: 40 bytes for 2048 entries, 300 KB for 10**7
_OVERHEAD_BYTES: Final = 1024

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
Index = TypeVar("Index", bound="RowIndex")


class Cache(Generic[K, V]):
    """Keeps what was used last, for any number of threads, up to `limit` (in whatever `weight` counts, else values).

    The lock isn't held while a value is made: two threads may make the same one, which is harmless for values
    that don't change.
    """

    def __init__(self, limit: int, weight: Callable[[V], int] = lambda value: 1) -> None:
        self.limit = limit
        self._weight = weight
        self._total = 0
        self._values: OrderedDict[K, V] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: K, make: Callable[[], V]) -> V:
        """The value of `key`, made if it isn't there; what `make` raises goes to the caller."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        value = make()
        with self._lock:
            if key not in self._values:
                self._values[key] = value
                self._total += self._weight(value)
            while self._total > self.limit and len(self._values) > 1:
                self._total -= self._weight(self._values.popitem(last=False)[1])
        return value


ChunkCache = Cache[tuple[tuple[int, int, int], int], Chunk]  # by (snapshot id, layer, offset), number of the chunk


def chunk_cache(limit: int = MAX_CACHED_CHUNKS) -> ChunkCache:
    """A cache of chunks for all journals of a store."""
    return Cache(limit)


def index_cache() -> Cache[tuple[int, int], Index]:
    """A cache of indexes, by the size of their sparse indexes."""
    return Cache(MAX_CACHED_INDEX_BYTES, lambda index: index.sparse_index_bytes + _OVERHEAD_BYTES)


@dataclass(frozen=True, slots=True)
class _VolumeChunks:
    """Columns of the sparse index for the chunks of one volume, in order, int64 and contiguous for searchsorted."""

    numbers: I64Array  # of the chunks in the whole sparse index
    firsts: I64Array  # what each chunk begins with: a block, or a time where it has positions
    first_seqs: I64Array


_NO_CHUNKS: Final = _VolumeChunks(*(np.zeros(0, "<i8") for _ in range(3)))


class RowIndex:
    """Rows and positions in chunks, behind which their sparse index is.

    Args:
        objects: of the store.
        name: of the object that has them.
        offset, size_bytes, checksum: of the sparse index in it.
        chunks: shared by all of a store.

    Raises:
        CorruptionError: the sparse index isn't what was written; from the methods: a chunk isn't.
    """

    def __init__(
        self, objects: ObjectPool, name: ObjectName, offset: int, size_bytes: int, checksum: int, chunks: ChunkCache
    ) -> None:
        self._objects, self._name, self._chunks = objects, name, chunks
        self._key = name.snapshot_id, name.layer, offset
        data = objects.read_verified(name, size_bytes, offset, checksum) if size_bytes else b""
        self.sparse_index = np.frombuffer(data, SPARSE_INDEX)
        self.sparse_index_bytes = len(data)
        volumes = self.sparse_index["volume"]
        self._of_volume: dict[int, _VolumeChunks] = {}
        # A set: np.unique imports numpy.ma, half of the time to the first byte after mounting.
        for volume in sorted(set(volumes.tolist())):
            numbers = np.flatnonzero(volumes == volume)
            columns = (np.ascontiguousarray(self.sparse_index[name][numbers]) for name in ("first", "first_seq"))
            self._of_volume[volume] = _VolumeChunks(numbers, *columns)
        self._positions = self._of_volume.pop(POSITIONS_VOLUME, _NO_CHUNKS)

    # Rows

    def overlay(self, seq: int, volume: int, leaf_index: int, pointers: U64Array, checksums: U64Array) -> None:
        """Puts into a leaf what was written to its blocks up to `seq` (figure 8)."""
        start = leaf_index << FANOUT_BITS
        blocks, newer, sums = self.range(volume, start, start + FANOUT, seq)
        pointers[blocks - start] = newer
        checksums[blocks - start] = sums

    def range(
        self, volume: int, block_start: int, block_end: int, seq: int
    ) -> tuple[I64Array, U64Array, U64Array]:
        """The last entry not after `seq` of each block in [block_start, block_end) that has one (figure 8).

        Returns:
            (blocks int64[n] ascending, pointers uint64[n], checksums uint64[n])
        """
        parts = [
            _last_entries(self._chunk(number), block_start, block_end, seq)
            for number in self._chunks_for(volume, block_start, block_end, seq)
        ]
        if not parts:
            return np.zeros(0, "<i8"), np.zeros(0, "<u8"), np.zeros(0, "<u8")
        if len(parts) == 1:
            return parts[0]
        blocks, pointers, checksums = (np.concatenate(column) for column in zip(*parts, strict=True))
        last = _ends_of_runs(blocks)  # a block's entries may go on in the next chunk
        return blocks[last], pointers[last], checksums[last]

    def chunks_from(self, volume: int, block: int) -> Iterator[tuple[int, Callable[[], Chunk]]]:
        """The chunks that may have rows of that block or a later one: what each begins with, and how to read it."""
        chunks = self._of_volume.get(volume, _NO_CHUNKS)
        for place in range(_first_chunk(chunks, block), len(chunks.numbers)):
            yield int(chunks.firsts[place]), partial(self._chunk, int(chunks.numbers[place]))

    def _chunks_for(self, volume: int, block_start: int, block_end: int, seq: int) -> list[int]:
        """Numbers of the chunks that may have an answer.

        Those are the chunks from the one that `block_start` falls into to the last that begins before `block_end`.
        A block that was written often fills chunks of its own. Of these only one is needed, the one into which `seq`
        falls: not those that begin after `seq`, nor those whose successor begins with an entry not after it.
        """
        chunks = self._of_volume.get(volume)
        if chunks is None:
            return []
        start, end = _first_chunk(chunks, block_start), int(chunks.firsts.searchsorted(block_end))
        numbers = chunks.numbers[start:end]
        if end - start <= 1:
            return [int(number) for number in numbers]
        firsts, first_seqs = chunks.firsts[start:end], chunks.first_seqs[start:end]
        of_one_block = np.append(firsts[1:] == firsts[:-1], False)
        is_superseded = np.append(first_seqs[1:] <= seq, False)
        needed = ~(of_one_block & (is_superseded | (first_seqs > seq)))
        return [int(number) for number in numbers[needed]]

    # Positions

    def position_at_seq(self, seq: int) -> Position | None:
        """The last position in the interval not after write `seq`, None if all are after it."""
        return self._position(0, self._positions.first_seqs, seq)

    def position_at_time(self, time_ns: int) -> Position | None:
        """The last position in the interval not after `time_ns`, None if all are after it."""
        return self._position(1, self._positions.firsts, time_ns)

    def _position(self, row: int, firsts: I64Array, value: int) -> Position | None:
        """The last position whose seq (row 0) or time (row 1) isn't after `value`."""
        place = int(firsts.searchsorted(value, "right")) - 1
        if place < 0:
            return None
        chunk = self._positions_chunk(place)
        found = int(chunk[row].searchsorted(value, "right")) - 1
        return Position(int(chunk[0, found]), int(chunk[1, found]))

    def _positions_chunk(self, place: int) -> I64Array:
        """Seq and time_ns, shape (2, rows)."""
        return self._chunk(int(self._positions.numbers[place])).view("<i8")

    # All of it, chunk by chunk; not by the cache, since each chunk is read once

    def all_rows(self, passes_over: bool = False) -> Iterator[npt.NDArray[np.void]]:
        """INDEX_ROWs ascending by (volume, block, seq). `passes_over`: damaged chunks."""
        for volume, chunks in self._of_volume.items():
            for chunk in self._read_chunks(chunks, passes_over):
                rows = np.empty(chunk.shape[1], INDEX_ROW)
                rows["volume"], rows["block"], rows["seq"] = volume, chunk[0].view("<i8"), chunk[1].view("<i8")
                rows["pointer"], rows["checksum"] = chunk[2], chunk[3]
                yield rows

    def all_positions(self, passes_over: bool = False) -> Iterator[npt.NDArray[np.void]]:
        """POSITIONs, ascending. `passes_over`: damaged chunks."""
        for chunk in self._read_chunks(self._positions, passes_over):
            positions = np.empty(chunk.shape[1], POSITION)
            positions["seq"], positions["time_ns"] = chunk[0], chunk[1].view("<i8")
            yield positions

    def _read_chunks(self, chunks: _VolumeChunks, passes_over: bool) -> Iterator[Chunk]:
        for number in chunks.numbers.tolist():
            try:
                yield self._read_chunk(number)
            except CorruptionError:
                if not passes_over:
                    raise

    def _chunk(self, number: int) -> Chunk:
        return self._chunks.get((self._key, number), partial(self._read_chunk, number))

    def _read_chunk(self, number: int) -> Chunk:
        row = self.sparse_index[number]
        count, columns = int(row["rows"]), 2 if int(row["volume"]) == POSITIONS_VOLUME else 4
        size, offset, checksum = count * columns * 8, int(row["offset"]), int(row["checksum"])
        data = self._objects.read_verified(self._name, size, offset, checksum)
        return np.frombuffer(data, "<u8").reshape(columns, count)


@dataclass(frozen=True, slots=True)
class WrittenRows:
    """The rows of an index whose writes are (after_seq, through_seq]."""

    index: RowIndex
    after_seq: int
    through_seq: int

    def chunks_from(self, volume: int, block: int) -> Iterator[tuple[int, Callable[[], int | None]]]:
        """As `RowIndex.chunks_from`; a chunk gives the first such block in it, not before `block`, or None."""
        for start, read in self.index.chunks_from(volume, block):
            yield start, partial(self._first_block, read, block)

    def _first_block(self, read: Callable[[], Chunk], block: int) -> int | None:
        chunk = read()
        blocks, seqs = chunk[0].view("<i8"), chunk[1].view("<i8")
        start = int(blocks.searchsorted(block))
        wanted = (seqs[start:] > self.after_seq) & (seqs[start:] <= self.through_seq)
        return int(blocks[start + int(wanted.argmax())]) if wanted.any() else None


def next_leaf(written: Iterable[WrittenRows], volume: int, first: int, end: int) -> int:
    """Index of the first leaf in [first, end) into which any of these writes went; `end` if there is none.

    The chunks of all indexes are read in the order of their blocks, and none that begins behind the answer. So a walk
    from leaf to leaf reads each chunk once, but for those in which it stands, and these are in the cache.
    """
    if first >= end:
        return end
    sources = (each.chunks_from(volume, first << FANOUT_BITS) for each in written)
    for start, first_block in heapq.merge(*sources, key=itemgetter(0)):
        if start >> FANOUT_BITS >= end:
            break
        block = first_block()
        if block is not None:
            end = min(end, block >> FANOUT_BITS)
    return end


class JournalIndex(RowIndex):
    """The difference journal of one interval (figures 6B and 8).

    Args:
        interval: the one whose journal it is.
        record: the catalog's of the index object.
    """

    def __init__(self, objects: ObjectPool, interval: Interval, record: ObjectRecord, chunks: ChunkCache) -> None:
        self.interval = interval
        name = ObjectName(ObjectKind.JOURNAL_INDEX, interval.end_snapshot_id, interval.layer)
        footer = HEADER_BYTES + record.data_bytes, record.footer_bytes, record.footer_checksum
        super().__init__(objects, name, *footer, chunks)

    def written(self, after_seq: int, through_seq: int) -> list[WrittenRows]:
        return [WrittenRows(self, after_seq, through_seq)]

    def next_time(self, time_ns: int) -> int:
        """Time of the first position after `time_ns`, the interval's end if there is none."""
        firsts = self._positions.firsts
        place = int(firsts.searchsorted(time_ns, "right"))
        if place:
            times_ns = self._positions_chunk(place - 1)[1]
            behind = int(times_ns.searchsorted(time_ns, "right"))
            if behind < len(times_ns):
                return int(times_ns[behind])
        return int(firsts[place]) if place < len(firsts) else self.interval.to_time_ns


class Journals:
    """The difference journals of a store's intervals, each opened when it is needed and kept for a while.

    `chunks` is shared by all of them. Methods raise CorruptionError where one isn't what was written.
    """

    def __init__(self, catalog: Catalog, objects: ObjectPool, chunks: ChunkCache) -> None:
        self._catalog, self._objects, self._chunks = catalog, objects, chunks
        self._cache: Cache[tuple[int, int], JournalIndex] = index_cache()

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
        name = ObjectName(ObjectKind.JOURNAL_INDEX, interval.end_snapshot_id, interval.layer)
        record = self._catalog.object(name.file)
        if record is None:
            raise MissingObjectError(self._catalog.path, 0, f"it lists an interval but not {name.file}")
        return JournalIndex(self._objects, interval, record, self._chunks)


def _first_chunk(chunks: _VolumeChunks, block: int) -> int:
    """Place of the first chunk that may have that block.

    It is the one before the first that begins at the block or later: that one begins with a smaller block, and may go
    on with this one.
    """
    return max(int(chunks.firsts.searchsorted(block)) - 1, 0)


def _last_entries(chunk: Chunk, block_start: int, block_end: int, seq: int) -> tuple[I64Array, U64Array, U64Array]:
    """As `RowIndex.range`, of one chunk."""
    blocks, seqs = chunk[0].view("<i8"), chunk[1].view("<i8")
    start, end = blocks.searchsorted(np.array([block_start, block_end], "<i8")).tolist()
    rows = (seqs[start:end] <= seq).nonzero()[0]
    rows += start
    found = blocks[rows]
    last = _ends_of_runs(found)
    rows = rows[last]
    return found[last], chunk[2][rows], chunk[3][rows]


def _ends_of_runs(values: I64Array) -> I64Array:
    """Indices of the last of each run of equal values."""
    ends = (values[1:] != values[:-1]).nonzero()[0]
    return np.concatenate([ends, [len(values) - 1]]) if len(values) else ends
