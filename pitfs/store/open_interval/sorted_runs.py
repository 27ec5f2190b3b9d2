"""Sorted runs: what of an open interval can be read, in the order of blocks, merged so that they stay few.

Each time that writes become readable they are a new run, of level 0. Three neighbours of one level and what comes
behind them become one run of the next level, as in an LSM tree:

    runs (level: rows)      0:5 0:5 0:5   and 5 new rows   →   1:20
                            1:20 1:20 1:20 0:5 0:5 0:5   and 5 new rows   →   2:80

In the second line the new rows and the three runs of level 0 are due, and make a run of level 1. That one and the
three of level 1 are due then: all of it becomes one run at once, so no row is written twice. The number of runs grows
with the logarithm of the interval's length, and with it what a read costs. A run that would grow beyond
MAX_MERGED_ROWS isn't merged any more, so a merge takes bounded memory and time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from pitfs.store.catalog.records import SortedRun
from pitfs.store.index.format import IndexWriter
from pitfs.store.index.merge import Rows
from pitfs.store.index.reader import ChunkCache, RowIndex
from pitfs.store.objects.format import ObjectKind, ObjectName
from pitfs.store.objects.pool import ObjectPool
from pitfs.store.open_interval.wal import WriteAheadLog

FAN_IN: Final = 4
MAX_MERGED_ROWS: Final = 1 << 18  # 10 MiB of rows: a merge of them takes some 50 ms
_VOLUME_SHIFT: Final = 46  # a volume has at most 2**36 blocks


def open_run(objects: ObjectPool, run: SortedRun, chunks: ChunkCache) -> RowIndex:
    """The run's rows and positions. Raises as RowIndex."""
    name = ObjectName(ObjectKind.JOURNAL_BLOCKS, run.open_interval_id)
    sparse_index = run.sparse_index_offset, run.sparse_index_bytes, run.sparse_index_checksum
    return RowIndex(objects, name, *sparse_index, chunks)


def add_run(
    wal: WriteAheadLog, runs: Sequence[SortedRun], rows: Sequence[Rows], positions: Sequence[Rows],
    open_index: Callable[[SortedRun], RowIndex],
) -> tuple[SortedRun, ...]:  # fmt: skip
    """Writes a new run to the WAL, merged with those before it that are due, and returns all that there are then.

    Args:
        rows, positions: INDEX_ROWs and POSITIONs of the writes behind `runs`, in the order of writing.

    Raises:
        OSError, CapacityError: the disk refuses, or is full.
        CorruptionError: a run to merge with isn't what was written.
    """
    kept, level = list(runs), 0
    count = sum(map(len, rows))
    merging: list[SortedRun] = []
    while _is_due(kept, level, count):
        count += sum(run.row_count for run in kept[1 - FAN_IN :])
        merging, kept = kept[1 - FAN_IN :] + merging, kept[: 1 - FAN_IN]
        level += 1
    indexes = [open_index(run) for run in merging]
    all_rows = _sorted([part for index in indexes for part in index.all_rows()] + list(rows))
    all_positions = [part for index in indexes for part in index.all_positions()] + list(positions)
    return (*kept, _write(wal, all_rows, all_positions, level))


def _is_due(runs: Sequence[SortedRun], level: int, count: int) -> bool:
    """Whether the last runs are of that level, and can be merged with `count` rows behind them."""
    last = runs[1 - FAN_IN :]
    return (
        len(last) == FAN_IN - 1
        and all(run.level == level for run in last)
        and count + sum(run.row_count for run in last) <= MAX_MERGED_ROWS
    )


def _sorted(parts: Sequence[Rows]) -> Rows:
    """By (volume, block, seq), where each row of a block comes after its earlier ones already."""
    rows = np.concatenate(parts)
    keys = rows["volume"].astype("<i8") << _VOLUME_SHIFT | rows["block"]
    sorted_rows: Rows = rows[np.argsort(keys, kind="stable")]
    return sorted_rows


def _write(wal: WriteAheadLog, rows: Rows, positions: Sequence[Rows], level: int) -> SortedRun:
    start = wal.run_start()
    writer = IndexWriter(wal.fd, start)
    writer.add_rows(rows)
    for each in positions:
        writer.add_positions(each)
    data_bytes, index_bytes, index_checksum = writer.finish()
    wal.append_run(data_bytes + index_bytes)
    first, last = positions[0][0], positions[-1][-1]
    return SortedRun(
        wal.open_interval_id, int(first["seq"]), int(first["time_ns"]), int(last["seq"]), level, len(rows),
        start + data_bytes, index_bytes, index_checksum,
    )  # fmt: skip
