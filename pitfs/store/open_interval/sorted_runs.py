"""Pieces: what of a tail can be read, sorted as a difference journal is, and merged so that they stay few.

Each time that writes become readable they are a new piece. Four of one level become one of the next, as in an LSM
tree, so their number grows with the logarithm of the tail's length, and with it what a read costs; a piece that
would grow beyond MAX_MERGED_ROWS isn't merged any more, so a merge takes bounded memory and time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from pitfs.store.catalog.records import SortedRun
from pitfs.store.index.reader import ChunkCache, RowIndex, SparseIndexPlace
from pitfs.store.index.writer import IndexWriter
from pitfs.store.objects.format import ObjectKind
from pitfs.store.objects.pool import ObjectPool
from pitfs.store.open_interval.wal import WriteAheadLog
from pitfs.store.transfer.build import by_volume

FAN_IN: Final = 4
MAX_MERGED_ROWS: Final = 1 << 18  # 10 MiB of rows: a merge of them takes some 50 ms
_VOLUME_SHIFT: Final = 46  # a volume has at most 2**36 blocks

Rows = npt.NDArray[np.void]  # INDEX_ROW or POSITION


def open_piece(objects: ObjectPool, piece: SortedRun, chunks: ChunkCache) -> RowIndex:
    """The piece's rows and positions. Raises as RowIndex."""
    place = SparseIndexPlace(
        ObjectKind.JOURNAL_BLOCKS,
        piece.open_interval_id,
        piece.sparse_index_offset,
        piece.sparse_index_bytes,
        piece.sparse_index_checksum,
    )
    return RowIndex(objects, place, piece.sparse_index_offset, chunks)


def add_piece(
    log: WriteAheadLog, pieces: Sequence[SortedRun], rows: Sequence[Rows], positions: Sequence[Rows],
    open_index: Callable[[SortedRun], RowIndex],
) -> tuple[SortedRun, ...]:  # fmt: skip
    """Writes a new piece to the log, merged with those before it that are due, and returns all that there are then.

    Args:
        rows, positions: INDEX_ROWs and POSITIONs of the writes behind `pieces`, in the order of writing.

    Raises:
        OSError, CapacityError: the disk refuses, or is full.
        CorruptionError: a piece to merge with isn't what was written.
    """
    kept, level = list(pieces), 0
    count = sum(map(len, rows))
    taken: list[SortedRun] = []
    while _is_due(kept, level, count):
        taken, kept = kept[1 - FAN_IN :] + taken, kept[: 1 - FAN_IN]
        count += sum(piece.row_count for piece in taken[: FAN_IN - 1])
        level += 1
    indexes = [open_index(piece) for piece in taken]
    all_rows = _sorted([part for index in indexes for part in index.all_rows()] + list(rows))
    all_positions = [part for index in indexes for part in index.all_positions()] + list(positions)
    return (*kept, _write(log, all_rows, all_positions, level))


def _is_due(pieces: Sequence[SortedRun], level: int, count: int) -> bool:
    last = pieces[1 - FAN_IN :]
    return (
        len(last) == FAN_IN - 1
        and all(piece.level == level for piece in last)
        and count + sum(piece.row_count for piece in last) <= MAX_MERGED_ROWS
    )


def _sorted(parts: Sequence[Rows]) -> Rows:
    """By (volume, block, seq), where each row of a block comes after its earlier ones already."""
    rows = np.concatenate(parts)
    keys = rows["volume"].astype("<i8") << _VOLUME_SHIFT | rows["block"]
    order = np.argsort(keys, kind="stable")
    sorted_rows: Rows = rows[order]
    return sorted_rows


def _write(log: WriteAheadLog, rows: Rows, positions: Sequence[Rows], level: int) -> SortedRun:
    start = log.piece_start()
    writer = IndexWriter(log.fd, start)
    for volume, part in by_volume([rows]):
        writer.add_rows(volume, part)
    for each in positions:
        writer.add_positions(each["seq"].astype("<i8"), np.ascontiguousarray(each["time_ns"]))
    data_bytes, fence_bytes, fence_checksum = writer.finish()
    log.append_piece(data_bytes + fence_bytes)
    first, last = positions[0][0], positions[-1][-1]
    return SortedRun(
        log.tail, int(first["seq"]), int(first["time_ns"]), int(last["seq"]), level, len(rows),
        start + data_bytes, fence_bytes, fence_checksum,
    )  # fmt: skip
