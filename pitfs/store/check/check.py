"""`pitfs check`: all that a store has is read and compared, beside a receiver, readers and removals.

Each row of the catalog, the header and size of each object, each node of a block map and each chunk of an index are
read once; with `has_data` each content, too. What is damaged is noted, and the check goes on. What was removed while it
was looked at is no damage: the catalog is asked again, and the walk goes on from the newest snapshot that is left.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from functools import partial
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from pitfs.errors import CorruptionError, PitfsError
from pitfs.model.blockmap import FANOUT, FANOUT_BITS, POINTERS
from pitfs.model.transfer import VolumeInfo
from pitfs.store.catalog.catalog import Catalog
from pitfs.store.catalog.database import REMEDY
from pitfs.store.catalog.records import Interval, Snapshot
from pitfs.store.check.progress import Progress
from pitfs.store.check.suffering import EVERYTHING, Stretch, Suffering, uncovered
from pitfs.store.check.walk import IN_CATALOG, Found, Journal, Walk
from pitfs.store.objects.damage import MAX_PLACES, Damage, DamageLog
from pitfs.store.objects.format import CATALOG, HEADER_BYTES, ObjectKind, ObjectName, ObjectRecord
from pitfs.store.objects.pool import ObjectPool
from pitfs.store.open_interval.contents import ContentReader
from pitfs.store.opening import read_store_info
from pitfs.store.store import Store
from pitfs.store.transfer.sections import checksums_of

BATCH_BYTES: Final = 128 << 20  # of contents, sorted by their places: 12 MiB of rows if blocks have 512 bytes …
FIRST_BYTES: Final = 1 << 20  # … at most: no more than is read in SAVE_S, which begins with a guess
PART_BYTES: Final = 768 << 10  # compared while the next part is read
AHEAD_PARTS: Final = 16  # that the kernel is told to read ahead
SAVE_S: Final = 5.0  # so much reading is done again if it is stopped, twice at most
_POINTER, _CHECKSUM, _BLOCK, _SEQ, _OWNER, _VOLUME = range(6)  # of contents, int64[6, n]

# Of contents, by column. owner: id of the snapshot, or minus that of the open interval; seq: 0 of a map's.
Contents = npt.NDArray[np.int64]


class Report(msgspec.Struct, frozen=True):
    """objects, bytes (of contents): that were read; damaged: with the stretches of instants that suffer from it.

    files: of objects that are damaged, the file, and the byte where the object would begin in there.
    has_all: not more than are remembered were found. problem: why nothing was looked at, or "".
    """

    objects: int
    bytes: int
    damaged: list[tuple[Damage, list[Stretch]]]
    files: dict[str, tuple[str, int]]
    has_all: bool = True
    problem: str = ""


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
    known = log.known()
    if progress.finished_ns:
        progress = Progress(has_data)
    contents = [each for each in (*known, *progress.found) if each.kind == "content"]  # they may be healed by now
    found = Found(path, [each for each in progress.found if each.kind != "content"])
    files, problem = dict[str, tuple[str, int]](), ""
    try:
        with closing(Store.open(path)) as store, closing(Catalog(os.path.join(path, CATALOG))) as catalog:
            if catalog.is_older():
                raise CorruptionError(catalog.path, 0, f"older than its log: {REMEDY}")
            store.objects.damage = found
            run = _Check(catalog, store.objects, store.volumes, found, progress, paced)
            run.check_again(contents)
            run.run()
            damaged = Suffering(catalog, store.objects, store.volumes, found).run(store.at_time) if found.places else []
            for name in filter(None, {ObjectName.of_file(each.object) for each, _ in damaged}):
                files[name.file] = store.objects.place(name, 0)
    except CorruptionError as error:  # it can't be read at all
        problem = f"{error.what}: {error.problem}"
        found.note(IN_CATALOG)
        damaged = [(each, [EVERYTHING] if each == IN_CATALOG else []) for each in uncovered(found.places.values())]

    def remembered(now: list[Damage]) -> list[Damage]:
        """What was found, and what others met meanwhile."""
        return [*found.places.values(), *(e for e in now if e not in known and e.place not in found.places)]

    with suppress(PitfsError):
        log.update(remembered)
    progress.finished_ns = time.time_ns()
    progress.save(path)
    return Report(progress.objects, progress.bytes, damaged, files, len(found.places) < MAX_PLACES, problem)


class _Check(Walk):
    """One check. Removals may go on beside it: what is found while they take away what it looks at doesn't count."""

    def __init__(
        self, catalog: Catalog, objects: ObjectPool, volumes: Sequence[VolumeInfo], found: Found, progress: Progress,
        paced: Callable[[int], None],
    ) -> None:  # fmt: skip
        super().__init__(catalog, objects, volumes, found)
        self._progress, self._paced = progress, paced
        self._layout = layout = objects.layout
        self._units = np.array([each.block_size // layout.unit_bytes for each in volumes], "<u8")
        self._reader = ContentReader({}, objects)
        self._blocks: dict[tuple[int, int], list[memoryview]] = {}  # of a buffer, by its number and the blocks' size
        self._batch: list[Contents] = []
        self._batch_bytes, self._limit, self._saved_s = 0, FIRST_BYTES, time.monotonic()

    def run(self) -> None:
        """All of it."""
        if not self._progress.is_under_way:
            self._check_catalog()
        with self._noting_catalog():
            self._check_history()
            while not self._check_open():  # it was closed meanwhile
                self._check_history()
        self._verify()

    @contextmanager
    def _noting_catalog(self) -> Iterator[None]:
        try:
            yield
        except CorruptionError:
            self.found.note(IN_CATALOG)

    def _counts(self, step: Callable[[], None], is_there: Callable[[], bool]) -> bool:
        """Whether what a step found counts: what it looked at must be there still."""
        before = dict(self.found.places)
        try:
            step()
        except CorruptionError:
            self.found.note(IN_CATALOG)
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
        catalog, self._progress.objects = self.catalog, 0
        with self._noting_catalog():  # the names of columns are in the schema, which has no checksum
            for listed in (catalog.snapshots(0), catalog.intervals(0), catalog.bookmarks(0), catalog.gaps(0)):
                next(iter(listed), None)
            catalog.snapshot_at_seq(0), catalog.interval_from(0), catalog.next_minute(0), catalog.roots(0)
        for (table,) in self.catalog.rows("SELECT name FROM sqlite_master WHERE type = 'table'"):
            with self._noting_catalog():
                for row in self.catalog.all_rows(table):
                    if table == "objects":
                        record = ObjectRecord(*row)
                        self._counts(
                            partial(self._check_object, record), lambda: self.catalog.object(record.name) == record  # noqa: B023
                        )  # fmt: skip

    def _check_object(self, record: ObjectRecord) -> None:
        self._progress.objects += 1
        name = ObjectName.of_file(record.name)
        if name is not None and (fd := self.tried(lambda: self.objects.fd_of(name))) is not None:
            footer, size = HEADER_BYTES + record.data_bytes, os.fstat(fd).st_size
            if fd.base or self.catalog.snapshot(record.snapshot_id) is None:
                pass  # of a snapshot that was removed: what others need of it is looked at with them
            elif size < footer + record.footer_bytes:
                self.found.note(Damage(record.name, size, footer + record.footer_bytes - size, "missing"))
            elif name.kind is ObjectKind.MAP:
                place = record.footer_bytes, footer, record.footer_checksum
                self.tried(lambda: self.objects.read_verified(name, *place))

    def _check_history(self) -> None:
        """What each snapshot and each interval has that those before it haven't, from where the progress says."""
        progress, is_left = self._progress, self._is_left
        before = self.catalog.snapshot_at_seq(progress.seq)
        while (snapshot := self.after(before)) is not None:
            interval = self.catalog.interval_to(snapshot.id)
            step = partial(self._check_step, before, snapshot)
            if self._counts(step, partial(is_left, before, snapshot, interval)):
                before = snapshot
            else:
                before = before and self.catalog.snapshot_at_seq(before.seq)
            progress.seq, progress.volume, progress.leaf, progress.rows = before.seq if before else -1, 0, 0, 0

    def _is_left(self, before: Snapshot | None, snapshot: Snapshot, interval: Interval | None) -> bool:
        """Whether nothing of a step was removed."""
        there = [each is None or self.catalog.snapshot(each.id) == each for each in (before, snapshot)]
        return all(there) and self.after(before) == snapshot and self.catalog.interval_to(snapshot.id) == interval

    def _check_step(self, before: Snapshot | None, snapshot: Snapshot) -> None:
        progress = self._progress
        interval = self.interval(before, snapshot) if before is not None else None
        journal = self.journal(interval) if interval is not None and not progress.volume + progress.leaf else None
        if journal is not None:
            self._check_journal(journal, [ObjectName(ObjectKind.JOURNAL_BLOCKS, snapshot.id).number], snapshot.id)
        roots = self.roots(snapshot)
        for volume in range(progress.volume, len(roots)):
            for leaf, slots, entries in self.new_leaves(volume, roots[volume], before, progress.leaf):
                contents = np.zeros((6, len(slots)), "<i8")
                contents[: _CHECKSUM + 1] = entries.view("<i8")
                contents[_BLOCK], contents[_OWNER], contents[_VOLUME] = leaf * FANOUT + slots, snapshot.id, volume
                progress.leaf = leaf + 1
                self._take(contents)
            progress.volume, progress.leaf = volume + 1, 0

    def _check_open(self) -> bool:
        """The open intervals; whether they were there all the time."""
        last = self.catalog.last_snapshot()
        opened = [each for each in self.catalog.open_intervals() if last is not None and each.to_seq > last.seq]

        def step() -> None:
            for each in opened:
                fd = self.tried(partial(self.objects.fd_of, each.wal))
                if fd is not None and (size := os.fstat(fd).st_size) < each.wal_end:
                    self.found.note(Damage(each.wal.file, size, each.wal_end - size, "missing"))
            if (journal := self.open_journal(opened)) is not None:
                self._check_journal(journal, [each.wal.number for each in opened], -opened[0].id)
                self._verify()

        return self._counts(step, lambda: {e.id for e in opened} <= {e.id for e in self.catalog.open_intervals()})

    def _check_journal(self, journal: Journal, own: Sequence[int], owner: int) -> None:
        """Reads all of its index, and of the contents those in objects with these numbers."""
        for _ in journal.positions():
            pass
        progress, file, taken = self._progress, journal.parts[0].name.file, 0
        done = progress.rows if owner > 0 and file == progress.journal else 0
        for all_rows in journal.rows():
            rows, taken = all_rows[max(0, done - taken) :], taken + len(all_rows)
            if owner > 0:
                progress.journal, progress.rows = file, max(done, taken)
            numbers = rows["pointer"] >> np.uint64(self._layout.unit_bits)
            mine = rows[np.isin(numbers, np.array(own, "<u8"))]
            columns = (mine[field].astype("<u8").view("<i8") for field in ("pointer", "checksum", "block", "seq"))
            self._take(np.array([*columns, np.full(len(mine), owner), mine["volume"]], "<i8"))

    # Contents

    def _take(self, contents: Contents) -> None:
        """Puts contents into the batch, and verifies that where it is full; saves the progress now and then."""
        if self._progress.has_data and contents.size:
            self._batch.append(contents)
            self._batch_bytes += int(self._units[contents[_VOLUME]].sum()) * self._layout.unit_bytes
        elif contents.size:
            self._check_bounds(contents)
        if self._batch_bytes >= min(BATCH_BYTES, self._limit) or time.monotonic() - self._saved_s >= SAVE_S:
            self._verify()

    def _check_bounds(self, contents: Contents) -> None:
        """Whether the objects reach as far as the last of these contents in each."""
        pointers = contents[_POINTER].view("<u8")
        order = np.argsort(pointers)
        numbers = pointers[order] >> np.uint64(self._layout.unit_bits)
        for place in order[np.diff(numbers, append=np.uint64(0)) != 0].tolist():
            pointer, size = int(pointers[place]), int(self._units[contents[_VOLUME, place]]) * self._layout.unit_bytes
            fd = self.tried(partial(self.objects.fd, self._layout.object_of(pointer)))
            if fd is not None and os.fstat(fd).st_size < fd.base + self._layout.offset_of(pointer) + size:
                self._note(contents[:, place])

    def _verify(self) -> None:
        """Verifies the contents of the batch, each once, in the order of their places."""
        if self._batch:
            begun_s, size = time.monotonic(), self._batch_bytes
            contents = np.concatenate(self._batch, axis=1)
            contents = contents[:, np.unique(contents[_POINTER].view("<u8"), return_index=True)[1]]
            self._batch, self._batch_bytes = [], 0
            part_units = PART_BYTES // self._layout.unit_bytes
            cuts = np.flatnonzero(np.diff(np.cumsum(self._units[contents[_VOLUME]]) // part_units)) + 1
            parts = np.split(contents, cuts, axis=1)
            with ThreadPoolExecutor(1, "reading contents") as reader:
                reading = reader.submit(self._read, parts[0], 0)
                for number, part in enumerate(parts):
                    ready = reading
                    if number + 1 < len(parts):
                        reading = reader.submit(self._read, parts[number + 1], number + 1 & 1)
                    self._compare(part, ready.result(), number & 1)
                    if number + AHEAD_PARTS < len(parts):
                        self._read_ahead(parts[number + AHEAD_PARTS])
            self._limit = int(size * SAVE_S / max(time.monotonic() - begun_s, 1e-3))
        if time.monotonic() - self._saved_s >= SAVE_S:
            self._progress.found, self._saved_s = list(self.found.places.values()), time.monotonic()
            self._progress.save(os.path.dirname(self.found.path))

    def _read_ahead(self, contents: Contents) -> None:
        pointers, units = contents[_POINTER].view("<u8"), self._units[contents[_VOLUME]]
        cuts = (np.flatnonzero(pointers[1:] != pointers[:-1] + units[:-1]) + 1).tolist()
        for first, end in itertools.pairwise([0, *cuts, len(pointers)]):
            pointer = int(pointers[first])
            if (fd := self.tried(partial(self.objects.fd, self._layout.object_of(pointer)))) is not None:
                size = int(units[first:end].sum()) * self._layout.unit_bytes
                os.posix_fadvise(fd, fd.base + self._layout.offset_of(pointer), size, os.POSIX_FADV_WILLNEED)

    def _read(self, contents: Contents, buffer: int) -> memoryview | None:
        """These contents, less than a part of `ContentReader`; None where they can't be read."""
        units = self._units[contents[_VOLUME]]
        try:
            ((_, data),) = self._reader.parts(contents[_POINTER].view("<u8"), units, buffer)
        except (CorruptionError, OSError):
            return None
        return data

    def _compare(self, contents: Contents, data: memoryview | None, buffer: int = 0) -> None:
        """Compares contents with their checksums; where they can't be read, one after the other."""
        count = contents.shape[1]
        if data is not None:
            expected = contents[_CHECKSUM].view("<u8").tolist()
            found = self._checksums(contents, data, buffer)
            for place in range(count) if found != expected else ():
                if found[place] != expected[place]:
                    self._note(contents[:, place])
            self._progress.bytes += len(data)
            self._paced(len(data))
        elif count == 1:
            self._note(contents[:, 0])
        else:
            for one in np.split(contents, count, axis=1):
                number = self._layout.object_of(int(one[_POINTER, 0].view("<u8")))
                if self.found.ends.get(ObjectName.of_number(number).file) != 0:  # else that says it all
                    self._compare(one, self._read(one, 2), 2)  # into the others the next part is being read

    def _checksums(self, contents: Contents, data: memoryview, buffer: int) -> list[int]:
        """Of these contents, which begin where the buffer of that number does."""
        sizes = self._units[contents[_VOLUME]].astype("<i8") * self._layout.unit_bytes
        size = int(sizes[0])
        if (sizes != size).any():
            return list(checksums_of(data, sizes).tolist())
        if (blocks := self._blocks.get((buffer, size))) is None:  # made once: slices cost as much as checksums
            whole = memoryview(data.obj)
            blocks = self._blocks[buffer, size] = [whole[at : at + size] for at in range(0, len(whole), size)]
        return list(map(xxh3_64_intdigest, blocks[: len(sizes)]))

    def _note(self, content: npt.NDArray[np.int64]) -> None:
        """Notes a content that is damaged, unless nothing leads to it any more."""
        if len(self.found.places) < MAX_PLACES and (snapshot := self._owner(content)) is not None:
            pointer, checksum = content[: _CHECKSUM + 1].view("<u8").tolist()
            block, seq, _, volume = content[_BLOCK:].tolist()
            interval = self.catalog.interval_to(snapshot.id)
            seqs = (seq - 1, seq) if seq else (interval.from_seq if interval else 0, snapshot.seq)
            file = ObjectName.of_number(self._layout.object_of(pointer)).file
            place = self._layout.offset_of(pointer), int(self._units[volume]) * self._layout.unit_bytes
            if sum(place) <= self.found.ends.get(file, sum(place)):  # else bytes that are missing, which is noted
                self.found.note(Damage(file, *place, "content", volume, block, checksum, *seqs))

    def check_again(self, contents: Iterable[Damage]) -> None:
        """Reads contents that are known to be damaged, and notes those that still are."""
        for each in contents:
            name = ObjectName.of_file(each.object)
            if name is None or None in (each.checksum, each.block, each.volume):
                continue
            pointer = self._layout.pointer(name, (each.offset - HEADER_BYTES) // self._layout.unit_bytes)
            owner = name.snapshot_id if self.catalog.object(each.object) else -name.snapshot_id
            columns = pointer, each.checksum, each.block, each.through_seq, 0, each.volume
            content = np.array(columns, "<u8").view("<i8")
            content[_OWNER] = owner
            data = self._read(content[:, None], 0)
            if (data is None or xxh3_64_intdigest(data) != each.checksum) and self._owner(content) is not None:
                self.found.note(each)

    def _owner(self, content: npt.NDArray[np.int64]) -> Snapshot | None:
        """The snapshot by whose map, or journal, something leads to a content now; None: nothing does."""
        pointer, (block, seq, owner, volume) = int(content[_POINTER].view("<u8")), content[_BLOCK:].tolist()
        if owner < 0:
            is_open = -owner in (each.id for each in self.catalog.open_intervals())
            return self.catalog.last_snapshot() if is_open else None
        row = self.catalog.row("snapshots", "WHERE id >= ? ORDER BY id", owner)
        if row is None:
            return None
        snapshot = Snapshot(*row)
        found = self.maps(self.roots(snapshot))[volume].leaf(block >> FANOUT_BITS)[POINTERS].tolist()
        interval = self.catalog.interval_to(snapshot.id) if seq else None
        journal = self.journal(interval) if interval is not None else None
        if journal is not None and (index := journal.parts[0].index) is not None:
            found += index.range(volume, block, block + 1, seq)[1].tolist()
        return snapshot if pointer in found else None
