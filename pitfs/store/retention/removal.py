"""The removal of all snapshots between two, or of all before one, and of what only they had.

    plan      which contents and nodes of the objects between are still needed (`liveness`); what becomes of each file
    prepare   small survivors are copied behind the end of an object that stays, and synced
    change    the catalog commits: the snapshots are gone, and what was copied is found in its new place
    free      files that nothing is in any more are unlinked, of others what is dead is punched; directories are synced

Whoever is cut off before the commit has changed nothing; behind it the row of `removals` says that `free` is to be
called again. Files aren't punched that are unlinked: who has them open reads on.

An object that is moved keeps its name in pointers, and its distances: byte o of it is byte base + o of its host's
file (the table `moved`). So only what is live of it takes room there, and neither pointers nor checksums change.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from heapq import merge
from typing import Final

from pitfs.errors import CorruptionError, StoreError
from pitfs.model.blockmap import EMPTY
from pitfs.storage.files import FULL_ERRNOS, fsync_directory, open_fd, punch, read_exactly, write_all
from pitfs.store.catalog.database import REMEDY
from pitfs.store.index.maps import block_maps
from pitfs.store.objects.format import HEADER_BYTES, ObjectKind, ObjectName, ObjectRecord
from pitfs.store.retention.liveness import Live, Objects, live_between
from pitfs.store.retention.rows import join_intervals, removed_journals
from pitfs.store.transfer.writable_store import WritableStore

MAX_MOVED_BYTES: Final = 1 << 20  # files of which more is live are punched: their headers don't matter
MAX_HOST_BYTES: Final = 1 << 42  # ext4 has files of up to 16 TiB
COPY_BYTES: Final = 1 << 20
KINDS: Final = (ObjectKind.MAP, ObjectKind.SNAPSHOT_BLOCKS)  # of which parts may stay
_JOURNALS: Final = (ObjectKind.JOURNAL_INDEX, ObjectKind.JOURNAL_BLOCKS)


@dataclass(frozen=True, slots=True)
class Part:
    """An object in a file: its own, or that of another one."""

    record: ObjectRecord
    name: ObjectName
    base: int


@dataclass(slots=True)
class ObjectFile:
    """A file of objects/ with the objects in it, and how much of it is live.

    Attributes:
        live: those parts of which anything is live.
        live_bytes: in whole blocks of the file system.
    """

    name: ObjectName
    parts: list[Part] = field(default_factory=list)
    live: list[Part] = field(default_factory=list)
    live_bytes: int = 0


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
        self._block_bytes = os.statvfs(store.objects.directory).f_bsize
        # What `prepare` found out: names of objects that nobody needs, and the (name, host, base) of those moved.
        self._dead: list[str] | None = None
        self._moved: list[tuple[str, str, int]] = []
        self._grown_bytes = 0

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
        objects = Objects(store.layout, store.block_units, self._after_id + 1, self._before_id)
        return live_between(before, after, objects)

    def _files(self, kind: ObjectKind) -> dict[ObjectName, ObjectFile]:
        """The files of that kind whose objects are between the two snapshots, as the catalog has them now."""
        catalog, files = self._store.catalog, dict[ObjectName, ObjectFile]()
        first, end = (ObjectName(kind, each).file for each in (self._after_id + 1, self._before_id))
        range_of, suffix = "WHERE name >= ? AND name < ?", first[first.index(".") :]
        rows = catalog.rows(f"SELECT * FROM moved {range_of}", (first, end))
        moved = {name: (host, base) for name, host, base in (catalog.verified("moved", row) for row in rows)}
        for row in catalog.rows(f"SELECT * FROM objects {range_of} ORDER BY name", (first, end)):
            record = ObjectRecord(*catalog.verified("objects", row))
            name = ObjectName.of_file(record.name)
            if name is None or not record.name.endswith(suffix):
                continue
            host_file, base = moved.get(record.name, (record.name, 0))
            host = ObjectName.of_file(host_file)
            if host is not None and host.snapshot_id < self._before_id:  # what that snapshot's own file has stays
                files.setdefault(host, ObjectFile(host)).parts.append(Part(record, name, base))
        for file in files.values():
            self._measure(file)
        return files

    def _ranges(self, parts: Iterable[Part]) -> Iterator[tuple[int, int]]:
        """Bytes [start, end) of a file that are live, ascending."""
        for part in sorted(parts, key=lambda part: part.base):
            for start, end in self._live.ranges(part.name):
                yield part.base + start, part.base + end

    def _measure(self, file: ObjectFile) -> None:
        size, last = self._block_bytes, -1
        for part in file.parts:
            if next(self._live.ranges(part.name), None) is not None:
                file.live.append(part)
        for start, end in self._ranges(file.live):
            first, last = max(start // size, last + 1), (end - 1) // size
            file.live_bytes += max(0, last + 1 - first) * size

    def _path(self, name: ObjectName) -> str:
        return self._store.objects.path_of(name)

    def _allocated(self, name: ObjectName) -> int:
        try:
            return os.stat(self._path(name)).st_blocks * 512
        except FileNotFoundError:
            return 0

    def _moving(self, kind: ObjectKind, files: dict[ObjectName, ObjectFile]) -> tuple[ObjectName, list[ObjectFile]]:
        """The object into whose file small survivors are to be moved, and the files that they are in."""
        host = ObjectName(kind, self._before_id)
        if self._store.catalog.object(host.file) is None and files:  # the one with most in it stays instead
            host = max(files.values(), key=lambda file: (file.live_bytes, file.name)).name
        small = (file for file in files.values() if 0 < file.live_bytes < MAX_MOVED_BYTES)
        return host, [file for file in small if file.name != host]

    def foretell(self) -> int:
        """Bytes on the disk that it frees; changes nothing."""
        journals = removed_journals(self._store.catalog, self._after_id, self._before_id)
        freed = sum(self._allocated(name) for name in map(ObjectName.of_file, journals) if name is not None)
        for kind in KINDS:
            files = self._files(kind)
            moving = {file.name for file in self._moving(kind, files)[1]}
            for name, file in files.items():
                header_bytes = HEADER_BYTES if file.live and name not in moving else 0
                freed += max(0, self._allocated(name) - file.live_bytes - header_bytes)
        return freed

    # The removal

    def prepare(self) -> None:
        """Copies small survivors to where they will be, and looks for what nobody needs: then `change` is short."""
        self._dead = []
        for kind in KINDS:
            files = self._files(kind)
            host, moving = self._moving(kind, files)
            moved = self._move(host, moving) if moving else set()
            for name, file in files.items():
                stays = bool(file.live) and name not in moved
                self._dead += [
                    part.record.name for part in file.parts
                    if part not in file.live and not (stays and part.name == name)
                ]  # fmt: skip

    def _move(self, host: ObjectName, files: list[ObjectFile]) -> set[ObjectName]:
        """Copies what is live of these files behind the host's end; says of which, none where there is no room."""
        moved = list[tuple[str, str, int]]()
        block, names = self._block_bytes, set[ObjectName]()
        with open_fd(self._path(host), os.O_RDWR) as fd:
            self._cut(fd, host)
            before = os.fstat(fd)
            end = before.st_size
            try:
                for file in files:
                    if end > MAX_HOST_BYTES:
                        break
                    names.add(file.name)
                    with open_fd(self._path(file.name), os.O_RDONLY) as source:
                        for part in file.live:
                            first, _ = next(self._live.ranges(part.name))
                            base = -(-end // block) * block - first // block * block
                            for start, stop in self._live.ranges(part.name):
                                _copy(source, part.base + start, fd, base + start, stop - start)
                                end = base + stop
                            moved.append((part.record.name, host.file, base))
                os.fsync(fd)
            except OSError as error:
                os.ftruncate(fd, before.st_size)
                if error.errno not in FULL_ERRNOS:
                    raise
                return set()
            self._grown_bytes += (os.fstat(fd).st_blocks - before.st_blocks) * 512
        self._moved += moved
        return names

    def _cut(self, fd: int, host: ObjectName) -> None:
        """Cuts off what a removal copied there whose commit didn't come about."""
        size = os.fstat(fd).st_size
        if size > self._end_of(host, "") and size > (end := self._end_of(host, "NOT INDEXED")):
            os.ftruncate(fd, end)

    def _end_of(self, host: ObjectName, how: str) -> int:
        """Byte of an object's file behind all that the catalog says is in it; `how` not to trust an index alone."""
        catalog, ends = self._store.catalog, [HEADER_BYTES]
        rows = catalog.rows(f"SELECT * FROM moved {how} WHERE host = ?", (host.file,))
        for name, _, base in (*(catalog.verified("moved", row) for row in rows), (host.file, host.file, 0)):
            record = catalog.object(name)
            if record is None:
                raise CorruptionError(catalog.path, 0, f"it has moved {name}, but not the object: {REMEDY}")
            footer_bytes = record.footer_bytes if name == host.file else 0
            ends.append(base + HEADER_BYTES + record.data_bytes + footer_bytes)
        return max(ends)

    def change(self) -> None:
        """What the catalog says afterwards; within `Catalog.changes`.

        Raises:
            StoreError: one of the two snapshots isn't there any more.
        """
        if self._dead is None:
            self.prepare()
        catalog = self._store.catalog
        join_intervals(catalog, self._after_id, self._before_id, self._cause)
        for name in self._dead or ():
            catalog.delete("objects", "name", name)
        for name in (*(self._dead or ()), *(name for name, _, _ in self._moved)):
            catalog.delete("moved", "name", name)
        for row in self._moved:
            catalog.put("moved", row)
        catalog.delete("removals", "before_id", self._before_id)
        catalog.put("removals", (self._before_id, self._after_id))

    def free(self) -> int:
        """Gives the room back; the bytes on the disk. Called again, it finishes what was cut off."""
        catalog, freed, changed = self._store.catalog, -self._grown_bytes, set[str]()
        for folder in self._folders():
            freed += self._unlink_in(folder, changed)
        freed += sum(self._punch(file) for kind in KINDS for file in self._files(kind).values())
        for folder in changed:
            with suppress(FileNotFoundError):
                fsync_directory(folder)
        with catalog.changes():
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
        objects, catalog, freed = self._store.objects, self._store.catalog, 0
        names = [name for name in map(ObjectName.of_file, os.listdir(folder)) if name and self._is_ours(name)]
        unknown = set(catalog.unknown_objects([name.file for name in names]))
        for name in names:
            if name.file in unknown or catalog.host_of(name) is not None:
                freed += self._allocated(name)
                objects.forget(name)
                with suppress(FileNotFoundError):
                    os.unlink(self._path(name))
                changed.add(folder)
        if folder in changed and folder != objects.directory and not os.listdir(folder):
            with suppress(OSError):
                os.rmdir(folder)
            changed.add(os.path.dirname(folder))
        return freed

    def _is_ours(self, name: ObjectName) -> bool:
        """Whether that object, if it is there, may be one that goes."""
        return self._after_id < name.snapshot_id < self._before_id + (name.kind in _JOURNALS)

    def _punch(self, file: ObjectFile) -> int:
        """Makes holes where nothing is live."""
        before = self._allocated(file.name)
        with open_fd(self._path(file.name), os.O_RDWR) as fd:
            size, at = os.fstat(fd).st_size, HEADER_BYTES
            size += -size % self._block_bytes  # else the block with the end would stay
            for start, end in merge(self._ranges(file.live), [(size, size)]):
                if at < start and not punch(fd, at, start - at):
                    return 0
                at = max(at, end)
        return before - self._allocated(file.name)


def _copy(source: int, offset: int, target: int, target_offset: int, size: int) -> None:
    for at in range(0, size, COPY_BYTES):
        data = read_exactly(source, min(COPY_BYTES, size - at), offset + at, "an object")
        write_all(target, data, target_offset + at)
