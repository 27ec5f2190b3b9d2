"""More of a difference journal: staged layers and the index that is there become a finer index.

Rows of each run ascend, and so do those of the index: they are merged as they are read, a batch of each in
memory. What a row doesn't say is found here: a content of its own is the next in JOURNAL_BLOCKS, that of the fourth
snapshot is where the block map has it, and shared ones are read and checked before anything leads to them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pitfs.errors import PositionMismatchError
from pitfs.model.blockmap import FANOUT, FANOUT_BITS
from pitfs.model.transfer import UNIT_BYTES, Manifest, Section, Source, VolumeInfo
from pitfs.store.catalog.catalog import Catalog
from pitfs.store.catalog.records import Interval
from pitfs.store.index.block_maps import SnapshotMap
from pitfs.store.index.format import INDEX_ROW
from pitfs.store.index.reader import JournalIndex
from pitfs.store.index.writer import IndexWriter
from pitfs.store.objects.format import (
    UNIT_BITS,
    ObjectHeader,
    ObjectKind,
    ObjectRecord,
    contents_object,
    object_file,
    pointer,
)
from pitfs.store.objects.pool import ObjectPool
from pitfs.store.objects.publishing import complete, create
from pitfs.store.transfer.build import OwnContents, by_volume, second_bit
from pitfs.store.transfer.shared_contents import SharedContents
from pitfs.store.transfer.staging import StagedTransfer
from pitfs.store.transfer.validation import PositionsInOrder, RowArray, Run, refuse

_KEYS = ("volume", "block", "seq")
RUN_BATCH_ROWS = 1 << 12  # of each run at a time: with as many as there may be some 20 MiB
HELD_ROWS = 1 << 12  # of each run before it is read on


@dataclass(frozen=True, slots=True)
class BuiltLayers:
    """The new index, in staging and synced; the number of its rows; which seconds of which minutes it adds."""

    index: ObjectRecord
    row_count: int
    minutes: dict[int, int]


def interval_of(catalog: Catalog, manifest: Manifest) -> Interval:
    """The interval that the layers belong to, as the store has it.

    Raises:
        PositionMismatchError: it isn't there, or not at the granularity that they build on.
    """
    m = manifest
    snapshot = catalog.snapshot_at_seq(m.to_seq)
    interval = catalog.interval_to(snapshot.id) if snapshot else None
    hint = "begin the session anew, so that production learns where the store stands"
    if interval is None or (
        (interval.from_seq, interval.from_time_ns, interval.to_seq, interval.to_time_ns)
        != (m.from_seq, m.from_time_ns, m.to_seq, m.to_time_ns)
    ):
        raise PositionMismatchError(
            f"{catalog.path}: production sends layers of the interval from seq {m.from_seq} to {m.to_seq}, which the "
            f"store doesn't have: {hint}"
        )
    blocks = catalog.object(object_file(ObjectKind.JOURNAL_BLOCKS, interval.end_snapshot_id))
    has = interval.granularity_ns, blocks.data_bytes if blocks else 0
    if has != (m.base_granularity_ns, m.base_bytes):
        raise PositionMismatchError(
            f"{catalog.path}: production sends layers that build on granularity {m.base_granularity_ns} and "
            f"{m.base_bytes} bytes, the interval to seq {m.to_seq} has {has[0]} and {has[1]}: {hint}"
        )
    return interval


def merged(runs: Sequence[Iterator[RowArray]], keys: Sequence[str]) -> Iterator[RowArray]:
    """Rows of ascending runs as one, strictly ascending by these fields, in batches.

    Raises:
        RemoteProtocolError: two rows have the same key.
    """
    buffers: list[RowArray | None] = [next(run, None) for run in runs]
    last: tuple[int, ...] | None = None
    while True:
        # All of them anew, not the empty one alone: else each turn would look at all runs for the rows of one.
        buffers = [_filled(buffer, run) for buffer, run in zip(buffers, runs, strict=True)]
        live = [buffer for buffer in buffers if buffer is not None]
        if not live:
            return
        limit = min(tuple(int(buffer[key][-1]) for key in keys) for buffer in live)
        parts = []
        for i, buffer in enumerate(buffers):
            if buffer is not None:
                count = _count_until(buffer, keys, limit)
                parts.append(buffer[:count])
                buffers[i] = buffer[count:]
        batch = np.concatenate(parts)
        batch = batch[np.lexsort([batch[key] for key in reversed(keys)])]
        same = np.ones(len(batch) - 1, dtype=np.bool_)
        for key in keys:
            same &= batch[key][1:] == batch[key][:-1]
        if same.any() or (last is not None and tuple(int(batch[key][0]) for key in keys) <= last):
            raise refuse("journal", "a row that came before, or that isn't in order")
        last = tuple(int(batch[key][-1]) for key in keys)
        yield batch


def _filled(buffer: RowArray | None, run: Iterator[RowArray]) -> RowArray | None:
    """The rows with as many behind them as are held of a run; None where there are no more."""
    if buffer is None:
        return None
    parts, count = [buffer], len(buffer)
    while count < HELD_ROWS and (more := next(run, None)) is not None:
        parts.append(more)
        count += len(more)
    if not count:
        return None
    return np.concatenate(parts) if len(parts) > 1 else buffer


def _count_until(rows: RowArray, keys: Sequence[str], limit: tuple[int, ...]) -> int:
    """How many of ascending rows aren't after `limit`."""
    until = np.ones(len(rows), dtype=np.bool_)
    for key, value in zip(reversed(keys), reversed(limit), strict=True):
        column = rows[key]
        bound = column.dtype.type(value)
        until = (column < bound) | ((column == bound) & until)
    return int(until.sum())


class LayersBuilder:
    """Makes the finer index.

    Args:
        staged: the layers, complete.
        base: the interval as the store has it; before: its index, None if it has none.
        fourth: block maps of the snapshot at the interval's end.
        objects: of the store.
    """

    def __init__(
        self,
        staged: StagedTransfer,
        history: bytes,
        volumes: Sequence[VolumeInfo],
        base: Interval,
        before: JournalIndex | None,
        fourth: SnapshotMap,
        objects: ObjectPool,
    ) -> None:
        self._staged, self._history, self._volumes = staged, history, volumes
        self._base, self._before, self._fourth, self._objects = base, before, fourth, objects
        self._base_units = staged.manifest.base_bytes // UNIT_BYTES
        self._block_sizes = np.array([volume.block_size for volume in volumes], "<i8")

    def build(self, layer: int) -> BuiltLayers:
        """Writes the index of the layers up to and with `layer` into the transfer's directory.

        Raises:
            RemoteProtocolError: the layers can't be.
            CorruptionError: what is staged, the index before, or the block map is damaged.
            OSError: the disk refuses.
        """
        staged, snapshot = self._staged, self._base.end_snapshot_id
        for section in (Section.POSITIONS, Section.JOURNAL, Section.JOURNAL_BLOCKS):
            staged.verify(section)
        with closing(SharedContents(staged, self._block_sizes, self._objects)) as shared:
            shared.find()
            fd = create(os.path.join(staged.directory, object_file(ObjectKind.JOURNAL_INDEX, snapshot, layer)))
            try:
                writer = IndexWriter(fd)
                row_count = self._add_rows(writer, shared)
                minutes = self._add_positions(writer)
                data_bytes, tail_bytes, tail_checksum = writer.finish()
                header = ObjectHeader(
                    ObjectKind.JOURNAL_INDEX, self._history, snapshot, data_bytes, tail_bytes, tail_checksum
                )
                return BuiltLayers(complete(fd, header, layer), row_count, minutes)
            finally:
                os.close(fd)

    def _add_rows(self, writer: IndexWriter, shared: SharedContents) -> int:
        """Merges the rows; returns their number."""
        runs, row_count = [self._rows(run, end, shared) for run, end in self._runs()], 0
        if self._before is not None:
            runs.append(self._before.all_rows())
        for volume, rows in by_volume(merged(runs, _KEYS)):
            writer.add_rows(volume, rows)
            row_count += len(rows)
        return row_count

    def _add_positions(self, writer: IndexWriter) -> dict[int, int]:
        runs: list[Iterator[RowArray]] = [self._staged.rows(Section.POSITIONS, verify=False)]
        if self._before is not None:
            runs.append(self._before.all_positions())
        check, minutes = PositionsInOrder(self._staged.manifest), dict[int, int]()
        for positions in merged(runs, ("seq",)):
            seqs, times_ns = positions["seq"].astype("<i8"), np.ascontiguousarray(positions["time_ns"])
            check.take(seqs, times_ns)
            writer.add_positions(seqs, times_ns)
            for second in np.unique(times_ns // 1_000_000_000).tolist():
                minutes[second // 60] = minutes.get(second // 60, 0) | second_bit(second * 1_000_000_000)
        check.finish()
        return minutes

    def _runs(self) -> Iterator[tuple[Run, int]]:
        """Where each run of rows begins, and the row at its end."""
        journal = self._staged.journal
        yield from zip(journal.runs, [*(run.row for run in journal.runs[1:]), journal.count], strict=True)

    def _rows(self, run: Run, end: int, shared: SharedContents) -> Iterator[npt.NDArray[np.void]]:
        """A run's rows as the index has them."""
        snapshot, shared_before = self._base.end_snapshot_id, run.shared
        first = pointer(contents_object(snapshot, ObjectKind.JOURNAL_BLOCKS), self._base_units + run.unit)
        own = OwnContents(self._staged, Section.JOURNAL_BLOCKS, self._volumes, first, run.block)
        for rows in self._staged.rows(Section.JOURNAL, run.row, end, False, RUN_BATCH_ROWS):
            found = np.zeros(len(rows), INDEX_ROW)
            for key in _KEYS:
                found[key] = rows[key]
            mine = rows["source"] == Source.JOURNAL
            found["pointer"][mine], found["checksum"][mine] = own.of(rows["volume"][mine])
            for source, kind in (
                (Source.SHARED_FOURTH, ObjectKind.SNAPSHOT_BLOCKS), (Source.SHARED_JOURNAL, ObjectKind.JOURNAL_BLOCKS),
            ):  # fmt: skip
                of_kind = rows["source"] == source
                start = np.uint64(pointer(contents_object(snapshot, kind), 0))
                found["pointer"][of_kind] = rows["unit"][of_kind] + start
            sharing = np.flatnonzero(rows["source"] >= Source.SHARED_FOURTH)
            found["checksum"][sharing] = shared.checksums(shared_before, len(sharing))
            shared_before += len(sharing)
            self._look_up_fourth(found, np.flatnonzero(rows["source"] == Source.FOURTH))
            yield found

    def _look_up_fourth(self, found: npt.NDArray[np.void], places: npt.NDArray[np.int64]) -> None:
        """Pointers and checksums of rows whose content the fourth snapshot has in their block."""
        if not len(places):
            return
        volume, leaf = found["volume"][places], found["block"][places] >> FANOUT_BITS
        cuts = np.flatnonzero((volume[1:] != volume[:-1]) | (leaf[1:] != leaf[:-1])) + 1
        for part in np.split(places, cuts):
            first = found[part[0]]
            pointers, checksums = self._fourth.leaf(int(first["volume"]), int(first["block"]) >> FANOUT_BITS)
            index = found["block"][part] & (FANOUT - 1)
            found["pointer"][part], found["checksum"][part] = pointers[index], checksums[index]
        ours = contents_object(self._base.end_snapshot_id, ObjectKind.SNAPSHOT_BLOCKS)
        if (found["pointer"][places] >> np.uint64(UNIT_BITS) != ours).any():
            raise refuse("journal", "a row leads to the snapshot's content of a block that the interval didn't write")
