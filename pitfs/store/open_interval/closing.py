"""The closing of a tail: from its log and pieces to a snapshot and a difference journal at every write (figure 9).

Rows of all pieces are merged as they are read, by (volume, block, seq). The last row of a block is the fourth
snapshot's: its content goes to the snapshot, all others' to the journal, each in that order. So a closing takes a
bounded amount of memory, whatever the tail's length, and gives the same bytes whenever it is made again:

    made in staging/closing-<s>/ → each file synced → renamed to objects/ → both directories synced
    → the catalog commits: the interval takes the place of the tail → the log is removed
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Final

import numpy as np
import numpy.typing as npt

from pitfs.errors import CorruptionError, RemoteProtocolError
from pitfs.model.blockmap import MapEntry, U64Array
from pitfs.model.ladder import LAST_LAYER
from pitfs.model.transfer import UNIT_BYTES, Bookmark, Manifest, TransferKind, VolumeInfo
from pitfs.storage.files import fsync_directory, storage_error, write_all
from pitfs.store.catalog.catalog import Catalog
from pitfs.store.catalog.records import Commit, OpenInterval, Snapshot
from pitfs.store.index.block_maps import NodeReader
from pitfs.store.index.reader import chunk_cache
from pitfs.store.index.writer import IndexWriter
from pitfs.store.objects.format import (
    HEADER_BYTES,
    UNIT_MASK,
    ObjectHeader,
    ObjectKind,
    ObjectRecord,
    contents_object,
    object_file,
    pointer,
)
from pitfs.store.objects.pool import ObjectPool
from pitfs.store.objects.publishing import complete, create
from pitfs.store.open_interval.sorted_runs import Rows, open_piece
from pitfs.store.open_interval.writer import log_file
from pitfs.store.transfer.build import FLUSH_BYTES, MapWriter, by_volume
from pitfs.store.transfer.layers import merged
from pitfs.store.transfer.recovery import StagingArea

CAUSE: Final = "streamed"


class _Contents:
    """A contents object that is filled from the log, through a bounded buffer.

    Args:
        directory, kind, snapshot: of the object. log: descriptor of the log, for its contents; path: for errors.
    """

    def __init__(self, directory: str, kind: ObjectKind, snapshot: int, log: int, path: str) -> None:
        self.fd = create(os.path.join(directory, object_file(kind, snapshot)))
        self._kind, self._snapshot, self._log, self._path = kind, snapshot, log, path
        self._first = pointer(contents_object(snapshot, kind), 0)
        self._units = 0
        self._buffer = memoryview(bytearray(FLUSH_BYTES))
        self._used = self._written = 0

    def add(self, pointers: U64Array, units: U64Array) -> U64Array:
        """Copies the blocks at these pointers of the log, of so many units; returns where they stand then."""
        if not len(pointers):
            return pointers
        ends = np.cumsum(units, dtype="<u8")
        follows = pointers[1:] == pointers[:-1] + units[:-1]
        cuts = [0, *(np.flatnonzero(~follows) + 1).tolist(), len(pointers)]
        starts = (pointers[cuts[:-1]] & np.uint64(UNIT_MASK)).tolist()
        run_ends = [0, *ends[np.array(cuts[1:]) - 1].tolist()]
        for start, (low, high) in zip(starts, itertools.pairwise(run_ends), strict=True):
            self._copy(HEADER_BYTES + start * UNIT_BYTES, (high - low) * UNIT_BYTES)
        found: U64Array = np.uint64(self._first + self._units) + ends - units
        self._units += int(ends[-1])
        return found

    def _copy(self, offset: int, size: int) -> None:
        while size:
            if self._used == len(self._buffer):
                self._flush()
            count = os.preadv(self._log, (self._buffer[self._used : self._used + size],), offset)
            if not count:
                raise CorruptionError(self._path, offset, "the log ends here")
            self._used, offset, size = self._used + count, offset + count, size - count

    def _flush(self) -> None:
        write_all(self.fd, self._buffer[: self._used], HEADER_BYTES + self._written)
        self._written, self._used = self._written + self._used, 0

    def finish(self, history: bytes) -> ObjectRecord | None:
        """The object, durable; None if nothing is in it."""
        self._flush()
        if not self._units:
            return None
        return complete(self.fd, ObjectHeader(self._kind, history, self._snapshot, self._units * UNIT_BYTES))


class Closing:
    """Makes an interval of a tail that was closed, at once (`run`) or in a thread of its own (`start`, `join`).

    Args:
        tail: as the catalog has it, with a mark.
        objects, nodes: of the store; area: its staging.
    """

    def __init__(
        self, tail: OpenInterval, catalog: Catalog, objects: ObjectPool, nodes: NodeReader, area: StagingArea,
        history: bytes, volumes: Sequence[VolumeInfo],
    ) -> None:  # fmt: skip
        self.tail = tail
        self._catalog, self._objects, self._nodes, self._area = catalog, objects, nodes, area
        self._history, self._volumes = history, volumes
        self._units = np.array([volume.block_size // UNIT_BYTES for volume in volumes], "<u8")
        self._log_path = os.path.join(objects.directory, log_file(tail.id))
        self._thread = threading.Thread(target=self._run_in_thread, name=f"closing {tail.mark}")
        self._error: BaseException | None = None

    def start(self) -> None:
        self._thread.start()

    @property
    def is_done(self) -> bool:
        return not self._thread.is_alive()

    def join(self) -> None:
        """Waits until it is done, and raises what `run` raised there."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run_in_thread(self) -> None:
        try:
            self.run()
        except BaseException as error:
            self._error = error

    def run(self) -> None:
        """Makes the objects, commits, and removes the log.

        Raises:
            CorruptionError: pieces or block maps aren't what was written.
            CapacityError, PitfsError: the disk is full, or refuses.
        """
        try:
            directory = self._area.closing_directory(self.tail.end_snapshot_id)
            try:
                commit = self._build(directory)
            except RemoteProtocolError as error:  # rows that don't ascend: of a peer elsewhere, here of our own disk
                raise CorruptionError(self._log_path, 0, str(error)) from error
            for facts in commit.objects:
                os.rename(os.path.join(directory, facts.name), os.path.join(self._objects.directory, facts.name))
            fsync_directory(self._objects.directory)
            fsync_directory(directory)
            self._catalog.commit(commit)
            self._objects.forget(ObjectKind.JOURNAL_BLOCKS, self.tail.id)
            with suppress(FileNotFoundError):
                os.unlink(self._log_path)
            self._area.clear(directory)
        except OSError as error:
            raise storage_error(error, str(error.filename or self._log_path), "closing an interval") from error

    def _build(self, directory: str) -> Commit:
        tail, fds = self.tail, list[int]()
        try:
            fds.append(os.open(self._log_path, os.O_RDONLY | os.O_CLOEXEC))
            kinds = ObjectKind.SNAPSHOT_BLOCKS, ObjectKind.JOURNAL_BLOCKS
            contents = [_Contents(directory, kind, tail.end_snapshot_id, fds[0], self._log_path) for kind in kinds]
            fds += [each.fd for each in contents]
            for kind in (ObjectKind.MAP, ObjectKind.JOURNAL_INDEX):
                fds.append(create(os.path.join(directory, object_file(kind, tail.end_snapshot_id))))
            roots_before = self._catalog.roots(tail.base_snapshot_id)
            maps = MapWriter(fds[3], tail.end_snapshot_id, self._volumes, roots_before, self._nodes.load)
            writer = IndexWriter(fds[4])
            counts = self._write_rows(maps, writer, *contents)
            objects = [each.finish(self._history) for each in contents]
            lengths = writer.finish()
            index = ObjectHeader(ObjectKind.JOURNAL_INDEX, self._history, tail.end_snapshot_id, *lengths)
            objects.append(complete(fds[4], index, LAST_LAYER))
            manifest = self._manifest(*counts)
            roots, map_facts = maps.finish(manifest, self._history)
            return self._commit(manifest, roots, [map_facts, *(each for each in objects if each is not None)])
        finally:
            for fd in fds:
                os.close(fd)

    def _write_rows(
        self, maps: MapWriter, writer: IndexWriter, snapshot: _Contents, journal: _Contents
    ) -> tuple[int, int]:
        """Everything but what is written at the end; returns how many blocks were written, and rows."""
        chunks = chunk_cache(1)
        indexes = [open_piece(self._objects, piece, chunks) for piece in self.tail.runs]
        block_count = row_count = 0
        held: Rows | None = None  # the last row: the next one tells whether it is its block's last
        for batch in merged([index.all_rows() for index in indexes], ("volume", "block", "seq")):
            rows = batch if held is None else np.concatenate([held, batch])
            same = (rows["volume"][1:] == rows["volume"][:-1]) & (rows["block"][1:] == rows["block"][:-1])
            block_count += self._write(rows[:-1], ~same, maps, writer, snapshot, journal)
            row_count += len(batch)
            held = rows[-1:]
        if held is not None:
            block_count += self._write(held, np.ones(1, np.bool_), maps, writer, snapshot, journal)
        for index in indexes:
            for positions in index.all_positions():
                writer.add_positions(positions["seq"].astype("<i8"), np.ascontiguousarray(positions["time_ns"]))
        return block_count, row_count

    def _write(
        self, rows: Rows, is_last: npt.NDArray[np.bool_], maps: MapWriter, writer: IndexWriter,
        snapshot: _Contents, journal: _Contents,
    ) -> int:  # fmt: skip
        """Rows in order; returns how many of them are their block's last."""
        if not len(rows):
            return 0
        rows, stored = rows.copy(), rows["pointer"] != 0
        for contents, which in ((snapshot, stored & is_last), (journal, stored & ~is_last)):
            rows["pointer"][which] = contents.add(rows["pointer"][which], self._units[rows["volume"][which]])
        for volume, part in by_volume([rows]):
            writer.add_rows(volume, part)
        last = rows[is_last]
        for volume, part in by_volume([last] if len(last) else []):
            columns = (np.ascontiguousarray(part[name]) for name in ("block", "pointer", "checksum"))
            maps.update(volume, *columns)
        return len(last)

    def _manifest(self, block_count: int, row_count: int) -> Manifest:
        tail = self.tail
        bookmarks = () if tail.bookmark is None else (Bookmark(tail.bookmark, tail.to_seq, tail.to_time_ns),)
        return Manifest(
            mark=tail.mark,
            kind=TransferKind.INTERVAL,
            from_seq=tail.from_seq,
            from_time_ns=tail.from_time_ns,
            to_seq=tail.to_seq,
            to_time_ns=tail.to_time_ns,
            first_time_ns=tail.first_time_ns,
            protected_through_ns=tail.protected_through_ns,
            granularity_ns=0,
            cause=CAUSE,
            diff_count=block_count,
            journal_count=row_count,
            position_count=tail.to_seq - tail.from_seq,
            identity=f"tail-{tail.id:016x}",
            bookmarks=bookmarks,
        )

    def _commit(self, manifest: Manifest, roots: tuple[MapEntry, ...], objects: Sequence[ObjectRecord]) -> Commit:
        tail = self.tail
        interval = replace(tail.interval, cause=CAUSE, journal_rows=manifest.journal_count)
        snapshot = Snapshot(tail.end_snapshot_id, tail.to_seq, tail.to_time_ns, tail.mark)
        return Commit(manifest, snapshot, roots, interval, objects, open_interval_id=tail.id)
