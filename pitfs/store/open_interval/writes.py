"""Streamed writes: checked as they come, and spread out into a row for each block."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from pitfs.errors import PositionMismatchError, RemoteProtocolError
from pitfs.model.blockmap import U64Array
from pitfs.model.record import block_checksums
from pitfs.model.transfer import MAX_BATCH_BYTES, MAX_BATCH_ROWS, POSITION, UNIT_BYTES, VolumeInfo, Writes
from pitfs.store.index.format import INDEX_ROW
from pitfs.store.objects.format import HEADER_BYTES, MAX_SEQ, ObjectKind, contents_object, pointer

_MAX_TIME_NS = 1 << 62


def _refuse(problem: str) -> RemoteProtocolError:
    return RemoteProtocolError(f"the streamed writes: {problem}; nothing of them is applied")


@dataclass(frozen=True, slots=True)
class Batch:
    """Writes that can be: their WRITE rows, of each block checksum and whether it is all zeros, what is stored."""

    first_seq: int
    rows: npt.NDArray[np.void]
    checksums: U64Array
    zeros: npt.NDArray[np.bool_]
    body: memoryview

    @property
    def last(self) -> tuple[int, int]:
        """Position of the last write."""
        return self.first_seq + len(self.rows) - 1, int(self.rows["time_ns"][-1])


class WriteCheck:
    """What the writes of a group must be. `volumes`: of the group."""

    def __init__(self, volumes: Sequence[VolumeInfo]) -> None:
        self._block_counts = np.array([volume.block_count for volume in volumes], "<u8")
        self.block_sizes = np.array([volume.block_size for volume in volumes], "<i8")
        self._zero_checksums = np.array([xxh3_64_intdigest(bytes(v.block_size)) for v in volumes], "<u8")

    def take(self, writes: Writes, seq: int, time_ns: int) -> Batch:
        """Writes that come behind position (seq, time_ns), at least one.

        Raises:
            PositionMismatchError: they don't lead on from there.
            RemoteProtocolError: they can't be.
        """
        rows = writes.rows
        if writes.first_seq != seq + 1:
            raise PositionMismatchError(
                f"production streams writes from seq {writes.first_seq} on, the store ends at seq {seq}: begin the "
                "session anew, so that production learns where the store stands"
            )
        self._check_rows(writes, time_ns)
        contents = memoryview(writes.contents).cast("B")
        sizes = np.repeat(self.block_sizes[rows["volume"]], rows["block_count"])
        if int(sizes.sum()) != len(contents):
            raise _refuse(f"{len(contents)} bytes of contents where the rows name {int(sizes.sum())}")
        ends = np.cumsum(sizes)
        if (sizes == sizes[0]).all():
            found = block_checksums(contents, int(sizes[0]))
        else:
            places = itertools.pairwise([0, *ends.tolist()])
            found = [xxh3_64_intdigest(contents[start:end]) for start, end in places]
        checksums = np.array(found, "<u8")
        if xxh3_64_intdigest(checksums.data.cast("B")) != writes.digest:
            raise _refuse("contents that aren't those whose checksums were taken at the splitter")
        volumes = np.repeat(rows["volume"], rows["block_count"])
        zeros = self._zeros(checksums, volumes, contents, ends)
        if not zeros.any():
            return Batch(writes.first_seq, rows, checksums, zeros, contents)
        checksums[zeros] = 0
        return Batch(writes.first_seq, rows, checksums, zeros, _without(contents, zeros, ends - sizes, ends))

    def _check_rows(self, writes: Writes, time_ns: int) -> None:
        rows, count = writes.rows, len(writes.rows)
        if not count or count > MAX_BATCH_ROWS or (count > 1 and len(writes.contents) > MAX_BATCH_BYTES):
            raise _refuse(f"{count} writes with {len(writes.contents)} bytes in one batch")
        times_ns = rows["time_ns"]
        if times_ns[0] <= time_ns:
            raise PositionMismatchError(
                f"production streams a write of {int(times_ns[0])} ns, the store has one of {time_ns} ns before it: "
                "begin the session anew; if this lasts a new store is needed"
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
        self, checksums: U64Array, volumes: npt.NDArray[np.uint16], contents: memoryview, ends: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.bool_]:
        """Which blocks are all zeros: the checksum proposes, the bytes decide."""
        zeros: npt.NDArray[np.bool_] = checksums == self._zero_checksums[volumes]
        for index in np.flatnonzero(zeros).tolist():
            size = int(self.block_sizes[volumes[index]])
            end = int(ends[index])
            zeros[index] = not contents[end - size : end].tobytes().strip(b"\0")
        return zeros


def _without(
    contents: memoryview, zeros: npt.NDArray[np.bool_], starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]
) -> memoryview:
    """The contents without blocks of zeros: joined from runs of those that stay."""
    edges = np.flatnonzero(np.diff(~zeros, prepend=False, append=False))
    parts = [
        contents[starts[first] : ends[last - 1]]
        for first, last in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
    ]
    return memoryview(b"".join(parts))


def spread(
    first_seq: int, rows: npt.NDArray[np.void], checksums: U64Array, zeros: npt.NDArray[np.bool_],
    block_sizes: npt.NDArray[np.int64], tail: int, start: int,
) -> npt.NDArray[np.void]:  # fmt: skip
    """INDEX_ROWs of each block of these writes, in the order of writing.

    Args:
        tail, start: the log that has the contents, and the byte of the file where they begin.
    """
    counts = rows["block_count"].astype("<i8")
    found = np.zeros(len(checksums), INDEX_ROW)
    firsts = np.cumsum(counts) - counts  # of each write, the row of its first block
    found["volume"] = np.repeat(rows["volume"], counts)
    found["block"] = np.repeat(rows["block"].astype("<i8") - firsts, counts) + np.arange(len(found))
    found["seq"] = np.repeat(np.arange(first_seq, first_seq + len(rows)), counts)
    units = np.where(zeros, 0, block_sizes[found["volume"]] // UNIT_BYTES).astype("<u8")
    first = pointer(contents_object(tail, ObjectKind.JOURNAL_BLOCKS), (start - HEADER_BYTES) // UNIT_BYTES)
    pointers = np.uint64(first) + np.cumsum(units, dtype="<u8") - units
    pointers[zeros] = 0
    found["pointer"], found["checksum"] = pointers, checksums
    return found


def positions(first_seq: int, rows: npt.NDArray[np.void]) -> npt.NDArray[np.void]:
    """POSITIONs of these writes."""
    found = np.empty(len(rows), POSITION)
    found["seq"], found["time_ns"] = np.arange(first_seq, first_seq + len(rows)), rows["time_ns"]
    return found
