"""More of a difference journal: staged layers, and the index that is there, become a finer index.

Rows of each run ascend, and so do those of the index: they are merged as they are read, a batch of each in
memory. What a row doesn't say is found here: a content of its own is the next in JOURNAL_BLOCKS, that of the end
snapshot is where its block map has it, and shared ones are read and checked before anything leads to them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Final

import numpy as np

from pitfs.model.blockmap import BlockMap, I64Array
from pitfs.model.transfer import UNIT_BYTES, Source
from pitfs.store.catalog.records import add_seconds
from pitfs.store.index.format import INDEX_ROW, IndexWriter
from pitfs.store.index.maps import look_up
from pitfs.store.index.merge import BY_BLOCK, Rows, merged
from pitfs.store.index.reader import JournalIndex
from pitfs.store.objects.format import ObjectKind, ObjectName, ObjectRecord
from pitfs.store.transfer.contents import OwnContents, SharedContents
from pitfs.store.transfer.staging import StagedTransfer
from pitfs.store.transfer.validation import PositionsInOrder, Run, refuse
from pitfs.store.transfer.writable_store import WritableStore, new_object

RUN_BATCH_ROWS: Final = 1 << 12  # of each run at a time: with as many as there may be some 20 MiB
_SHARED: Final = (
    (Source.SHARED_SNAPSHOT, ObjectKind.SNAPSHOT_BLOCKS), (Source.SHARED_JOURNAL, ObjectKind.JOURNAL_BLOCKS),
)  # fmt: skip


class LayersBuilder:
    """Makes the finer index.

    Args:
        staged: the layers, complete.
        before: the index that the interval has, None if it has none.
        end_maps: block maps of the snapshot at the interval's end.
    """

    def __init__(
        self, staged: StagedTransfer, store: WritableStore, before: JournalIndex | None, end_maps: Sequence[BlockMap]
    ) -> None:
        self._staged, self._store, self._before, self._end_maps = staged, store, before, end_maps
        self._out_of_order = refuse("journal", "a row that came before, or that isn't in order")

    def build(self, layer: int) -> tuple[ObjectRecord, int, dict[int, int]]:
        """Writes the index of the layers up to and with `layer` into the transfer's directory.

        Returns:
            the index, synced; the number of its rows; which seconds of which minutes it adds.

        Raises:
            RemoteProtocolError: the layers are invalid.
            CorruptionError: what is staged, the index before, or the block map is damaged.
            OSError: the disk refuses.
        """
        staged = self._staged
        name = ObjectName(ObjectKind.JOURNAL_INDEX, staged.snapshot_id, layer)
        for section in (staged.positions, staged.journal, staged.journal_blocks.checksums):
            section.verify()
        with (
            closing(SharedContents(staged, self._store)) as shared,
            new_object(staged.directory, name) as fd,
        ):
            shared.find()
            writer = IndexWriter(fd)
            row_count = self._add_rows(writer, shared)
            minutes = self._add_positions(writer)
            index = self._store.complete(fd, name, *writer.finish())
            return index, row_count, minutes

    def _add_rows(self, writer: IndexWriter, shared: SharedContents) -> int:
        """Merges the rows; returns their number."""
        runs, row_count = self._staged.runs, 0
        ends = [*(run.row for run in runs[1:]), None]
        merging = [self._rows(run, end, shared) for run, end in zip(runs, ends, strict=True)]
        if self._before is not None:
            merging.append(self._before.all_rows())
        for rows in merged(merging, BY_BLOCK, self._out_of_order):
            writer.add_rows(rows)
            row_count += len(rows)
        return row_count

    def _add_positions(self, writer: IndexWriter) -> dict[int, int]:
        """Merges the positions; returns the seconds of minutes that they lie in."""
        merging = [self._staged.positions.rows()]
        if self._before is not None:
            merging.append(self._before.all_positions())
        check, minutes = PositionsInOrder(self._staged.manifest), dict[int, int]()
        for positions in merged(merging, ("seq",), self._out_of_order):
            check.take(positions)
            writer.add_positions(positions)
            add_seconds(minutes, positions["time_ns"])
        check.finish()
        return minutes

    def _rows(self, run: Run, end: int | None, shared: SharedContents) -> Iterator[Rows]:
        """A run's rows, before number `end`, as the index has them."""
        staged, shared_before = self._staged, run.shared
        layout = self._store.layout
        start = (staged.manifest.base_bytes + run.unit * UNIT_BYTES) // layout.unit_bytes
        first = layout.pointer(ObjectName(ObjectKind.JOURNAL_BLOCKS, staged.snapshot_id), start)
        own = OwnContents(staged.journal_blocks, self._store, first, run.block)
        for rows in staged.journal.rows(run.row, end, RUN_BATCH_ROWS):
            found = np.zeros(len(rows), INDEX_ROW)
            for key in BY_BLOCK:
                found[key] = rows[key]
            mine = rows["source"] == Source.JOURNAL
            found["pointer"][mine], found["checksum"][mine] = own.of(rows["volume"][mine])
            for source, kind in _SHARED:
                of_kind = rows["source"] == source
                units = rows["unit"][of_kind] // np.uint64(layout.wire_units)
                found["pointer"][of_kind] = units + np.uint64(layout.pointer(ObjectName(kind, staged.snapshot_id)))
            sharing = np.flatnonzero(rows["source"] >= Source.SHARED_SNAPSHOT)
            found["checksum"][sharing] = shared.part(shared_before, len(sharing))
            shared_before += len(sharing)
            self._look_up(found, np.flatnonzero(rows["source"] == Source.SNAPSHOT))
            yield found

    def _look_up(self, found: Rows, places: I64Array) -> None:
        """Pointers and checksums of rows whose content the end snapshot has in their block."""
        end = look_up(self._end_maps, found["volume"][places], found["block"][places])
        found["pointer"][places], found["checksum"][places] = end
        ours = ObjectName(ObjectKind.SNAPSHOT_BLOCKS, self._staged.snapshot_id).number
        if (found["pointer"][places] >> np.uint64(self._store.layout.unit_bits) != ours).any():
            raise refuse("journal", "a row leads to the snapshot's content of a block that the interval didn't write")
