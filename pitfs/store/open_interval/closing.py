"""The closing of an open interval: a snapshot, and a difference journal at every write (figure 9).

The rows of all its sorted runs are merged as they are read, by (volume, block, seq). So all writes to a block are
neighbours, oldest first, and one look at the next row tells the last of them:

    block 7: seq 11, 14, 19      the content of 19 is the end snapshot's: it goes to snapshot-<s>.blocks, and the
                                 row to the block map; those of 11 and 14 only the journal needs: they go to
                                 journal-<s>.blocks; all three rows go to the index

Contents are copied in the order of the rows, so those of neighbouring blocks are neighbours afterwards. A closing takes
bounded memory, whatever the interval's length, and gives the same bytes whenever it is made again:

    made in staging/closing-<s>/ → each file synced → renamed to objects/ → both directories synced
    → the catalog commits: the snapshot takes the place of the open interval → the WAL is removed
"""

from __future__ import annotations

import itertools
import os
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Final

import numpy as np
import numpy.typing as npt

from pitfs.errors import CorruptionError
from pitfs.model.blockmap import U64Array
from pitfs.model.transfer import Bookmark, Manifest, TransferKind
from pitfs.storage.files import open_fd, storage_error, write_all
from pitfs.store.catalog.records import Commit, OpenInterval, Snapshot
from pitfs.store.index.format import IndexWriter
from pitfs.store.index.maps import FLUSH_BYTES, MapWriter
from pitfs.store.index.merge import BY_BLOCK, Rows, by_volume, merged
from pitfs.store.index.reader import chunk_cache
from pitfs.store.objects.format import HEADER_BYTES, Layout, ObjectKind, ObjectName, ObjectRecord
from pitfs.store.open_interval.sorted_runs import open_run
from pitfs.store.transfer.recovery import StagingArea
from pitfs.store.transfer.writable_store import WritableStore, new_object

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


class _Contents:
    """A contents object that is filled from the WAL, through a bounded buffer.

    Args:
        fd, name: of the object. wal_fd, wal_path: of the WAL. layout: of the store.
    """

    def __init__(self, fd: int, name: ObjectName, wal_fd: int, wal_path: str, layout: Layout) -> None:
        self._layout = layout
        self._fd, self._name, self._wal_fd, self._wal_path = fd, name, wal_fd, wal_path
        self._units = 0
        self._buffer = memoryview(bytearray(FLUSH_BYTES))
        self._used = self._written = 0

    def add(self, pointers: U64Array, units: U64Array) -> U64Array:
        """Copies the blocks at these pointers of the WAL, of so many units; returns pointers to the copies."""
        if not len(pointers):
            return pointers
        ends = np.cumsum(units, dtype="<u8")
        follows = pointers[1:] == pointers[:-1] + units[:-1]
        cuts = [0, *(np.flatnonzero(~follows) + 1).tolist(), len(pointers)]
        starts = map(self._layout.offset_of, pointers[cuts[:-1]].tolist())
        run_ends = [0, *ends[np.array(cuts[1:]) - 1].tolist()]
        for start, (low, high) in zip(starts, itertools.pairwise(run_ends), strict=True):
            self._copy(start, (high - low) * self._layout.unit_bytes)
        found: U64Array = np.uint64(self._layout.pointer(self._name, self._units)) + ends - units
        self._units += int(ends[-1])
        return found

    def _copy(self, offset: int, size: int) -> None:
        while size:
            if self._used == len(self._buffer):
                self._flush()
            count = os.preadv(self._wal_fd, (self._buffer[self._used : self._used + size],), offset)
            if not count:
                raise CorruptionError(self._wal_path, offset, "the log ends here")
            self._used, offset, size = self._used + count, offset + count, size - count

    def _flush(self) -> None:
        write_all(self._fd, self._buffer[: self._used], HEADER_BYTES + self._written)
        self._written, self._used = self._written + self._used, 0

    def finish(self, store: WritableStore) -> list[ObjectRecord]:
        """The object, durable; none if nothing is in it."""
        self._flush()
        return [store.complete(self._fd, self._name, self._units * self._layout.unit_bytes)] if self._units else []


class Closing:
    """Makes a snapshot of an open interval, at once (`run`) or in a thread of its own (`start`, `join`).

    Args:
        record: the interval as the catalog has it, with a mark.
        area: staging/ of the store.
    """

    def __init__(self, record: OpenInterval, store: WritableStore, area: StagingArea) -> None:
        self.record, self._store, self._area = record, store, area
        self._wal_path = store.objects.path_of(record.wal)
        self._units = store.block_units
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
        record, store, snapshot_id = self.record, self._store, self.record.end_snapshot_id
        with ExitStack() as files:
            wal_fd = files.enter_context(open_fd(self._wal_path, os.O_RDONLY))
            names = [ObjectName(kind, snapshot_id) for kind in ObjectKind]
            fds = [files.enter_context(new_object(directory, name)) for name in names]
            map_fd, snapshot_fd, index_fd, journal_fd = fds
            map_name, snapshot_name, index_name, journal_name = names
            snapshot = _Contents(snapshot_fd, snapshot_name, wal_fd, self._wal_path, store.layout)
            journal = _Contents(journal_fd, journal_name, wal_fd, self._wal_path, store.layout)
            roots_before = store.catalog.roots(record.base_snapshot_id)
            maps = MapWriter(map_fd, snapshot_id, store.volumes, roots_before, store.load_node, store.layout)
            writer = IndexWriter(index_fd)
            block_count, row_count = self._write_rows(maps, writer, snapshot, journal)
            objects = [*snapshot.finish(store), *journal.finish(store)]
            objects.append(store.complete(index_fd, index_name, *writer.finish()))
            manifest = streamed_manifest(
                record.mark, (record.from_seq, record.from_time_ns), (record.to_seq, record.to_time_ns),
                record.protected_through_ns, record.bookmark, record.first_time_ns, block_count, row_count,
                f"tail-{record.id:016x}",
            )  # fmt: skip
            roots, lengths = maps.finish(manifest)
            objects.insert(0, store.complete(map_fd, map_name, *lengths))
        interval = replace(record.interval, cause=CAUSE, journal_rows=row_count)
        made = Snapshot(snapshot_id, record.to_seq, record.to_time_ns, record.mark)
        return Commit(manifest, made, roots, interval, objects, open_interval_id=record.id)

    def _write_rows(
        self, maps: MapWriter, writer: IndexWriter, snapshot: _Contents, journal: _Contents
    ) -> tuple[int, int]:
        """Everything but what is written at the end; returns how many blocks were written, and rows."""
        indexes = [open_run(self._store.objects, run, chunk_cache(1)) for run in self.record.runs]
        out_of_order = CorruptionError(self._wal_path, 0, "rows of sorted runs that don't ascend")
        block_count = row_count = 0
        held: Rows | None = None  # the last row: the next one tells whether it is its block's last
        for batch in merged([index.all_rows() for index in indexes], BY_BLOCK, out_of_order):
            rows = batch if held is None else np.concatenate([held, batch])
            same = (rows["volume"][1:] == rows["volume"][:-1]) & (rows["block"][1:] == rows["block"][:-1])
            block_count += self._write(rows[:-1], ~same, maps, writer, snapshot, journal)
            row_count += len(batch)
            held = rows[-1:].copy()
            del batch, rows, same  # before the next batch is made: it takes as much again
        if held is not None:
            block_count += self._write(held, np.ones(1, np.bool_), maps, writer, snapshot, journal)
        for index in indexes:
            for positions in index.all_positions():
                writer.add_positions(positions)
        return block_count, row_count

    def _write(
        self, rows: Rows, is_last: npt.NDArray[np.bool_], maps: MapWriter, writer: IndexWriter,
        snapshot: _Contents, journal: _Contents,
    ) -> int:  # fmt: skip
        """Rows in order; returns how many of them are their block's last."""
        rows, stored = rows.copy(), rows["pointer"] != 0
        for contents, which in ((snapshot, stored & is_last), (journal, stored & ~is_last)):
            rows["pointer"][which] = contents.add(rows["pointer"][which], self._units[rows["volume"][which]])
        writer.add_rows(rows)
        last = rows[is_last]
        for volume, part in by_volume(last):
            maps.update(volume, *(np.ascontiguousarray(part[name]) for name in ("block", "pointer", "checksum")))
        return len(last)
