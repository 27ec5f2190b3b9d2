"""Damaged contents come back from production: which are asked for, how they are written, and how long one waits.

What the store's `damaged` names with a checksum is asked for by whoever receives into the store, while production is
connected and speaks a version of the protocol that knows how (`link.sessions.healing`). `Healer` holds a lock for so
long; so others see that something may come, however the receiver dies.

Contents are written in place: the very bytes that were committed, as their checksum says. Nothing else of an object
ever changes. A file of contents that is gone is made again, empty: what it lacks is damage like any other.
"""

from __future__ import annotations

import fcntl
import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Final

from msgspec.structs import replace
from xxhash import xxh3_64_intdigest

from pitfs.errors import CorruptionError, PitfsError
from pitfs.model.transfer import MAX_NUMBER, MAX_WANTED, Hello, Wanted
from pitfs.storage.files import fsync_directory, open_fd, read_exactly, storage_error, write_all
from pitfs.store.catalog.catalog import Catalog
from pitfs.store.index.maps import block_maps, node_loader
from pitfs.store.objects.damage import Damage, DamageLog
from pitfs.store.objects.format import (
    CATALOG,
    HEADER_BYTES,
    HEAL_LOCK,
    OBJECTS,
    ObjectHeader,
    ObjectKind,
    ObjectName,
)
from pitfs.store.objects.pool import ObjectPool
from pitfs.store.opening import changes_locked, read_store_info

MAX_ASKED_BYTES: Final = 2 << 20  # at once: what is written while nobody else may change the store
_CONTENTS: Final = (ObjectKind.SNAPSHOT_BLOCKS, ObjectKind.JOURNAL_BLOCKS)


def may_heal(damage: Damage) -> bool:
    """Whether production may have it; or it is a file or header of contents, which the catalog suffices to make."""
    name = ObjectName.of_file(damage.object)
    is_content = damage.checksum is not None and damage.block is not None and damage.volume is not None
    return damage.state != "gone" and name is not None and name.kind in _CONTENTS and (is_content or _is_frame(damage))


def _is_frame(damage: Damage) -> bool:
    """Whether it is a file that is missing, or its header."""
    return damage.offset < HEADER_BYTES


def production_listens(store: str) -> bool:
    """Whether a production host that can give contents is connected to who receives into the store."""
    with suppress(FileNotFoundError), open_fd(os.path.join(store, HEAL_LOCK), os.O_RDONLY) as fd:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


class Healer:
    """Heals the store ROOT/GROUP while a session is open: see `link.sessions.healing.HealerProtocol`."""

    def __init__(self, root: str, hello: Hello) -> None:
        self._path, self._volumes = os.path.join(root, hello.group), hello.volumes
        self._log = DamageLog(self._path)
        self._closing = ExitStack()
        self._lock: int | None = None
        self._seen: tuple[int, int, int] | None = None  # the log, when nothing in it was wanted
        self._asked: list[Damage] = []
        self._failed: set[tuple[str, int]] = set()  # places that go last

    def close(self) -> None:
        self._closing.close()

    def wanted(self) -> Sequence[Wanted]:
        """What is wanted next. Costs a stat while the log doesn't change."""
        if self._lock is None:
            self._lock = os.open(os.path.join(self._path, HEAL_LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self._closing.callback(os.close, self._lock)
            fcntl.flock(self._lock, fcntl.LOCK_SH)
        stamp = _stamp(self._log.path)
        if stamp == self._seen:
            return ()
        damages = list(filter(may_heal, self._log.known()))
        if frames := list(filter(_is_frame, damages)):
            self._make_frames(frames)
        self._asked = self._pick([each for each in damages if not _is_frame(each)])
        if not self._asked:
            self._seen = _stamp(self._log.path) if frames else stamp
            return ()
        with _opened(self._path) as (catalog, _):
            return [_wanted(catalog, each) for each in self._asked]

    def _pick(self, damages: Sequence[Damage]) -> list[Damage]:
        picked, size_bytes = list[Damage](), 0
        for each in sorted(damages, key=lambda each: each.place in self._failed):  # stable: else in their order
            size_bytes += each.size
            if size_bytes > MAX_ASKED_BYTES or len(picked) == MAX_WANTED:
                break
            picked.append(each)
        return picked

    def take(self, contents: Sequence[bytes | None]) -> None:
        """Writes what came. Raises PitfsError for what couldn't be written, when all others are."""
        answers = sorted(zip(self._asked, contents, strict=True), key=lambda answer: answer[0].place)
        gone = {damage.place for damage, content in answers if content is None}
        healed, failure = set[tuple[str, int]](), None
        for file, group in itertools.groupby(answers, key=lambda answer: answer[0].object):
            given = {damage: content for damage, content in group if content is not None}
            try:
                if given:
                    self._write(file, given)
            except PitfsError as error:
                failure = error
                self._failed.update(each.place for each in given)
            else:
                healed.update(each.place for each in given)
        self._settle(healed, gone)
        if failure is not None:
            raise failure

    def _settle(self, healed: set[tuple[str, int]], gone: set[tuple[str, int]]) -> None:
        self._log.update(
            lambda known: [
                replace(each, state="gone") if each.place in gone else each
                for each in known if each.place not in healed
            ]
        )  # fmt: skip

    def _write(self, file: str, given: dict[Damage, bytes]) -> None:
        """Writes contents of one object, and reads them again from the disk."""
        with changes_locked(self._path), _opened(self._path) as (catalog, objects):
            host, base = _moved(catalog, file)
            path = os.path.join(objects.directory, objects.layout.path_of(host))
            if not os.path.exists(path) and not self._make_frame(catalog, objects, host):
                return  # it was removed since
            for damage, content in given.items():
                if len(content) != damage.size or xxh3_64_intdigest(content) != damage.checksum:
                    raise PitfsError(f"{path}: byte {damage.offset}: production gave another content: is it pitfs?")
                if host != file and not self._is_live(catalog, objects, damage):
                    raise PitfsError(f"{path}: byte {damage.offset}: the object was moved, and that block isn't in it")
            try:
                with open_fd(path, os.O_RDWR) as fd:
                    for damage, content in given.items():
                        write_all(fd, content, base + damage.offset)
                    os.fsync(fd)
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # what is read then comes from the disk
                    for damage, content in given.items():
                        if read_exactly(fd, damage.size, base + damage.offset, path) != content:
                            problem = "what was written there doesn't stay: replace the disk"
                            raise CorruptionError(path, base + damage.offset, problem)
            except OSError as error:
                raise storage_error(error, path, "healing") from error

    def _is_live(self, catalog: Catalog, objects: ObjectPool, damage: Damage) -> bool:
        """Whether the block is where the damage says, in the first snapshot that may have it.

        Of a moved object only that is in its host; what else it had would be written over something else's bytes.
        """
        name, layout = ObjectName.of_file(damage.object), objects.layout
        assert name is not None and damage.volume is not None and damage.block is not None
        row = catalog.row("snapshots", "WHERE id >= ? ORDER BY id", name.snapshot_id)
        if row is None or damage.volume >= len(self._volumes):
            return False
        maps = block_maps(node_loader(objects), catalog.roots(row[0]), self._volumes)
        pointers, checksums = maps[damage.volume].leaf(damage.block >> 9)
        pointer, checksum = pointers.item(damage.block & 511), checksums.item(damage.block & 511)
        place = layout.object_of(pointer), layout.offset_of(pointer), checksum
        return place == (name.number, damage.offset, damage.checksum)

    def _make_frames(self, damages: Sequence[Damage]) -> None:
        with changes_locked(self._path), _opened(self._path) as (catalog, objects):
            for file in sorted({each.object for each in damages}):
                self._make_frame(catalog, objects, file)
        self._settle({each.place for each in damages}, set())

    def _make_frame(self, catalog: Catalog, objects: ObjectPool, file: str) -> bool:
        """Makes the header of a contents object, and its file where there is none; False: no object has that name."""
        name, record = ObjectName.of_file(file), catalog.object(file)
        if name is None or record is None:
            return False
        sizes = () if name.kind is ObjectKind.JOURNAL_BLOCKS else (record.data_bytes,)
        history = bytes.fromhex(read_store_info(self._path).history)
        path = objects.path_of(name)
        try:
            os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
            with open_fd(path, os.O_RDWR | os.O_CREAT) as fd:
                write_all(fd, ObjectHeader(name.kind, history, name.snapshot_id, *sizes).encode(), 0)
                os.ftruncate(fd, max(os.fstat(fd).st_size, HEADER_BYTES + record.data_bytes))
                os.fsync(fd)
            for directory in (os.path.dirname(path), os.path.dirname(os.path.dirname(path))):
                fsync_directory(directory)
        except OSError as error:
            raise storage_error(error, path, "healing") from error
        return True


@contextmanager
def _opened(path: str) -> Iterator[tuple[Catalog, ObjectPool]]:
    info = read_store_info(path)
    with ExitStack() as closing:
        catalog = Catalog(os.path.join(path, CATALOG))
        closing.callback(catalog.close)
        objects = ObjectPool(os.path.join(path, OBJECTS), info.layout, bytes.fromhex(info.history))
        closing.callback(objects.close)
        yield catalog, objects


def _stamp(path: str) -> tuple[int, int, int] | None:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _wanted(catalog: Catalog, damage: Damage) -> Wanted:
    """The content, with the narrowest range of writes that is known: that of the interval whose object has it."""
    name = ObjectName.of_file(damage.object)
    assert name is not None and damage.checksum is not None
    assert damage.volume is not None and damage.block is not None
    after, through = damage.after_seq, damage.through_seq or MAX_NUMBER
    interval, snapshot = catalog.interval_to(name.snapshot_id), catalog.snapshot(name.snapshot_id)
    ranges = [(each.from_seq, each.to_seq) for each in catalog.open_intervals() if each.id == name.snapshot_id]
    ranges += [(interval.from_seq, interval.to_seq)] if interval is not None else []
    ranges += [(0, snapshot.seq)] if snapshot is not None else []
    for from_seq, to_seq in ranges:
        after, through = max(after, from_seq), min(through, to_seq)
    return Wanted(damage.volume, damage.block, damage.checksum, after, through)


def _moved(catalog: Catalog, file: str) -> tuple[str, int]:
    """The file where the bytes of that object are, and the base of their offsets."""
    row = catalog.row_of("moved", "name", file) if catalog.has_table("moved") else None
    return (row[1], row[2]) if row is not None else (file, 0)
