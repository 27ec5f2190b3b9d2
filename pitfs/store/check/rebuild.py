"""Makes a store's catalog again, where it is lost, damaged, or older than the objects.

What was committed stands in the catalog's log (`store.catalog.log`). What the log doesn't have is made up from objects,
in the order of their ids: all of a store of before, what an older pitfs did, what was in a damaged part of the log.

    snapshot, roots, bookmarks, gaps    the footer of its map
    interval, its granularity           the neighbours of the snapshot; the layer in the name of its index
    open interval, its sorted runs      the write-ahead log: it is read as after a crash
    minutes                             the positions of all indexes: always

Maps that lie within an interval, or before the first snapshot of the log, are left over from a removal. Those of a
transfer in staging/, or of a closing that isn't whole, aren't committed. All is made in a file beside the catalog,
which takes its place at the end: this can be interrupted at any time, and done again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from dataclasses import astuple, dataclass, replace
from itertools import groupby
from operator import attrgetter
from typing import Final

import msgspec
import numpy as np

from pitfs.errors import CorruptionError
from pitfs.model.blockmap import MapEntry
from pitfs.model.ladder import granularity_of
from pitfs.model.position import format_instant
from pitfs.model.transfer import Manifest, TransferKind
from pitfs.storage.files import fsync_directory, open_fd, read_exactly, storage_error
from pitfs.store.catalog.catalog import Catalog
from pitfs.store.catalog.log import HEADER_BYTES as LOG_HEADER_BYTES
from pitfs.store.catalog.log import CatalogLog
from pitfs.store.catalog.records import Commit, Interval, OpenInterval, Snapshot, add_seconds
from pitfs.store.index.format import POSITIONS_VOLUME, SPARSE_INDEX
from pitfs.store.index.maps import MapFooter, node_loader
from pitfs.store.index.reader import Journals, chunk_cache
from pitfs.store.objects.format import (
    CATALOG,
    CATALOG_LOG,
    HEADER_BYTES,
    OBJECTS,
    STAGING,
    ObjectHeader,
    ObjectKind,
    ObjectName,
    ObjectRecord,
)  # fmt: skip
from pitfs.store.objects.pool import ObjectPool
from pitfs.store.open_interval.wal import MAGIC
from pitfs.store.open_interval.writer import OpenIntervalWriter
from pitfs.store.opening import changes_locked, read_store_info, take_lock
from pitfs.store.transfer.recovery import LAYERS_PREFIX
from pitfs.store.transfer.staging import read_progress
from pitfs.store.transfer.writable_store import WritableStore

CAUSE: Final = "rebuilt"
MAX_HELD_MINUTES: Final = 4096
_LOST: Final = (
    "only what objects say is known: what pruning has moved is lost (put back a copy of the log), and bookmarks "
    "where nothing was written"
)


@dataclass(frozen=True, slots=True)
class RebuildReport:
    """How many came back; `missing`: how many lines said what didn't; `old`: what the catalog is called now, or ""."""

    snapshots: int
    intervals: int
    bookmarks: int
    gaps: int
    missing: int
    old: str


def rebuild(path: str, say: Callable[[str], None], progress: Callable[[int], None]) -> RebuildReport:
    """Makes the catalog of the store at `path` again.

    Args:
        say: is told in a line what can't be got back, or is known less well.
        progress: is told the id whose objects were looked at.

    Raises:
        StoreError: it isn't a store, or a receiver writes it.
        CapacityError, PitfsError: the disk is full, or refuses.
    """
    info = read_store_info(path, parts=(OBJECTS,))
    new = os.path.join(path, f"{CATALOG}.new")
    try:
        with ExitStack() as stack:
            stack.callback(os.close, take_lock(path))
            stack.enter_context(changes_locked(path))
            for suffix in ("", "-wal", "-shm"):
                with suppress(FileNotFoundError):
                    os.unlink(new + suffix)
            history = bytes.fromhex(info.history)
            objects = stack.enter_context(closing(ObjectPool(os.path.join(path, OBJECTS), info.layout, history)))
            with closing(Catalog(new, "make")) as catalog:
                store = WritableStore(catalog, objects, node_loader(objects), history, info.volumes)
                rebuilding = _Rebuilding(path, store, say)
                with catalog.changes(durable=False):
                    rebuilding.replay_log()
                    catalog.name_no_log()
                    rebuilding.add_objects(progress)
                    rebuilding.take_up_open_intervals()
                    rebuilding.add_minutes()
                tables = "snapshots", "intervals", "bookmarks", "gaps"
                counts = {table: int(catalog.rows(f"SELECT count(*) FROM {table}")[0][0]) for table in tables}
            with open_fd(new, os.O_RDWR) as fd:
                os.fsync(fd)
            old = _swap(path, new)
            with closing(Catalog(os.path.join(path, CATALOG), "write")) as catalog:
                catalog.write_over()  # begins a log of its own
            return RebuildReport(**counts, missing=rebuilding.missing, old=old)
    except OSError as error:
        raise storage_error(error, str(error.filename or path), "rebuilding") from error


def _swap(path: str, new: str) -> str:
    """Puts the new catalog in the place of the old one; what that is called then, "" if there was none."""
    catalog = os.path.join(path, CATALOG)
    old = f"{catalog}.{format_instant(time.time_ns())}"
    was_there = os.path.exists(catalog)
    for suffix in ("-wal", "-shm", ""):
        with suppress(FileNotFoundError):
            os.rename(catalog + suffix, old + suffix)
    with suppress(OSError):  # beside it, too: it may say more than what was understood
        os.link(os.path.join(path, CATALOG_LOG), f"{old}.log")
    fsync_directory(path)  # before the new one: SQLite would take the old one's log for its
    os.rename(new, catalog)
    fsync_directory(path)
    return old if was_there else ""


def _row_count(sparse_index: bytes) -> int:
    chunks = np.frombuffer(sparse_index, SPARSE_INDEX)
    return int(chunks["rows"][chunks["volume"] != POSITIONS_VOLUME].sum())


class _Rebuilding:
    """One rebuilding of a catalog; its methods are called in their order, within a transaction.

    Attributes:
        missing: how much can't be got back.
    """

    def __init__(self, path: str, store: WritableStore, say: Callable[[str], None]) -> None:
        self._path, self._store, self._say = path, store, say
        self._catalog, self._objects, self.missing = store.catalog, store.objects, 0
        progress = read_progress(os.path.join(path, STAGING))
        self._staged = progress.snapshot_id if progress else 0
        self._first_id = 0  # the first that the log has
        self._wals: list[int] = []  # ids of journal contents without a map: the last may be logs of open intervals
        self._closings: dict[int, Manifest] = {}  # of logs whose closing had begun

    def _miss(self, line: str) -> None:
        self.missing += 1
        self._say(line)

    def replay_log(self) -> None:
        catalog, path = self._catalog, os.path.join(self._path, CATALOG_LOG)
        try:
            log = CatalogLog.open(path)
        except FileNotFoundError:
            self._say(f"{path}: missing: {_LOST}")
            return
        except CorruptionError as error:
            self._miss(f"{error}: {_LOST}")
            return
        with closing(log):
            if log.history != self._store.history:
                self._miss(f"{path}: of another store: {_LOST}")
                return
            before = self.missing
            of_damage = "{}: bytes {} to {} are damaged: what they said is made up from objects".format
            for changes in log.records(LOG_HEADER_BYTES, lambda *bounds: self._miss(of_damage(path, *bounds))):
                catalog.replay(changes)
            if log.end < log.base_end:
                self._miss(f"{path}: cut at byte {log.end}, before the end of what it began with")
        first = catalog.first_snapshot()
        if first is not None and self.missing == before:
            self._first_id = first.id

    def add_objects(self, progress: Callable[[int], None]) -> None:
        """What the log doesn't have."""
        for directory, folders, files in os.walk(self._objects.directory):
            folders.sort()  # so the ids ascend
            names = sorted(filter(None, map(ObjectName.of_file, files)), key=attrgetter("snapshot_id"))
            here = (name for name in names if self._objects.path_of(name) == os.path.join(directory, name.file))
            for number, group in groupby(here, attrgetter("snapshot_id")):
                self._add(number, {name.kind: name for name in sorted(group)})  # of indexes the finest
                progress(number)
        self._mend_chain()
        columns = "from_seq, from_time_ns, to_seq, to_time_ns, cause, row_checksum"
        for sql in (  # gaps ascend by time; their numbers aren't in the checksums
            f"CREATE TEMP TABLE ordered AS SELECT DISTINCT {columns} FROM gaps ORDER BY to_time_ns",
            "DELETE FROM gaps", "INSERT INTO gaps SELECT NULL, * FROM ordered",
        ):  # fmt: skip
            self._catalog.rows(sql)

    def _add(self, number: int, names: dict[ObjectKind, ObjectName]) -> None:
        catalog = self._catalog
        if list(names) == [ObjectKind.JOURNAL_BLOCKS]:
            self._wals = [*self._wals[-1:], number]
            return
        interval = catalog.interval_to(number)
        if interval is not None and catalog.snapshot(number) is not None:
            self._add_journal(interval, names)
            return
        if number < self._first_id or number == self._staged or self._is_known(number):
            return
        found = {kind: self._object(name) for kind, name in names.items()}
        try:
            footer = msgspec.json.decode(found[ObjectKind.MAP][1] if ObjectKind.MAP in found else b"", type=MapFooter)
        except msgspec.MsgspecError:
            self._miss(f"{names[min(names)].file}: its block map is lost or damaged: {self._bounds(number)}")
            for record, _ in found.values():
                catalog.put("objects", astuple(record))
            return
        m, before = footer.manifest, catalog.snapshot_at_seq(footer.manifest.to_seq)
        if number - 1 in self._wals and ObjectKind.JOURNAL_INDEX not in names:  # the one that is published last
            self._closings[number - 1] = m
            return
        granularity_ns, row_count = None, 0
        if ObjectKind.JOURNAL_INDEX in found and (sparse_index := found[ObjectKind.JOURNAL_INDEX][1]):
            granularity_ns, row_count = granularity_of(names[ObjectKind.JOURNAL_INDEX].layer), _row_count(sparse_index)
        if interval is None and before is not None and (m.kind is TransferKind.FULL or before.seq == m.from_seq):
            cause = m.cause if m.granularity_ns == granularity_ns else CAUSE if granularity_ns == 0 else ""
            bounds = before.seq, before.time_ns, m.to_seq, m.to_time_ns
            how = m.first_time_ns, granularity_ns, cause or f"{CAUSE}: {m.cause}", row_count
            interval = Interval(number, before.id, *bounds, *how)
        snapshot, roots = Snapshot(number, m.to_seq, m.to_time_ns, m.mark), [MapEntry(*root) for root in footer.roots]
        records = [record for record, _ in found.values() if catalog.object(record.name) is None]
        catalog.delete("intervals", "snapshot", number)
        catalog.delete("roots", "snapshot", number)
        catalog.commit(Commit(m, snapshot, roots, interval, records))

    def _add_journal(self, interval: Interval, names: dict[ObjectKind, ObjectName]) -> None:
        """Takes the index that is there in the place of the one that a log has which ends too early."""
        index, number = names.get(ObjectKind.JOURNAL_INDEX), interval.end_snapshot_id
        is_thinned = self._catalog.rows("SELECT 1 FROM removals WHERE before_id = ?", (number,))
        is_staged = os.path.exists(os.path.join(self._path, STAGING, f"{LAYERS_PREFIX}{number:016x}"))
        if index is None or index.layer == interval.layer or is_thinned or is_staged:
            return
        found = [self._object(names[kind]) for kind in (index.kind, ObjectKind.JOURNAL_BLOCKS) if kind in names]
        if sparse_index := found[0][1]:
            how = granularity_of(index.layer), CAUSE, _row_count(sparse_index)
            replaced = index._replace(layer=max(interval.layer, 0)).file
            finer = Interval(number, interval.base_snapshot_id, *interval.bounds, interval.first_time_ns, *how)
            self._catalog.commit_layers(finer, [record for record, _ in found], replaced, {})

    def _bounds(self, number: int) -> str:
        """Which instants are lost with a snapshot."""
        row = self._catalog.row("snapshots", "WHERE id < ? ORDER BY id DESC", number)
        since = f"after {format_instant(Snapshot(*row).time_ns)}" if row is not None else "from the beginning on"
        return f"instants {since} are lost, up to the next state that is listed"

    def _is_known(self, number: int) -> bool:
        """Whether the log has that snapshot, or has an interval, open or not, in the place of it."""
        row = self._catalog.row("intervals", "WHERE snapshot > ? ORDER BY snapshot", number)
        is_within = row is not None and Interval(*row).base_snapshot_id < number
        is_open = any(number == each.end_snapshot_id and self._has_wal(each) for each in self._catalog.open_intervals())
        return is_within or is_open or self._catalog.snapshot(number) is not None

    def _has_wal(self, interval: OpenInterval) -> bool:
        """Else it became a snapshot, or the log was lost."""
        return os.path.exists(self._objects.path_of(interval.wal))

    def _object(self, name: ObjectName) -> tuple[ObjectRecord, bytes]:
        """What the catalog is to know of an object, and its footer, verified; empty where it isn't what was written."""
        path, unit_bytes, header, footer = self._objects.path_of(name), self._store.layout.unit_bytes, None, b""
        data_bytes = max(0, os.path.getsize(path) - HEADER_BYTES) // unit_bytes * unit_bytes
        try:
            header = ObjectHeader.decode(read_exactly(self._objects.fd_of(name), HEADER_BYTES, 0, path), path)
            if name.kind is not ObjectKind.JOURNAL_BLOCKS:
                data_bytes = header.data_bytes
                of_footer = HEADER_BYTES + data_bytes, header.footer_checksum
                footer = self._objects.read_verified(name, header.footer_bytes, *of_footer) if of_footer[1] else b""
        except CorruptionError as error:
            self._miss(str(error))
        checksum = header.footer_checksum if header is not None else 0
        return ObjectRecord(name.file, name.kind, name.snapshot_id, data_bytes, len(footer), checksum), footer

    def _mend_chain(self) -> None:
        """Each snapshot but the last begins an interval that ends at the next one: puts those that are missing."""
        catalog = self._catalog
        sql = "SELECT id FROM snapshots WHERE id NOT IN (SELECT from_snapshot FROM intervals) ORDER BY id"
        for (number,) in catalog.rows(sql):
            start, row = catalog.snapshot(number), catalog.row("snapshots", "WHERE id > ? ORDER BY id", number)
            if start is not None and row is not None:
                end = Snapshot(*row)
                catalog.delete("intervals", "snapshot", end.id)
                bounds = start.seq, start.time_ns, end.seq, end.time_ns
                catalog.put("intervals", (end.id, start.id, *bounds, None, None, CAUSE, 0))
                self._miss(f"no instant between {format_instant(start.time_ns)} and {format_instant(end.time_ns)}")

    def take_up_open_intervals(self) -> None:
        catalog, last = self._catalog, self._catalog.last_snapshot()
        logged = [each for each in catalog.open_intervals() if catalog.snapshot(each.end_snapshot_id) is None]
        for table in ("tails", "pieces"):
            catalog.rows(f"DELETE FROM {table}")
        if last is None:
            return
        base, end = last.id, (last.seq, last.time_ns)
        wals = [number for number in self._wals if number > last.id and self._is_wal(number)]
        open_intervals = logged or [OpenInterval(number, number + 1, 0, 0, 0, 0, 0, None, 0) for number in wals]
        for place, each in enumerate(open_intervals):
            mark, protected_ns, bookmark = each.mark, each.protected_through_ns, each.bookmark
            if (m := self._closings.get(each.id)) is not None:
                mark, protected_ns = m.mark, m.protected_through_ns
                bookmark = m.bookmarks[0].name if m.bookmarks else None
            elif not each.mark and place + 1 < len(open_intervals):  # one is open behind it
                mark = catalog.meta("mark") + 1
            where = each.id, each.end_snapshot_id, base, *end, *end, None, HEADER_BYTES
            found = self._take_up(OpenInterval(*where, mark, protected_ns, bookmark))
            base, end = found.end_snapshot_id, (found.to_seq, found.to_time_ns)

    def _is_wal(self, number: int) -> bool:
        name = ObjectName(ObjectKind.JOURNAL_BLOCKS, number)
        return os.pread(self._objects.fd_of(name), len(MAGIC), HEADER_BYTES) == MAGIC

    def _take_up(self, record: OpenInterval) -> OpenInterval:
        """Puts the open interval as its write-ahead log has it; where that is damaged the receiver will say so."""
        since, minutes, found = format_instant(record.from_time_ns), dict[int, int](), replace(record, mark=0)
        try:
            writer = OpenIntervalWriter.recover(record, self._store)
            if writer is not None:
                with closing(writer):
                    minutes |= writer.make_readable()
                protected_ns = max(writer.end[1], record.protected_through_ns) if record.mark else 0
                found = replace(writer.record, protected_through_ns=protected_ns)
            elif not self._has_wal(record):
                self._miss(f"what was streamed after {since} is lost: its write-ahead log is missing")
                return found
        except CorruptionError as error:
            self._miss(f"what was streamed after {since} can't be read: {error}")
        self._catalog.put_open_interval(found, minutes, found.to_time_ns if found.runs else 0, durable=False)
        return found

    def add_minutes(self) -> None:
        """Which seconds have an instant, of all snapshots and difference journals."""
        catalog, minutes = self._catalog, dict[int, int]()
        for snapshot in catalog.snapshots():
            add_seconds(minutes, np.array([snapshot.time_ns]))
            self._put_minutes(minutes, MAX_HELD_MINUTES)
        journals = Journals(catalog, self._objects, chunk_cache(1))
        for interval in catalog.intervals():
            try:
                for positions in journals.of(interval).all_positions() if interval.granularity_ns is not None else ():
                    add_seconds(minutes, positions["time_ns"])
            except CorruptionError as error:
                span = f"between {format_instant(interval.from_time_ns)} and {format_instant(interval.to_time_ns)}"
                self._miss(f"instants {span} can't be read: {error}")
            self._put_minutes(minutes, MAX_HELD_MINUTES)
        self._put_minutes(minutes, 0)

    def _put_minutes(self, minutes: dict[int, int], most: int) -> None:
        """Puts them if there are more."""
        for minute in list(minutes) if len(minutes) > most else ():
            row = minute, minutes.pop(minute) | self._catalog.seconds(minute)
            self._catalog.put("minutes", row, "ON CONFLICT DO UPDATE SET seconds = ?2, row_checksum = ?3")
