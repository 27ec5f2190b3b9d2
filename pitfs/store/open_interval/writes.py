"""Streamed writes: checked as they come, and spread out into a row for each block."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from pitfs.errors import RemoteProtocolError
from pitfs.model.blockmap import I64Array, U64Array
from pitfs.model.transfer import MAX_BATCH_BYTES, MAX_BATCH_ROWS, POSITION, VolumeInfo, Writes
from pitfs.store.index.format import INDEX_ROW
from pitfs.store.index.merge import Rows
from pitfs.store.objects.format import MAX_SEQ
from pitfs.store.open_interval.wal import Batch
from pitfs.store.transfer.position import mismatch
from pitfs.store.transfer.sections import checksums_of

_MAX_TIME_NS = 1 << 62


def _refuse(problem: str) -> RemoteProtocolError:
    return RemoteProtocolError(f"the streamed writes: {problem}; nothing of them is applied")


class WriteCheck:
    """What the writes of a group must be. `path`: of the store. `volumes`: of the group."""

    def __init__(self, path: str, volumes: Sequence[VolumeInfo]) -> None:
        self._path = path
        self._block_counts = np.array([volume.block_count for volume in volumes], "<u8")
        self._block_sizes = np.array([volume.block_size for volume in volumes], "<i8")
        self._zero_checksums = np.array([xxh3_64_intdigest(bytes(v.block_size)) for v in volumes], "<u8")

    def take(self, writes: Writes, seq: int, time_ns: int) -> tuple[Batch, memoryview]:
        """Writes that come behind position (seq, time_ns), at least one.

        Returns:
            the writes, and the blocks that aren't all zeros.

        Raises:
            PositionMismatchError: they don't lead on from there.
            RemoteProtocolError: they are invalid.
        """
        rows = writes.rows
        if writes.first_seq != seq + 1:
            problem = f"production streams writes from seq {writes.first_seq} on, the store ends at seq {seq}"
            raise mismatch(self._path, problem)
        self._check_rows(writes, time_ns)
        contents = memoryview(writes.contents).cast("B")
        sizes = np.repeat(self._block_sizes[rows["volume"]], rows["block_count"])
        if int(sizes.sum()) != len(contents):
            raise _refuse(f"{len(contents)} bytes of contents where the rows name {int(sizes.sum())}")
        checksums = checksums_of(contents, sizes)
        if xxh3_64_intdigest(checksums.data.cast("B")) != writes.digest:
            raise _refuse("contents that aren't those whose checksums were taken at the splitter")
        ends = np.cumsum(sizes)
        zeros = self._zeros(checksums, np.repeat(rows["volume"], rows["block_count"]), contents, ends)
        checksums[zeros] = 0
        body = _without(contents, zeros, ends - sizes, ends) if zeros.any() else contents
        return Batch(writes.first_seq, rows, checksums, zeros), body

    def _check_rows(self, writes: Writes, time_ns: int) -> None:
        rows, count = writes.rows, len(writes.rows)
        if not count or count > MAX_BATCH_ROWS or (count > 1 and len(writes.contents) > MAX_BATCH_BYTES):
            raise _refuse(f"{count} writes with {len(writes.contents)} bytes in one batch")
        times_ns = rows["time_ns"]
        if times_ns[0] <= time_ns:
            raise mismatch(
                self._path,
                f"production streams a write of {int(times_ns[0])} ns, the store has one of {time_ns} ns before it",
                "if this lasts a new store is needed",
            )
        if (times_ns[1:] <= times_ns[:-1]).any() or times_ns[-1] >= _MAX_TIME_NS:
            raise _refuse("times that don't go forward")
        if writes.first_seq + count - 1 > MAX_SEQ:
            raise _refuse(f"a store has room for {MAX_SEQ} writes")
        volume = rows["volume"]
        if (volume >= len(self._block_counts)).any():
            raise _refuse(f"volume {int(volume.max())} of {len(self._block_counts)}")
        block_counts, blocks = self._block_counts[volume], rows["block"]
        if not rows["block_count"].all() or (blocks >= block_counts).any():
            raise _refuse("a write without blocks, or behind the end of its volume")
        if (rows["block_count"] > block_counts - blocks).any() or rows["reserved"].any():
            raise _refuse("a block behind the end of its volume, or a row that this pitfs doesn't know")

    def _zeros(
        self, checksums: U64Array, volumes: npt.NDArray[np.uint16], contents: memoryview, ends: I64Array
    ) -> npt.NDArray[np.bool_]:
        """Which blocks are all zeros: the checksum proposes, the bytes decide."""
        zeros: npt.NDArray[np.bool_] = checksums == self._zero_checksums[volumes]
        for index in np.flatnonzero(zeros).tolist():
            end = int(ends[index])
            zeros[index] = not contents[end - int(self._block_sizes[volumes[index]]) : end].tobytes().strip(b"\0")
        return zeros


def _without(contents: memoryview, zeros: npt.NDArray[np.bool_], starts: I64Array, ends: I64Array) -> memoryview:
    """The contents without blocks of zeros: joined from runs of those that stay."""
    edges = np.flatnonzero(np.diff(~zeros, prepend=False, append=False))
    runs = zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
    return memoryview(b"".join([contents[starts[first] : ends[last - 1]] for first, last in runs]))


def spread(batch: Batch, block_units: U64Array, first_pointer: int) -> Rows:
    """INDEX_ROWs of each block of these writes, in the order of writing.

    Args:
        block_units: of a block, by volume. first_pointer: to where their contents begin in the WAL.
    """
    rows, first_seq = batch.rows, batch.first_seq
    counts = rows["block_count"].astype("<i8")
    found = np.zeros(len(batch.checksums), INDEX_ROW)
    firsts = np.cumsum(counts) - counts  # of each write, the row of its first block
    found["volume"] = np.repeat(rows["volume"], counts)
    found["block"] = np.repeat(rows["block"].astype("<i8") - firsts, counts) + np.arange(len(found))
    found["seq"] = np.repeat(np.arange(first_seq, first_seq + len(rows)), counts)
    units = np.where(batch.zeros, np.uint64(0), block_units[found["volume"]])
    pointers = np.uint64(first_pointer) + np.cumsum(units, dtype="<u8") - units
    pointers[batch.zeros] = 0
    found["pointer"], found["checksum"] = pointers, batch.checksums
    return found


def positions(batch: Batch) -> Rows:
    """POSITIONs of these writes."""
    found = np.empty(len(batch.rows), POSITION)
    found["seq"], found["time_ns"] = np.arange(batch.first_seq, batch.end[0] + 1), batch.rows["time_ns"]
    return found
