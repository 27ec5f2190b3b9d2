"""`pitfs check`: all that a store has is read and compared, beside a receiver, readers and removals.

Each row of the catalog, the header and size of each object, each node of a block map and each chunk of an index are
read once; with `has_data` each content, too. What is damaged is noted, and the check goes on. What was removed while it
was looked at is no damage: the catalog is asked again, and the walk goes on from the newest snapshot that is left.

The file `check.progress` in the store (`check-data.progress` of a check with contents), as JSON, says how far it came
and when it was done. A check that was stopped goes on from there.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from typing import Final

import msgspec
import numpy as np

from pitfs.errors import CorruptionError, PitfsError
from pitfs.model.blockmap import FANOUT, FANOUT_BITS, POINTERS
from pitfs.model.transfer import VolumeInfo
from pitfs.storage.files import durable_replace
from pitfs.store.catalog.catalog import Catalog
from pitfs.store.catalog.records import Snapshot
from pitfs.store.check.suffering import Stretch, Suffering, uncovered
from pitfs.store.check.walk import IN_CATALOG, Found, Journal, Walk
from pitfs.store.index.merge import Rows
from pitfs.store.objects.damage import MAX_PLACES, Damage, DamageLog
from pitfs.store.objects.format import CATALOG, HEADER_BYTES, ObjectKind, ObjectName, ObjectRecord
from pitfs.store.objects.pool import ObjectPool
from pitfs.store.open_interval.contents import ContentReader
from pitfs.store.opening import read_store_info
from pitfs.store.store import Store
from pitfs.store.transfer.sections import checksums_of

PROGRESS: Final = {False: "check.progress", True: "check-data.progress"}
BATCH_BYTES: Final = 128 << 20  # of contents, sorted by their places: 11 MiB of rows if blocks have 512 bytes
AHEAD_BYTES: Final = 8 << 20  # that the kernel reads while those before them are compared
SAVE_S: Final = 10.0
_CONTENT: Final = np.dtype(  # owner: id of the snapshot, minus that of the open interval; seq: 0 in a map
    [("pointer", "<u8"), ("checksum", "<u8"), ("block", "<i8"), ("seq", "<i8"), ("owner", "<i8"), ("volume", "<u2")]
)


class Progress(msgspec.Struct):
    """How far a check came: all of the history up to write `seq`, and of the next snapshot's map up to that leaf.

    Attributes:
        finished_ns: 0 while it is under way. found: so far.
    """

    has_data: bool
    seq: int = -1
    volume: int = 0
    leaf: int = 0
    objects: int = 0
    bytes: int = 0
    finished_ns: int = 0
    found: list[Damage] = []

    @classmethod
    def read(cls, store: str, has_data: bool) -> Progress:
        """Of the last check of that kind, finished or not; of a new one where there was none."""
        try:
            with open(os.path.join(store, PROGRESS[has_data]), "rb") as file:
                return msgspec.json.decode(file.read(), type=cls)
        except (OSError, msgspec.MsgspecError):
            return cls(has_data)

    def save(self, store: str) -> None:
        with suppress(OSError):  # a store that can't be written is checked all the same
            durable_replace(os.path.join(store, PROGRESS[self.has_data]), msgspec.json.encode(self))


class Report(msgspec.Struct, frozen=True):
    """objects, bytes (of contents): that were read; damaged: with the stretches of instants that suffer from it."""

    objects: int
    bytes: int
    damaged: list[tuple[Damage, list[Stretch]]]


def at_rate(rate: int | None, reached: Callable[[int], None] = lambda count: None) -> Callable[[int], None]:
    """For `check`: waits, where it reads more bytes than that a second, and says how many were read so far."""
    next_s, total = time.monotonic(), 0

    def paced(count: int) -> None:
        nonlocal next_s, total
        total += count
        reached(total)
        if rate is not None:
            next_s = max(next_s, time.monotonic() - 1) + count / rate
            time.sleep(max(0, next_s - time.monotonic()))

    return paced


def contents_bytes(path: str) -> int:
    """How many bytes a check with contents will read, about. Raises StoreError, CorruptionError."""
    read_store_info(path)
    with closing(Catalog(os.path.join(path, CATALOG))) as catalog:
        return int(catalog.rows("SELECT ifnull(sum(data_bytes), 0) FROM objects WHERE kind IN (2, 4)")[0][0])


def check(path: str, has_data: bool, paced: Callable[[int], None]) -> Report:
    """Checks a store, from where a check of the same kind was stopped; the store remembers exactly what it finds.

    Args:
        paced: called with how many bytes of contents were read; may wait, or raise to stop.

    Raises:
        StoreError: it is no store. PitfsError: the disk refuses.
    """
    log, progress = DamageLog(path), Progress.read(path, has_data)
    known = set(log.known())
    if progress.finished_ns:
        progress = Progress(has_data)
    found = Found(path, progress.found)
    try:
        with closing(Store.open(path)) as store, closing(Catalog(os.path.join(path, CATALOG))) as catalog:
            store.objects.damage = found
            _Check(catalog, store.objects, store.volumes, found, progress, paced).run()
            damaged = Suffering(catalog, store.objects, store.volumes, found).run() if found.places else []
    except CorruptionError:
        found.note(IN_CATALOG)
        damaged = [(each, []) for each in uncovered(found.places.values())]

    def remembered(now: list[Damage]) -> list[Damage]:
        """What was found, and what others met meanwhile, or in contents that weren't looked at."""
        kept = (each for each in now if each not in known or (each.kind == "content" and not has_data))
        return [*found.places.values(), *(each for each in kept if each.place not in found.places)]

    with suppress(PitfsError):
        log.update(remembered)
    progress.finished_ns = time.time_ns()
    progress.save(path)
    return Report(progress.objects, progress.bytes, damaged)


class _Check(Walk):
    """One check. Removals may go on beside it: what is found while they take away what it looks at doesn't count."""

    def __init__(
        self, catalog: Catalog, objects: ObjectPool, volumes: Sequence[VolumeInfo], found: Found, progress: Progress,
        paced: Callable[[int], None],
    ) -> None:  # fmt: skip
        super().__init__(catalog, objects, volumes, found)
        self._progress, self._paced = progress, paced
        self._unit_bytes = np.uint64(objects.layout.unit_bytes)
        self._units = np.array([each.block_size for each in volumes], "<u8") // self._unit_bytes
        self._reader = ContentReader({}, objects)
        self._batch: list[Rows] = []
        self._batch_bytes, self._saved_s = 0, time.monotonic()

    def run(self) -> None:
        """All of it."""
        if self._progress.seq < 0 and not self._progress.volume and not self._progress.leaf:
            self._check_catalog()
        with self._noting_catalog():
            self._check_history()
            while not self._counts(self._check_open):  # it was closed meanwhile
                self._check_history()
        self._verify()

    @contextmanager
    def _noting_catalog(self) -> Iterator[None]:
        try:
            yield
        except CorruptionError:
            self.found.note(IN_CATALOG)

    def _counts(self, step: Callable[[], Callable[[], bool]]) -> bool:
        """Whether what a step found counts: it gives a function that says whether what it looked at is still there."""
        before = dict(self.found.places)
        is_there = step()
        if len(self.found.places) == len(before) or is_there():
            for each in list(self.found.places.values())[len(before) :]:
                self.found.remember(each)
            return True
        contents = {place: each for place, each in self.found.places.items() if each.kind == "content"}
        self.found.places = before | contents  # these may be of other steps, and were looked at by themselves
        return False

    def _check_catalog(self) -> None:
        """Every row, and every object that one names."""
        with self._noting_catalog():
            if self.catalog.rows("PRAGMA integrity_check(1)") != [("ok",)]:
                self.found.note(IN_CATALOG)
        self._progress.objects = 0
        for (table,) in self.catalog.rows("SELECT name FROM sqlite_master WHERE type = 'table'"):
            with self._noting_catalog():
                for row in self.catalog.all_rows(table):
                    if table == "objects":
                        self._counts(partial(self._check_object, ObjectRecord(*row)))

    def _check_object(self, record: ObjectRecord) -> Callable[[], bool]:
        self._progress.objects += 1
        name = ObjectName.of_file(record.name)
        if name is not None and (fd := self.tried(lambda: self.objects.fd_of(name))) is not None:
            footer, size = HEADER_BYTES + record.data_bytes, os.fstat(fd).st_size
            if size < footer + record.footer_bytes:
                self.found.note(Damage(record.name, size, footer + record.footer_bytes - size, "missing"))
            elif name.kind is ObjectKind.MAP:
                place = record.footer_bytes, footer, record.footer_checksum
                self.tried(lambda: self.objects.read_verified(name, *place))
        return lambda: self.catalog.object(record.name) == record

    def _check_history(self) -> None:
        """What each snapshot and each interval has that those before it haven't, from where the progress says."""
        progress = self._progress
        before = self.catalog.snapshot_at_seq(progress.seq)
        while (snapshot := self.after(before)) is not None:
            if self._counts(partial(self._check_step, before, snapshot)):
                before = snapshot
            else:
                before = before and self.catalog.snapshot_at_seq(before.seq)
            progress.seq, progress.volume, progress.leaf = before.seq if before else -1, 0, 0

    def _check_step(self, before: Snapshot | None, snapshot: Snapshot) -> Callable[[], bool]:
        progress = self._progress
        interval = self.interval(before, snapshot) if before is not None else None
        journal = self.journal(interval) if interval is not None and not progress.volume + progress.leaf else None
        if journal is not None:
            own = ObjectName(ObjectKind.JOURNAL_BLOCKS, snapshot.id)
            self._check_journal(journal, [own.number], snapshot.id)
        roots = list(zip(self.roots(before), self.roots(snapshot), strict=True))
        for volume in range(progress.volume, len(roots)):
            for leaf, *leaves in self.leaves(volume, *roots[volume], progress.leaf, lambda sign, pointer: None):
                slots = np.flatnonzero((leaves[0] != leaves[1]).any(axis=0) & (leaves[1][POINTERS] != 0))
                rows = np.zeros(len(slots), _CONTENT)
                rows["pointer"], rows["checksum"] = leaves[1][:, slots]
                rows["block"], rows["volume"], rows["owner"] = leaf * FANOUT + slots, volume, snapshot.id
                progress.leaf = leaf + 1
                self._take(rows)
            progress.volume, progress.leaf = volume + 1, 0
        of_snapshot = [each for each in (before, snapshot) if each is not None]
        return lambda: all(self.catalog.snapshot(each.id) == each for each in of_snapshot) and (
            interval is None or self.catalog.interval_to(snapshot.id) == interval
        )

    def _check_open(self) -> Callable[[], bool]:
        last = self.catalog.last_snapshot()
        opened = [each for each in self.catalog.open_intervals() if last is not None and each.to_seq > last.seq]
        for each in opened:
            fd = self.tried(partial(self.objects.fd_of, each.wal))
            if fd is not None and (size := os.fstat(fd).st_size) < each.wal_end:
                self.found.note(Damage(each.wal.file, size, each.wal_end - size, "missing"))
        if (journal := self.open_journal(opened)) is not None:
            self._check_journal(journal, [each.wal.number for each in opened], -opened[0].id)
            self._verify()
        return lambda: {each.id for each in opened} <= {each.id for each in self.catalog.open_intervals()}

    def _check_journal(self, journal: Journal, own: Sequence[int], owner: int) -> None:
        """Reads all of its index, and of the contents those in objects with these numbers."""
        for _ in journal.positions():
            pass
        for rows in journal.rows():
            numbers = rows["pointer"] >> np.uint64(self.objects.layout.unit_bits)
            mine = rows[np.isin(numbers, np.array(own, "<u8"))]
            contents = np.zeros(len(mine), _CONTENT)
            for field in ("pointer", "checksum", "block", "seq", "volume"):
                contents[field] = mine[field]
            contents["owner"] = owner
            self._take(contents)

    # Contents

    def _take(self, rows: Rows) -> None:
        """Puts contents into the batch, and verifies that where it is full; saves the progress now and then."""
        if self._progress.has_data:
            self._batch.append(rows)
            self._batch_bytes += int((self._units[rows["volume"]] * self._unit_bytes).sum())
        if self._batch_bytes >= BATCH_BYTES or time.monotonic() - self._saved_s > SAVE_S:
            self._verify()

    def _verify(self) -> None:
        """Verifies the contents of the batch, each once, in the order of their places."""
        if self._batch:
            rows = np.concatenate(self._batch)
            rows = rows[np.unique(rows["pointer"], return_index=True)[1]]
            self._batch, self._batch_bytes = [], 0
            ends = np.cumsum(self._units[rows["volume"]] * self._unit_bytes) // np.uint64(AHEAD_BYTES)
            parts = np.split(rows, np.flatnonzero(np.diff(ends)) + 1)
            for part, following in zip(parts, [*parts[1:], rows[:0]], strict=True):
                self._read_ahead(following)
                self._read(part)
        self._progress.found, self._saved_s = list(self.found.places.values()), time.monotonic()
        self._progress.save(os.path.dirname(self.found.path))

    def _read_ahead(self, rows: Rows) -> None:
        pointers, units = rows["pointer"], self._units[rows["volume"]]
        cuts = (np.flatnonzero(pointers[1:] != pointers[:-1] + units[:-1]) + 1).tolist()
        for first, end in itertools.pairwise([0, *cuts, len(rows)] if len(rows) else []):
            pointer, layout = int(pointers[first]), self.objects.layout
            if (fd := self.tried(lambda: self.objects.fd(layout.object_of(pointer)))) is not None:  # noqa: B023
                size = int(units[first:end].sum()) * layout.unit_bytes
                os.posix_fadvise(fd, layout.offset_of(pointer), size, os.POSIX_FADV_WILLNEED)

    def _read(self, rows: Rows) -> None:
        """Compares contents with their checksums; where that ends in an error, each half by itself."""
        if not len(rows):
            return
        units = self._units[rows["volume"]]
        try:
            for part, data in self._reader.parts(rows["pointer"], units):
                wrong = checksums_of(data, (units[part] * self._unit_bytes).astype("<i8")) != rows["checksum"][part]
                for row in rows[part][wrong] if wrong.any() else ():
                    self._note(row)
                self._progress.bytes += len(data)
                self._paced(len(data))
        except (CorruptionError, OSError):
            if len(rows) == 1:
                self._note(rows[0])
                return
            self._read(rows[: len(rows) // 2])
            self._read(rows[len(rows) // 2 :])

    def _note(self, row: np.void) -> None:
        """Notes a content that is damaged, unless nothing leads to it any more."""
        if len(self.found.places) >= MAX_PLACES:
            return
        pointer, checksum, block, seq, owner, volume = (int(row[field]) for field in _CONTENT.names or ())
        after_seq, through_seq, now = max(seq - 1, 0), seq, np.zeros(0, "<u8")
        if owner < 0:
            opened = (each.id for each in self.catalog.open_intervals())
            now = np.array([pointer] if -owner in opened else [], "<u8")
        elif (snapshot := self.catalog.row("snapshots", "WHERE id >= ? ORDER BY id", owner)) is not None:
            interval = self.catalog.interval_to(snapshot[0])
            if seq:
                journal = self.journal(interval) if interval is not None else None
                if journal is not None and journal.parts[0].index is not None:
                    now = journal.parts[0].index.range(volume, block, block + 1, seq)[1]
            else:
                now = self.maps(self.roots(Snapshot(*snapshot)))[volume].leaf(block >> FANOUT_BITS)[POINTERS]
                after_seq, through_seq = interval.from_seq if interval else 0, snapshot[1]
        if pointer in now.tolist():
            layout = self.objects.layout
            place = layout.offset_of(pointer), int(self._units[volume] * self._unit_bytes)
            file = ObjectName.of_number(layout.object_of(pointer)).file
            self.found.note(Damage(file, *place, "content", volume, block, checksum, after_seq, through_seq))
