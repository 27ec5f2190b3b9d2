"""Thinning: a difference journal is brought to a coarser rung, or goes.

What layers did is undone (`store.transfer.layers`): a new index has only the positions that end a granule of the rung,
and of each block the last row within a granule. Contents that no row has any more are made holes. Rows share contents,
so their pointers decide, not what the dropped rows had.

    a row of `removals` says that the journal changes → the new index is made in objects/ and synced
    → the catalog commits → the old index is unlinked, dead contents are punched, both are synced → the row goes

Until the row goes, `settle` finishes whatever was cut off, before or after the commit. So room always comes back.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from pitfs.errors import CorruptionError
from pitfs.model.blockmap import I64Array
from pitfs.model.ladder import LAST_LAYER, NO_LAYER, RUNGS_NS, granularity_of, layer_of
from pitfs.model.transfer import POSITION
from pitfs.storage.files import open_fd, punch
from pitfs.store.catalog.records import Interval, add_seconds
from pitfs.store.index.format import INDEX_ROW, IndexWriter
from pitfs.store.index.merge import Rows
from pitfs.store.index.reader import JournalIndex, Journals, chunk_cache
from pitfs.store.objects.format import HEADER_BYTES, ObjectKind, ObjectName, ObjectRecord
from pitfs.store.retention.levels import Thin
from pitfs.store.transfer.writable_store import WritableStore, new_object


class JournalContents:
    """Which contents of a journal's own its rows have: a count for each unit."""

    def __init__(self, store: WritableStore, snapshot_id: int) -> None:
        self.name = ObjectName(ObjectKind.JOURNAL_BLOCKS, snapshot_id)
        self.record, self._store = store.catalog.object(self.name.file), store
        self.path = store.objects.path_of(self.name)
        self.unit_count = self.record.data_bytes // store.layout.unit_bytes if self.record else 0
        self._steps = np.zeros(self.unit_count + 1, np.int32)  # how many more rows a unit has than the one before it
        self.is_empty = True

    def keep(self, rows: Rows) -> None:
        """These INDEX_ROWs have contents."""
        layout = self._store.layout
        own = rows[rows["pointer"] >> np.uint64(layout.unit_bits) == self.name.number]
        if not len(own):
            return
        self.is_empty = False
        units = (own["pointer"] & np.uint64(layout.max_units - 1)).astype(np.intp)
        ends = units + self._store.block_units[own["volume"]].astype(np.intp)
        if ends.max() >= len(self._steps):
            raise CorruptionError(self.path, HEADER_BYTES, "rows lead behind what the catalog has of it")
        np.add.at(self._steps, units, 1)
        np.add.at(self._steps, ends, -1)

    def dead(self) -> I64Array:
        """Bytes of the file that no row has, in whole blocks of the file system: int64[n, 2], from and to."""
        is_live = np.cumsum(self._steps[:-1]) > 0
        units = np.flatnonzero(np.diff(is_live, prepend=True, append=True)).reshape(-1, 2)
        block = _block_bytes(self._store)
        ranges = HEADER_BYTES + units * self._store.layout.unit_bytes
        ranges[:, 0] += -ranges[:, 0] % block
        is_end = units[:, 1] == len(is_live)  # there the file ends: what is behind is dead, too
        ranges[:, 1] += np.where(is_end, -ranges[:, 1] % block, -(ranges[:, 1] % block))
        return ranges[ranges[:, 0] < ranges[:, 1]]

    def foretell(self) -> int:
        """Bytes on the disk that `free` would give back."""
        before = allocated_bytes(self.path)
        if self.is_empty or self.record is None:
            return before
        size = HEADER_BYTES + self.record.data_bytes
        left_bytes = size + -size % _block_bytes(self._store) - int(np.diff(self.dead()).sum())
        return max(0, before - left_bytes)

    def free(self) -> int:
        """Punches what no row has, or unlinks the file; the bytes that it freed. Doing it again does no harm."""
        if self.is_empty:
            return unlink(self._store, self.name)
        if not len(dead := self.dead()):
            return 0
        before = allocated_bytes(self.path)
        with suppress(FileNotFoundError), open_fd(self.path, os.O_RDWR) as fd:
            for start, end in dead.tolist():
                punch(fd, start, end - start)
        return before - allocated_bytes(self.path)


class Thinning:
    """That of one interval.

    Args:
        before: the interval as it is, with a difference journal that is finer than the action's, or not.

    Attributes:
        before, after: the interval as the action was planned for, and as it will be.
    """

    def __init__(self, store: WritableStore, before: Interval, action: Thin) -> None:
        self._store, self.before = store, before
        self._layer = min(layer_of(action.granularity_ns), before.layer)
        self._changes_journal = self._layer != before.layer
        rows = 0 if self._layer == NO_LAYER else before.journal_rows
        self.after = replace(
            before, granularity_ns=granularity_of(self._layer), cause=action.cause, journal_rows=rows
        )  # fmt: skip
        self._contents = JournalContents(store, before.end_snapshot_id)
        self._old, self._new = (
            ObjectName(ObjectKind.JOURNAL_INDEX, before.end_snapshot_id, layer) for layer in (before.layer, self._layer)
        )  # fmt: skip
        self._index: ObjectRecord | None = None
        self._minutes: dict[int, int] = {}

    @property
    def is_due(self) -> bool:
        """Whether anything changes, be it the cause."""
        return self.after != self.before

    @property
    def weight(self) -> int:
        """Rows that are read, and units that are counted: for a bound of memory."""
        return self.before.journal_rows + self._contents.unit_count

    def foretell(self) -> int:
        """Bytes on the disk that it frees; changes nothing.

        Raises:
            CorruptionError: the journal is damaged.
        """
        if not self._changes_journal:
            return 0
        size, path = 0, self._store.objects.path_of(self._old)
        if self._layer != NO_LAYER:
            with open_fd(os.devnull, os.O_WRONLY) as fd:
                size = HEADER_BYTES + sum(self._write(fd)[:2])
        size *= self._layer != NO_LAYER  # it may have no position left
        return allocated_bytes(path) - size - -size % _block_bytes(self._store) + self._contents.foretell()

    def prepare(self) -> None:
        """Makes the new index, which the caller syncs before `change`.

        Raises:
            CorruptionError: the journal is damaged.
            OSError: the disk is full, or refuses; what was made is removed.
        """
        if not self._changes_journal or self._layer == NO_LAYER:
            return
        path = self._store.path_for(self._new)
        with suppress(FileNotFoundError):  # who has it open goes on reading what it was
            os.unlink(path)
        try:
            with new_object(os.path.dirname(path), self._new) as fd:
                self._index = self._store.complete(fd, self._new, *self._write(fd), synced=False)
        finally:
            if self._index is None or self._layer == NO_LAYER:
                self._index = None
                os.unlink(path)

    def is_still(self) -> bool:
        """Whether the interval is what it was; with the changes' lock, which recovery takes as well."""
        is_there = self._index is None or os.path.exists(self._store.objects.path_of(self._new))
        return is_there and self._store.catalog.interval_to(self.before.end_snapshot_id) == self.before

    def drop(self) -> None:
        """Takes back what `prepare` made."""
        if self._index is not None and self._store.catalog.object(self._new.file) is None:
            unlink(self._store, self._new)

    def change(self) -> None:
        """In a change of the catalog."""
        catalog = self._store.catalog
        if not self._changes_journal:
            catalog.put_interval(self.after)
            return
        catalog.clear_seconds(self.before.from_time_ns, self.before.to_time_ns)
        objects = () if self._index is None else (self._index,)
        catalog.commit_layers(self.after, objects, self._old.file, self._minutes)
        if self._contents.is_empty:
            catalog.delete("objects", "name", self._contents.name.file)

    def free(self) -> int:
        """After the commit: gives the room back; the bytes."""
        if not self._changes_journal:
            return 0
        added = 0 if self._index is None else allocated_bytes(self._store.objects.path_of(self._new))
        return unlink(self._store, self._old) + self._contents.free() - added

    def _write(self, fd: int) -> tuple[int, int, int]:
        """Writes the new index; (data_bytes, footer_bytes, footer_checksum). If no position is left there is none."""
        index = Journals(self._store.catalog, self._store.objects, chunk_cache(1)).of(self.before)
        writer, ends = IndexWriter(fd), list[npt.NDArray[np.int64]]()
        self._minutes, count = {}, 0
        for positions in self._positions(index):
            writer.add_positions(positions)
            add_seconds(self._minutes, positions["time_ns"])
            ends.append(positions["seq"].astype("<i8"))
        if not any(map(len, ends)):
            self._layer = NO_LAYER
        else:
            for rows in self._rows(index, np.concatenate(ends)):
                writer.add_rows(rows)
                self._contents.keep(rows)
                count += len(rows)
        self.after = replace(self.after, granularity_ns=granularity_of(self._layer), journal_rows=count)
        return writer.finish()

    def _positions(self, index: JournalIndex) -> Iterator[Rows]:
        """The last of each granule, but of that in which the interval ends: see `model.ladder`."""
        rung_ns, held = RUNGS_NS[self._layer], np.zeros(0, POSITION)
        for positions in index.all_positions():
            both = np.concatenate([held, positions])
            granules, held = both["time_ns"] // rung_ns, both[-1:]
            yield both[:-1][(granules[1:] != granules[:-1])]
        yield held[held["time_ns"] // rung_ns < self.before.to_time_ns // rung_ns]

    def _rows(self, index: JournalIndex, ends: I64Array) -> Iterator[Rows]:
        """Of each block the last of each granule; `ends` are the seqs with which granules end."""
        held = np.zeros(0, INDEX_ROW)
        for rows in index.all_rows():
            both = np.concatenate([held, rows])
            granules, held = ends.searchsorted(both["seq"]), both[-1:]
            is_last = granules[1:] != granules[:-1]
            for name in ("volume", "block"):
                is_last |= both[name][1:] != both[name][:-1]
            yield both[:-1][is_last & (granules[:-1] < len(ends))]
        yield held[ends.searchsorted(held["seq"]) < len(ends)]


def settle(store: WritableStore, snapshot_id: int) -> int:
    """Finishes a thinning of the interval that ends at that snapshot, whatever of it came about; the bytes freed.

    Removes indexes that the catalog doesn't have, and frees the contents that no row of the one that it has leads to.
    With the changes' lock.
    """
    indexes = [ObjectName(ObjectKind.JOURNAL_INDEX, snapshot_id, layer) for layer in range(LAST_LAYER + 1)]
    unknown = set(store.catalog.unknown_objects([name.file for name in indexes]))
    freed = sum(unlink(store, name) for name in indexes if name.file in unknown)
    interval, contents = store.catalog.interval_to(snapshot_id), JournalContents(store, snapshot_id)
    if contents.record is not None and interval is not None and interval.granularity_ns is not None:
        for rows in Journals(store.catalog, store.objects, chunk_cache(1)).of(interval).all_rows():
            contents.keep(rows)
    if contents.record is None or not contents.is_empty:
        freed += contents.free()
    return freed


def _block_bytes(store: WritableStore) -> int:
    """Of the file system."""
    return os.statvfs(store.objects.directory).f_frsize


def allocated_bytes(path: str) -> int:
    """What a file takes on the disk; 0 where there is none."""
    try:
        return os.stat(path).st_blocks * 512
    except FileNotFoundError:
        return 0


def unlink(store: WritableStore, name: ObjectName) -> int:
    """Removes an object that the catalog doesn't have any more; the bytes that it took."""
    path = store.objects.path_of(name)
    freed = allocated_bytes(path)
    store.objects.forget(name)
    with suppress(FileNotFoundError):
        os.unlink(path)
    return freed
