"""The closing of an open interval: a snapshot, and a difference journal at every write (figure 9).

The rows of all its sorted runs are merged as they are read, by (volume, block, seq). So all writes to a block are
neighbours, oldest first, and one look at the next row tells the last of them:

    block 7: seq 11, 14, 19      the content of 19 is the end snapshot's: it goes to snapshot-<s>.blocks, and the
                                 row to the block map, unless the base snapshot has it there; those of 11 and 14
                                 only the journal needs: they go to journal-<s>.blocks; all three rows go to the index

A content that is stored already isn't stored again, and zeros never are: then the row is metadata alone. So all end
contents come first, then those of the journal. Contents are copied in the order of the rows, so those of neighbouring
blocks are neighbours afterwards. A closing takes bounded memory, whatever the interval's length, and gives the same
bytes whenever it is made again:

    made in staging/closing-<s>/ → each file synced → renamed to objects/ → both directories synced
    → the catalog commits: the snapshot takes the place of the open interval → the WAL is removed
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from typing import Final

import numpy as np
import numpy.typing as npt

from pitfs.errors import CorruptionError, PitfsError
from pitfs.model.blockmap import U64Array
from pitfs.model.transfer import Bookmark, Manifest, TransferKind
from pitfs.storage.files import open_fd, storage_error
from pitfs.store.catalog.records import Commit, OpenInterval, Snapshot
from pitfs.store.index.format import INDEX_ROW, IndexWriter
from pitfs.store.index.maps import MapWriter, block_maps, look_up
from pitfs.store.index.merge import BY_BLOCK, Rows, by_volume, merged
from pitfs.store.index.reader import RowIndex, chunk_cache
from pitfs.store.objects.format import ObjectKind, ObjectName
from pitfs.store.open_interval.contents import ContentReader, ContentWriter, Deduplication
from pitfs.store.open_interval.sorted_runs import open_run
from pitfs.store.transfer.recovery import StagingArea
from pitfs.store.transfer.sections import BATCH_ROWS, StagedArray
from pitfs.store.transfer.writable_store import WritableStore, new_object

log = logging.getLogger(__name__)

CAUSE: Final = "streamed"


def streamed_manifest(
    mark: int, start: tuple[int, int], end: tuple[int, int], protected_through_ns: int, bookmark: str | None,
    first_time_ns: int | None = None, block_count: int = 0, row_count: int = 0, identity: str = "",
) -> Manifest:  # fmt: skip
    """What a transfer of the interval would have announced. `start`, `end`: positions; equal where nothing came."""
    bookmarks = () if bookmark is None else (Bookmark(bookmark, *end),)
    return Manifest(
        mark, TransferKind.INTERVAL, *start, *end, first_time_ns, protected_through_ns, 0, CAUSE,
        block_count, row_count, end[0] - start[0], identity, bookmarks=bookmarks,
    )  # fmt: skip


class _Objects:
    """The objects of a closing, filled in two passes over its rows, which wait on disk in between.

    The first pass stores what each block ends with, the second what else was written: a content of the journal may be
    one that a later block ends with.

    Args:
        directory: where they are made. files: closes them.
    """

    def __init__(
        self, record: OpenInterval, store: WritableStore, directory: str, wal_fd: int, files: ExitStack
    ) -> None:
        self._record, self._store = record, store
        self._units = store.block_units
        names = [ObjectName(kind, record.end_snapshot_id) for kind in ObjectKind]
        self._map_fd, snapshot_fd, self._index_fd, journal_fd = (
            files.enter_context(new_object(directory, name)) for name in names
        )
        self._map_name, snapshot_name, self._index_name, journal_name = names
        fds = {record.wal.number: wal_fd, snapshot_name.number: snapshot_fd, journal_name.number: journal_fd}
        self._reader = ContentReader(fds, store.objects)
        self._snapshot = ContentWriter(snapshot_fd, snapshot_name, self._reader)
        self._journal = ContentWriter(journal_fd, journal_name, self._reader)
        self._contents = Deduplication(self._reader, sum(run.row_count for run in record.runs))
        roots_before = store.catalog.roots(record.base_snapshot_id)
        self._base_maps = block_maps(store.load_node, roots_before, store.volumes)
        self._maps = MapWriter(
            self._map_fd, record.end_snapshot_id, store.volumes, roots_before, store.load_node, store.layout
        )  # fmt: skip
        self._index = IndexWriter(self._index_fd)
        self._rows, self._ends = (
            files.enter_context(closing(StagedArray(os.path.join(directory, name), INDEX_ROW, 0)))
            for name in ("rows", "ends")
        )
        self._block_count = 0

    def add_ends(self, rows: Rows, is_last: npt.NDArray[np.bool_]) -> None:
        """The next rows, as sorted runs have them, and which are their block's last: those are done here."""
        ends = rows[is_last]
        volumes, blocks, pointers, checksums = (ends[name] for name in ("volume", "block", "pointer", "checksum"))
        before, checksums_before = look_up(self._base_maps, volumes, blocks)
        units, stored = self._units[volumes], pointers != 0
        kept = self._in_base(pointers, np.where(stored & (checksums == checksums_before), before, 0), units)
        new = stored & (kept == 0)
        pointers[~new] = kept[~new]
        pointers[new] = self._contents.store(pointers[new], units[new], checksums[new], self._snapshot)
        changed = pointers != before
        for volume, part in by_volume(ends[changed]):
            self._maps.update(volume, *(np.ascontiguousarray(part[name]) for name in ("block", "pointer", "checksum")))
        self._block_count += int(changed.sum())
        rows = rows.copy()
        rows[is_last] = ends
        self._rows.append(rows.view(np.uint8).data)
        self._ends.append(ends.view(np.uint8).data)

    def _in_base(self, pointers: U64Array, proposed: U64Array, units: U64Array) -> U64Array:
        """Where the base snapshot has these contents in their blocks already, else 0."""
        try:
            return self._reader.confirmed(pointers, proposed, units)
        except (PitfsError, OSError) as error:  # of an older object: no reason not to have this interval
            log.warning("contents that may be those of the snapshot before are stored once more: %s", error)
            return np.zeros(len(pointers), "<u8")

    def add_journal(self) -> None:
        """What the rows besides the blocks' last ones need; then they go to the index."""
        unit_bits = np.uint64(self._store.layout.unit_bits)
        block, count = (-1, -1), 0  # block of the last row, and the number of blocks so far
        for rows in map(np.copy, self._rows.verified()):
            volumes, blocks, pointers, checksums = (rows[name] for name in ("volume", "block", "pointer", "checksum"))
            begins = np.ones(len(rows), np.bool_)
            begins[1:] = (volumes[1:] != volumes[:-1]) | (blocks[1:] != blocks[:-1])
            begins[0] = block != (int(volumes[0]), int(blocks[0]))
            numbers = np.cumsum(begins) + count - 1
            block, count = (int(volumes[-1]), int(blocks[-1])), int(numbers[-1]) + 1
            ends = self._ends.part(int(numbers[0]), count - int(numbers[0]))[numbers - numbers[0]]
            units, new = self._units[volumes], pointers >> unit_bits == self._record.wal.number
            proposed = np.where(new & (checksums == ends["checksum"]), ends["pointer"], 0)
            found = self._reader.confirmed(pointers, proposed, units)
            pointers[found != 0] = found[found != 0]
            new &= found == 0
            pointers[new] = self._contents.store(pointers[new], units[new], checksums[new], self._journal)
            self._index.add_rows(rows)

    def finish(self, positions: Iterable[Rows]) -> Commit:
        """All objects, durable, and what is to be committed of them."""
        record, store = self._record, self._store
        for each in positions:
            self._index.add_positions(each)
        objects = [*self._snapshot.finish(store), *self._journal.finish(store)]
        objects.append(store.complete(self._index_fd, self._index_name, *self._index.finish()))
        manifest = streamed_manifest(
            record.mark, (record.from_seq, record.from_time_ns), (record.to_seq, record.to_time_ns),
            record.protected_through_ns, record.bookmark, record.first_time_ns, self._block_count, self._rows.count,
            f"tail-{record.id:016x}",
        )  # fmt: skip
        roots, lengths = self._maps.finish(manifest)
        objects.insert(0, store.complete(self._map_fd, self._map_name, *lengths))
        interval = replace(record.interval, cause=CAUSE, journal_rows=self._rows.count)
        made = Snapshot(record.end_snapshot_id, record.to_seq, record.to_time_ns, record.mark)
        return Commit(manifest, made, roots, interval, objects, open_interval_id=record.id)


class Closing:
    """Makes a snapshot of an open interval, at once (`run`) or in a thread of its own (`start`, `join`).

    Args:
        record: the interval as the catalog has it, with a mark.
        area: staging/ of the store.
    """

    def __init__(self, record: OpenInterval, store: WritableStore, area: StagingArea) -> None:
        self.record, self._store, self._area = record, store, area
        self._wal_path = store.objects.path_of(record.wal)
        self._running: Future[None] = Future()

    def start(self) -> None:
        thread = ThreadPoolExecutor(1, f"closing {self.record.mark}")
        self._running = thread.submit(self.run)
        thread.shutdown(wait=False)

    @property
    def is_done(self) -> bool:
        return self._running.done()

    def join(self) -> None:
        """Waits until it is done, and raises what `run` raised there."""
        self._running.result()

    def run(self) -> None:
        """Makes the objects, commits, and removes the WAL.

        Raises:
            CorruptionError: sorted runs or block maps aren't what was written.
            CapacityError, PitfsError: the disk is full, or refuses.
        """
        try:
            directory = self._area.closing_directory(self.record.end_snapshot_id)
            commit = self._build(directory)
            self._store.publish(directory, commit.objects)
            self._store.catalog.commit(commit)
            self._store.objects.forget(self.record.wal)
            with suppress(FileNotFoundError):
                os.unlink(self._wal_path)
            self._area.clear(directory)
        except OSError as error:
            raise storage_error(error, str(error.filename or self._wal_path), "closing an interval") from error

    def _build(self, directory: str) -> Commit:
        """Makes the objects in that directory, each complete and durable."""
        with ExitStack() as files:
            wal_fd = files.enter_context(open_fd(self._wal_path, os.O_RDONLY))
            objects = _Objects(self.record, self._store, directory, wal_fd, files)
            indexes = [open_run(self._store.objects, run, chunk_cache(1)) for run in self.record.runs]
            for rows, is_last in self._rows(indexes):
                objects.add_ends(rows, is_last)
            objects.add_journal()
            return objects.finish(positions for index in indexes for positions in index.all_positions())

    def _rows(self, indexes: Sequence[RowIndex]) -> Iterator[tuple[Rows, npt.NDArray[np.bool_]]]:
        """All rows in order, and which of them are their block's last, in bounded batches."""
        out_of_order = CorruptionError(self._wal_path, 0, "rows of sorted runs that don't ascend")
        held = np.zeros(0, INDEX_ROW)  # the last row: the next one tells whether it is its block's last
        for batch in merged([index.all_rows() for index in indexes], BY_BLOCK, out_of_order):
            for start in range(0, len(batch), BATCH_ROWS):
                rows = np.concatenate([held, batch[start : start + BATCH_ROWS]])
                same = (rows["volume"][1:] == rows["volume"][:-1]) & (rows["block"][1:] == rows["block"][:-1])
                held = rows[-1:].copy()
                yield rows[:-1], ~same
            del batch, rows, same  # before the next batch is made: it takes as much again
        yield held, np.ones(len(held), np.bool_)
