"""The removal of all snapshots between two, or of all before one, and of what only they had.

    prepare   what contents and nodes of the objects between are still needed (`liveness`)? small survivors are copied
              behind the end of an object that stays, and synced
    change    the catalog commits: the snapshots are gone, and what was copied is found in its new place
    free      files that nothing is in any more are unlinked, of others what is dead is punched; directories are synced

Whoever is cut off before the commit has changed nothing; behind it the row of `removals` says that `free` is to be
called again. Files aren't punched that are unlinked: who has them open reads on.

An object that is moved keeps its name in pointers, and its distances: byte o of it is byte base + o of its host's
file (the table `moved`). So only what is live of it takes room there, and neither pointers nor checksums change.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import cached_property
from itertools import chain, islice
from typing import Final

from pitfs.errors import CorruptionError, StoreError
from pitfs.model.blockmap import EMPTY
from pitfs.storage.files import FULL_ERRNOS, fsync_directory, open_fd, punch
from pitfs.store.catalog.database import PAGE_ROWS, REMEDY
from pitfs.store.index.maps import block_maps
from pitfs.store.objects.format import HEADER_BYTES, ObjectKind, ObjectName
from pitfs.store.retention.liveness import Live, live_between
from pitfs.store.retention.moving import Mover, ObjectFile, Part
from pitfs.store.retention.rows import join_intervals, removed_journals
from pitfs.store.retention.thinning import allocated_bytes, unlink
from pitfs.store.transfer.writable_store import WritableStore

MAX_MOVED_BYTES: Final = 1 << 20  # files of which more is live are punched: their headers don't matter
MAX_SPAN_BYTES: Final = 1 << 30  # nor are files moved that are mostly holes: a host has up to 16 TiB on ext4
LARGE_BYTES: Final = 64 << 20
LITTLE: Final = 256  # part of a large file that isn't worth the holes yet
INODE_EXTENTS: Final = 4  # of a file has ext4 room for in the inode: with more it takes blocks, of so many
EXTENTS: Final = 340
FREEING: Final = 4  # at a time: a file system waits for its disk, holes took a tenth of the time with two processors
_JOURNALS: Final = (ObjectKind.JOURNAL_INDEX, ObjectKind.JOURNAL_BLOCKS)


class Removal:
    """That of all snapshots between two; all of these exist, or the removal is one that was cut off behind its commit.

    Args:
        after_id: None: all before `before_id` go, which becomes the first snapshot.
        cause: of the interval that is left.

    Methods raise CorruptionError where a map or the catalog isn't what was written, and PitfsError or OSError where
    the disk refuses.
    """

    def __init__(
        self, store: WritableStore, after_id: int | None, before_id: int, cause: str = "retention: snapshots"
    ) -> None:
        self._store, self._after_id, self._before_id, self._cause = store, after_id or 0, before_id, cause
        self._bounds = tuple(f"snapshot-{each:016x}" for each in (self._after_id + 1, before_id))
        self._block_bytes = os.statvfs(store.objects.directory).f_bsize
        # What `prepare` found out: names of objects that nobody needs, and what became of the others.
        self._dead: list[str] | None = None
        self._movers: list[Mover] = []

    @classmethod
    def unfinished(cls, store: WritableStore) -> list[Removal]:
        """Those that were cut off behind their commit: `free` is what is left to do."""
        return [cls(store, after, before) for before, after in store.catalog.removals() if after != before]

    # What is needed

    @cached_property
    def _live(self) -> Live:
        store, catalog = self._store, self._store.catalog
        if catalog.snapshot(self._before_id) is None:
            raise StoreError(f"{catalog.path}: snapshot {self._before_id} isn't there any more: plan anew")
        roots = catalog.roots(self._after_id) if self._after_id else [EMPTY] * len(store.volumes)
        before, after = (
            block_maps(store.load_node, each, store.volumes) for each in (roots, catalog.roots(self._before_id))
        )
        live = Live(store.layout, self._after_id + 1, self._before_id)
        return live_between(before, after, store.block_units.tolist(), live)

    def _files(self) -> Iterator[ObjectFile]:
        """The files of maps and contents between the two snapshots, as the catalog has them now; a page in memory."""
        catalog, (last, end) = self._store.catalog, self._bounds
        has_moved = catalog.has_table("moved")
        if has_moved:
            # An index finds what is in a file. What it didn't find would be lost: so the table itself is asked, too.
            (by_name,) = catalog.rows(
                "SELECT count(*) FROM moved NOT INDEXED WHERE name >= ? AND name < ? AND host < ?", (last, end, end)
            )
            (by_host,) = catalog.rows(
                "SELECT count(*) FROM moved INDEXED BY moved_by_host WHERE host >= ? AND host < ?", (last, end)
            )
            if by_name != by_host:
                raise CorruptionError(catalog.path, 0, f"the index of moved is damaged: {REMEDY}")
        while True:
            sql = f"SELECT * FROM objects WHERE name > ? AND name < ? ORDER BY name LIMIT {PAGE_ROWS}"
            names = [catalog.verified("objects", row)[0] for row in catalog.rows(sql, (last, end))]
            if not names:
                return
            last = names[-1]
            within = names[0], last
            files = {name: ObjectFile(found) for name in names if (found := ObjectName.of_file(name)) is not None}
            if has_moved:
                for (name,) in catalog.rows("SELECT name FROM moved WHERE name >= ? AND name <= ?", within):
                    files.pop(name, None)
                for row in catalog.rows("SELECT * FROM moved WHERE host >= ? AND host <= ?", within):
                    name, host, base = catalog.verified("moved", row)
                    if (found := ObjectName.of_file(name)) is not None and host in files:
                        files[host].parts.append(Part(found, base))
            for file in files.values():
                self._measure(file)
                yield file

    def _ranges(self, file: ObjectFile) -> Iterator[tuple[int, int]]:
        """Bytes [start, end) of a file that are live, ascending."""
        for part in file.parts:
            for start, end in self._live.ranges(part.name) if part.is_live else ():
                yield part.base + start, part.base + end

    def _measure(self, file: ObjectFile) -> None:
        for part in file.parts:
            found = next(self._live.ranges(part.name), None)
            part.first = -1 if found is None else part.base + found[0]
        file.parts.sort(key=lambda part: part.first)  # not by base: what is dead at their beginnings isn't there
        size, last, origin, behind = self._block_bytes, -1, -1, HEADER_BYTES
        for start, end in self._ranges(file):
            if start < behind:  # before anything is punched
                raise CorruptionError(self._path(file.name), start, "objects in it overlap")
            file.run_count += start // size > last + 1
            first, last, behind = max(start // size, last + 1), (end - 1) // size, end
            origin = first if origin < 0 else origin
            file.live_bytes += max(0, last + 1 - first) * size
        file.span_bytes = (last - origin) * size

    def _path(self, name: ObjectName) -> str:
        return self._store.objects.path_of(name)

    def _host(self, hosts: dict[ObjectKind, ObjectName], file: ObjectFile) -> ObjectName | None:
        """Into whose file that one's parts are to be moved, None if they stay where they are."""
        if not 0 < file.live_bytes < MAX_MOVED_BYTES or file.span_bytes > MAX_SPAN_BYTES:
            return None
        host = ObjectName(file.name.kind, self._before_id)
        if file.name.kind not in hosts and self._store.catalog.object(host.file) is None:
            host = file.name  # the first of the small ones takes the others
        host = hosts.setdefault(file.name.kind, host)
        return None if host == file.name else host

    def foretell(self) -> int:
        """Bytes on the disk that it frees; changes nothing."""
        journals = removed_journals(self._store.catalog, self._after_id, self._before_id)
        freed = sum(allocated_bytes(self._path(name)) for name in map(ObjectName.of_file, journals) if name is not None)
        hosts: dict[ObjectKind, ObjectName] = {}
        for file in self._files():
            after_bytes = file.live_bytes
            if after_bytes and self._host(hosts, file) is None:
                extent_blocks = -(-file.run_count // EXTENTS) if file.run_count >= INODE_EXTENTS else 0
                after_bytes += HEADER_BYTES + extent_blocks * self._block_bytes
            freed += max(0, allocated_bytes(self._path(file.name)) - after_bytes) if self._is_worth(file) else 0
        return freed

    def _is_worth(self, file: ObjectFile) -> bool:
        """Whether it is to be punched. Each time that the first snapshot goes, all large old files are looked at."""
        is_little = allocated_bytes(self._path(file.name)) - file.live_bytes < file.live_bytes // LITTLE
        return bool(self._after_id) or file.live_bytes < LARGE_BYTES or not is_little

    # The removal

    def prepare(self) -> None:
        """Copies small survivors to where they will be, and looks for what nobody needs: then `change` is short."""
        try:
            self._prepare(is_moving=True)
        except OSError as error:
            if error.errno not in FULL_ERRNOS:
                raise
            self._prepare(is_moving=False)

    def _prepare(self, is_moving: bool) -> None:
        dead, hosts, movers = list[str](), dict[ObjectKind, ObjectName](), dict[ObjectName, Mover]()
        with ExitStack() as opened:
            for file in self._files():
                host = self._host(hosts, file) if is_moving else None
                if host is not None:
                    if host not in movers:
                        movers[host] = opened.enter_context(Mover(self._store, host, self._live, self._block_bytes))
                    movers[host].take(file)
                stays = file.live_bytes > 0 and host is None
                gone = (part.name for part in file.parts if not part.is_live)
                dead += [name.file for name in gone if not (stays and name == file.name)]
        self._dead, self._movers = dead, list(movers.values())

    def drop(self) -> None:
        """Takes back what `prepare` made, where there is to be no `change`."""
        for mover in self._movers:
            mover.drop()
        self._dead, self._movers = None, []

    def change(self) -> None:
        """What the catalog says afterwards; within `Catalog.changes`.

        Raises:
            StoreError: one of the two snapshots isn't there any more.
        """
        if self._dead is None or any(not mover.is_still() for mover in self._movers):
            self.prepare()
        catalog = self._store.catalog
        join_intervals(catalog, self._after_id, self._before_id, self._cause)
        for name in self._dead or ():
            catalog.delete("objects", "name", name)
            catalog.delete("moved", "name", name)
        for row in (row for mover in self._movers for row in mover.moved):
            catalog.put("moved", row, "ON CONFLICT DO UPDATE SET host = ?2, base = ?3, row_checksum = ?4")
        catalog.delete("removals", "before_id", self._before_id)
        catalog.put("removals", (self._before_id, self._after_id))

    def free(self) -> int:
        """Gives the room back; the bytes on the disk. Called again, it finishes what was cut off."""
        catalog, changed = self._store.catalog, set[str]()
        freed = -sum(mover.grown_bytes for mover in self._movers)
        with ThreadPoolExecutor(FREEING) as threads:
            freed += sum(threads.map(lambda folder: self._unlink_in(folder, changed), self._folders()))
            files = filter(self._is_worth, self._files())
            while batch := list(islice(files, PAGE_ROWS)):
                freed += sum(threads.map(self._punch, batch))
        for folder in changed:
            with suppress(FileNotFoundError):
                fsync_directory(folder)
        with catalog.changes(durable=False):  # a row that is there again does no harm
            catalog.delete("removals", "before_id", self._before_id)
        return freed

    def _folders(self) -> Iterator[str]:
        """The folders of objects between the two snapshots that there are."""
        directory = self._store.objects.directory
        if not self._store.layout.has_folders:
            yield directory
            return
        first, last = (f"{each:016x}"[7:14] for each in (self._after_id + 1, self._before_id))
        for high in sorted(os.listdir(directory)):
            if first[:4] <= high <= last[:4]:
                for low in sorted(os.listdir(os.path.join(directory, high))):
                    if first <= high + low <= last:
                        yield os.path.join(directory, high, low)

    def _unlink_in(self, folder: str, changed: set[str]) -> int:
        """Unlinks what the catalog doesn't have there any more; removes the folder if it is empty then."""
        catalog, freed = self._store.catalog, 0
        names = [name for name in map(ObjectName.of_file, os.listdir(folder)) if name and self._is_ours(name)]
        gone = set(catalog.unknown_objects([name.file for name in names]))
        files = sorted(name.file for name in names if name.kind not in _JOURNALS)
        if files:
            sql = "SELECT name FROM moved WHERE name >= ? AND name <= ?"
            gone.update(name for (name,) in catalog.rows(sql, (files[0], files[-1])))
        for name in names:
            if name.file in gone:
                freed += unlink(self._store, name)
                changed.add(folder)
        newest = os.path.dirname(self._path(ObjectName(ObjectKind.MAP, self._before_id)))  # more may come there
        if folder in changed and folder != newest and not os.listdir(folder):
            with suppress(OSError):
                os.rmdir(folder)
            changed.add(os.path.dirname(folder))
        return freed

    def _is_ours(self, name: ObjectName) -> bool:
        """Whether that object, if it is there, may be one that goes."""
        return self._after_id < name.snapshot_id < self._before_id + (name.kind in _JOURNALS)

    def _punch(self, file: ObjectFile) -> int:
        """Makes holes where nothing is live."""
        before = allocated_bytes(self._path(file.name))
        with suppress(FileNotFoundError), open_fd(self._path(file.name), os.O_RDWR) as fd:  # a check tells of that
            size, at = os.fstat(fd).st_size, HEADER_BYTES
            size += -size % self._block_bytes  # else the block with the end would stay
            for start, end in chain(self._ranges(file), ((size, size),)):
                if at < start and not punch(fd, at, start - at):
                    return 0
                at = end
        return before - allocated_bytes(self._path(file.name))
