"""Difference journals and sorted runs as readers see them: rows found by a sparse index, in verified chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from pitfs.model.blockmap import I64Array, U64Array
from pitfs.model.ladder import LAST_LAYER
from pitfs.model.position import Position
from pitfs.model.transfer import POSITION
from pitfs.store.catalog.records import Interval
from pitfs.store.index.format import INDEX_ROW, POSITIONS_VOLUME, SPARSE_INDEX
from pitfs.store.objects.cache import Cache
from pitfs.store.objects.format import HEADER_BYTES, ObjectKind, ObjectRecord
from pitfs.store.objects.pool import ObjectPool

MAX_CACHED_CHUNKS: Final = 64  # 4 MiB: an interval of 100,000 rows; a leaf of a longer one has 3 or 4

Chunk = npt.NDArray[np.uint64]  # shape (4, rows), or (2, rows) for positions
ChunkCache = Cache[tuple[int, int, int], Chunk]  # by (snapshot id, layer or place, number of the chunk)


def chunk_cache(limit: int = MAX_CACHED_CHUNKS) -> ChunkCache:
    """A cache of chunks for all journals of a store."""
    return Cache(limit)


def _ends_of_runs(values: I64Array) -> I64Array:
    """Indices of the last of each run of equal values."""
    ends = (values[1:] != values[:-1]).nonzero()[0]
    return np.concatenate([ends, [len(values) - 1]]) if len(values) else ends


@dataclass(frozen=True, slots=True)
class SparseIndexPlace:
    """Where rows stand: the object (`layer` of an index), and the sparse index in it, at byte `offset`."""

    kind: ObjectKind
    snapshot: int
    offset: int
    size_bytes: int
    checksum: int
    layer: int = LAST_LAYER


class RowIndex:
    """Rows and positions in chunks behind which their sparse index stands.

    Args:
        objects: of the store.
        place: where they are.
        number: with `place.snapshot`, what tells them apart in `chunks`.
        chunks: shared by all of a store.

    Raises:
        CorruptionError: the sparse index isn't what was written; from the methods: a chunk isn't.
    """

    def __init__(self, objects: ObjectPool, place: SparseIndexPlace, number: int, chunks: ChunkCache) -> None:
        self._objects, self._place, self._number, self._chunks = objects, place, number, chunks
        sparse_index = np.frombuffer(
            self._read(place.size_bytes, place.offset, place.checksum) if place.size_bytes else b"", SPARSE_INDEX
        )
        self.sparse_index_bytes = sparse_index.nbytes
        self._sparse_index = sparse_index
        volumes = sparse_index["volume"]
        # A set: np.unique imports numpy.ma, half of the time to the first byte after mounting.
        self._numbers = {volume: np.flatnonzero(volumes == volume) for volume in sorted(set(volumes.tolist()))}
        # searchsorted wants contiguous int64 columns
        self._firsts = {v: np.ascontiguousarray(sparse_index["first"][n]) for v, n in self._numbers.items()}
        self._first_seqs = {v: np.ascontiguousarray(sparse_index["first_seq"][n]) for v, n in self._numbers.items()}

    def _read(self, size: int, offset: int, checksum: int) -> bytes:
        place = self._place
        return self._objects.read_verified(place.kind, place.snapshot, size, offset, checksum, place.layer)

    def range(
        self, volume: int, block_start: int, block_end: int, seq: int
    ) -> tuple[I64Array, U64Array, U64Array]:
        """The last entry not after `seq` of each block in [block_start, block_end) that has one (figure 8).

        Returns:
            (blocks int64[n] ascending, pointers uint64[n], checksums uint64[n])
        """
        parts = [
            self._range_in(self._chunk(number), block_start, block_end, seq)
            for number in self._chunks_for(volume, block_start, block_end, seq)
        ]
        if not parts:
            return np.zeros(0, "<i8"), np.zeros(0, "<u8"), np.zeros(0, "<u8")
        if len(parts) == 1:
            return parts[0]
        blocks, pointers, checksums = (np.concatenate(column) for column in zip(*parts, strict=True))
        last = _ends_of_runs(blocks)  # a block's entries may go on in the next chunk
        return blocks[last], pointers[last], checksums[last]

    def next_block(self, volume: int, first: int, after_seq: int, through_seq: int) -> int | None:
        """The first block, not before `first`, that has an entry of a seq in (after_seq, through_seq], or None."""
        firsts = self._firsts.get(volume)
        if firsts is None:
            return None
        # What the chunk before begins with is smaller: it may go on with larger ones.
        place = max(int(np.searchsorted(firsts, np.int64(first), "left")) - 1, 0)
        for number in self._numbers[volume][place:]:
            chunk = self._chunk(int(number))
            blocks, seqs = chunk[0].view("<i8"), chunk[1].view("<i8")
            start = int(blocks.searchsorted(first))
            wanted = (seqs[start:] > after_seq) & (seqs[start:] <= through_seq)
            if wanted.any():
                return int(blocks[start + int(wanted.argmax())])
        return None

    def position_at_seq(self, seq: int) -> Position | None:
        """The last position in the interval not after write `seq`, None if all are after it."""
        return self._position(0, self._first_seqs, seq)

    def position_at_time(self, time_ns: int) -> Position | None:
        """The last position in the interval not after `time_ns`, None if all are after it."""
        return self._position(1, self._firsts, time_ns)

    def _position(self, row: int, firsts: dict[int, I64Array], value: int) -> Position | None:
        """The last position whose seq (row 0) or time (row 1) isn't after `value`."""
        if POSITIONS_VOLUME not in firsts:
            return None
        place = int(np.searchsorted(firsts[POSITIONS_VOLUME], np.int64(value), "right")) - 1
        if place < 0:
            return None
        chunk = self._positions(place)
        found = int(np.searchsorted(chunk[row], np.int64(value), "right")) - 1
        return Position(int(chunk[0, found]), int(chunk[1, found]))

    def _positions(self, place: int) -> I64Array:
        """A chunk of positions: seq and time_ns, shape (2, rows)."""
        return self._chunk(int(self._numbers[POSITIONS_VOLUME][place])).view("<i8")

    def _chunks_for(self, volume: int, block_start: int, block_end: int, seq: int) -> list[int]:
        """Numbers of the chunks that may have an answer.

        A block that was written often fills chunks of its own. Of these only the one is read in which `seq`
        falls: not those that begin after `seq`, nor those whose successor begins with an entry not after it.
        """
        firsts = self._firsts.get(volume)
        if firsts is None:
            return []
        start = max(int(np.searchsorted(firsts, np.int64(block_start), "left")) - 1, 0)
        end = int(np.searchsorted(firsts, np.int64(block_end), "left"))
        if end - start > 1:
            block, first_seq = firsts[start:end], self._first_seqs[volume][start:end]
            alone = np.append(block[1:] == block[:-1], False)  # all rows of the chunk are of one block
            superseded = alone & np.append(first_seq[1:] <= seq, False)
            keep = ~superseded & ~(alone & (first_seq > seq))
            return [int(n) for n in self._numbers[volume][start:end][keep]]
        return [int(n) for n in self._numbers[volume][start:end]]

    @staticmethod
    def _range_in(
        chunk: Chunk, block_start: int, block_end: int, seq: int
    ) -> tuple[I64Array, U64Array, U64Array]:
        blocks, seqs = chunk[0].view("<i8"), chunk[1].view("<i8")
        start, end = blocks.searchsorted(np.array([block_start, block_end], "<i8")).tolist()
        rows = (seqs[start:end] <= seq).nonzero()[0]
        rows += start
        found = blocks[rows]
        last = _ends_of_runs(found)
        rows = rows[last]
        return found[last], chunk[2][rows], chunk[3][rows]

    def _chunk(self, number: int) -> Chunk:
        return self._chunks.get((self._place.snapshot, self._number, number), self._reader(number))

    def all_rows(self) -> Iterator[npt.NDArray[np.void]]:
        """All entries, INDEX_ROWs ascending by (volume, block, seq), chunk by chunk."""
        for volume in sorted(set(self._numbers) - {POSITIONS_VOLUME}):
            for number in self._numbers[volume].tolist():
                chunk = self._reader(number)()  # not by the cache: each is read once
                rows = np.empty(chunk.shape[1], INDEX_ROW)
                rows["volume"], rows["block"], rows["seq"] = volume, chunk[0].view("<i8"), chunk[1].view("<i8")
                rows["pointer"], rows["checksum"] = chunk[2], chunk[3]
                yield rows

    def all_positions(self) -> Iterator[npt.NDArray[np.void]]:
        """All positions, POSITIONs ascending, chunk by chunk."""
        for number in self._numbers.get(POSITIONS_VOLUME, np.zeros(0, "<i8")).tolist():
            chunk = self._reader(number)()
            positions = np.empty(chunk.shape[1], POSITION)
            positions["seq"], positions["time_ns"] = chunk[0], chunk[1].view("<i8")
            yield positions

    def _reader(self, number: int) -> Callable[[], Chunk]:
        def read() -> Chunk:
            row = self._sparse_index[number]
            count, columns = int(row["rows"]), 2 if int(row["volume"]) == POSITIONS_VOLUME else 4
            size = count * columns * 8
            data = self._read(size, int(row["offset"]), int(row["checksum"]))
            return np.frombuffer(data, "<u8").reshape(columns, count)

        return read


class JournalIndex(RowIndex):
    """The difference journal of one interval (figures 6B and 8).

    Args:
        interval: the one whose journal it is.
        record: the catalog's row of the index object.
    """

    def __init__(
        self, objects: ObjectPool, interval: Interval, record: ObjectRecord, chunks: ChunkCache
    ) -> None:
        self.interval = interval
        place = SparseIndexPlace(
            ObjectKind.JOURNAL_INDEX, interval.end_snapshot_id,
            HEADER_BYTES + record.data_bytes, record.footer_bytes, record.footer_checksum, interval.layer,
        )  # fmt: skip
        super().__init__(objects, place, interval.layer, chunks)

    def next_time(self, time_ns: int) -> int:
        """Time of the first position after `time_ns`, the interval's end if there is none."""
        firsts = self._firsts.get(POSITIONS_VOLUME)
        if firsts is None:
            return self.interval.to_time_ns
        place = int(np.searchsorted(firsts, np.int64(time_ns), "right"))
        if place:
            times_ns = self._positions(place - 1)[1]
            behind = int(np.searchsorted(times_ns, np.int64(time_ns), "right"))
            if behind < len(times_ns):
                return int(times_ns[behind])
        return int(firsts[place]) if place < len(firsts) else self.interval.to_time_ns
