"""Damaged contents come back from production.

Whoever receives into a store asks for the contents that its `damaged` names, while production is connected and speaks
a version of the protocol that can answer. `Healer` holds a lock for so long: others see that something may come,
however the receiver dies. Contents are written in place: the very bytes that were committed, as their checksum says.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Final

import numpy as np
from msgspec.structs import replace
from xxhash import xxh3_64_intdigest

from pitfs.errors import CorruptionError, LinkError, PitfsError
from pitfs.model.transfer import MAX_NUMBER, MAX_WANTED, Hello, Wanted
from pitfs.storage.files import fsync_directory, open_fd, read_exactly, storage_error, write_all
from pitfs.store.catalog.catalog import Catalog
from pitfs.store.index.maps import block_maps, look_up, node_loader
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

STALL_S: Final = 60.0  # without an answer: then no more is waited for
POLL_S: Final = 0.2


def may_heal(damage: Damage) -> bool:
    """Whether production may have it: a content that isn't known to be gone there."""
    return damage.checksum is not None and damage.state != "gone"


class Healer:
    """Heals the store ROOT/GROUP for a session: see `link.sessions.applier.HealerProtocol`."""

    def __init__(self, root: str, hello: Hello) -> None:
        self._path, self._volumes = os.path.join(root, hello.group), hello.volumes
        self._log, self._closing = DamageLog(self._path), ExitStack()
        self._lock: int | None = None
        self._seen = (0, 0)  # size and time of the log when nothing in it was wanted
        self._asked: list[Damage] = []

    def close(self) -> None:
        self._closing.close()

    def wanted(self) -> tuple[Wanted, ...]:
        """Costs a stat while the log doesn't change."""
        if self._lock is None:
            path = os.path.join(self._path, HEAL_LOCK)
            self._lock = self._closing.enter_context(open_fd(path, os.O_RDWR | os.O_CREAT))
            fcntl.flock(self._lock, fcntl.LOCK_SH)
        with suppress(FileNotFoundError):
            status = os.stat(self._log.path)
            if (seen := (status.st_size, status.st_mtime_ns)) != self._seen:
                self._asked = list(filter(may_heal, self._log.known()))[:MAX_WANTED]
                if self._asked:
                    with _opened(self._path) as (catalog, _):
                        return tuple(_wanted(catalog, each) for each in self._asked)
                self._seen = seen
        return ()

    def take(self, contents: Sequence[bytes | None]) -> None:
        """Writes what came. Raises PitfsError for what couldn't be written, when all else is."""
        settled, failure = dict[tuple[str, int], Damage | None](), None
        for damage, content in zip(self._asked, contents, strict=True):
            try:
                if content is not None:
                    self._write(damage, content)
                settled[damage.place] = replace(damage, state="gone") if content is None else None
            except PitfsError as error:
                failure = error
        self._log.update(lambda known: [new for each in known if (new := settled.get(each.place, each))])
        if failure is not None:
            raise failure

    def _write(self, damage: Damage, content: bytes) -> None:
        """Writes a content where the object is now, and reads it again from the disk."""
        name = ObjectName.of_file(damage.object)
        with changes_locked(self._path), _opened(self._path) as (catalog, objects):
            is_wal = name in {each.wal for each in catalog.open_intervals()}
            if name is None or not (is_wal or catalog.object(name.file)):
                return  # it was removed since
            path, found = objects.path_of(name), objects.fd_of(name)
            if (len(content), xxh3_64_intdigest(content)) != (damage.size, damage.checksum):
                raise PitfsError(f"{path}: byte {damage.offset}: production gave another content: is it pitfs?")
            if catalog.host_of(name) and not self._is_live(catalog, objects, name, damage):
                return  # the same
            try:
                with open_fd(f"/proc/self/fd/{found:d}", os.O_RDWR) as fd:
                    offset = found.base + damage.offset
                    write_all(fd, content, offset)
                    os.fsync(fd)
                    os.posix_fadvise(fd, offset, damage.size, os.POSIX_FADV_DONTNEED)  # now it comes from the disk
                    if read_exactly(fd, damage.size, offset, path) != content:
                        raise CorruptionError(path, offset, "what is written there doesn't stay: replace the disk")
            except OSError as error:
                raise storage_error(error, path, "healing") from error

    def _is_live(self, catalog: Catalog, objects: ObjectPool, name: ObjectName, damage: Damage) -> bool:
        """Whether the first snapshot that may have it does: what is dead of a moved object isn't in its host."""
        layout, row = objects.layout, catalog.row("snapshots", "WHERE id >= ? ORDER BY id", name.snapshot_id)
        if row is None:
            return False
        maps = block_maps(node_loader(objects), catalog.roots(row[0]), self._volumes)
        pointers, checksums = look_up(maps, np.array([damage.volume], "<u2"), np.array([damage.block], "<i8"))
        place = layout.object_of(pointers.item()), layout.offset_of(pointers.item()), checksums.item()
        return place == (name.number, damage.offset, damage.checksum)


def wait_healed(store: str, progress: Callable[[int, int], None] = lambda *_: None) -> int:
    """Waits until production has answered for the contents that are damaged now; returns how many came.

    Args:
        progress: is told how many have an answer, and of how many.

    Raises:
        LinkError: no production that can give them is connected, or none came for STALL_S.
    """
    log, since_s = DamageLog(store), time.monotonic()
    asked = left = {each.place for each in log.known() if may_heal(each)}
    while left:
        listens = _production_listens(store)
        if time.monotonic() - since_s > STALL_S or (left == asked and not listens):
            why = f"nothing came for {STALL_S:g} s: see the log of 'pitfs receive'"
            if not listens:
                why = "no host that can give them is connected: start 'pitfs protect' there, of this version or later"
            raise LinkError(f"{store}: {len(left)} damaged contents wait for production, but {why}")
        time.sleep(POLL_S)
        before, left = left, left & {each.place for each in log.known() if may_heal(each)}
        since_s = time.monotonic() if left < before else since_s
        progress(len(asked) - len(left), len(asked))
    return len(asked - {each.place for each in log.known()})


def _production_listens(store: str) -> bool:
    """Whether a production host that can give contents is connected to who receives into the store."""
    with suppress(FileNotFoundError), open_fd(os.path.join(store, HEAL_LOCK), os.O_RDONLY) as fd:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def make_frames(store: str) -> bool:
    """Makes files and headers of contents again where these are damaged or missing; whether there were any.

    What the files held is zeros then: the next check finds it, content by content.
    """
    made, info = False, read_store_info(store)
    with changes_locked(store), _opened(store) as (catalog, objects):
        for each in DamageLog(store).known():
            name, record = ObjectName.of_file(each.object), catalog.object(each.object)
            is_contents = name and name.kind in (ObjectKind.SNAPSHOT_BLOCKS, ObjectKind.JOURNAL_BLOCKS)
            if name is None or not is_contents or record is None or each.checksum or catalog.host_of(name):
                continue
            path, sizes = objects.path_of(name), () if name.number & 1 else (record.data_bytes,)
            header = ObjectHeader(name.kind, bytes.fromhex(info.history), name.snapshot_id, *sizes)
            try:
                os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
                with open_fd(path, os.O_RDWR | os.O_CREAT) as fd:
                    write_all(fd, header.encode(), 0)
                    os.ftruncate(fd, max(os.fstat(fd).st_size, HEADER_BYTES + record.data_bytes))
                    os.fsync(fd)
                fsync_directory(os.path.dirname(path))
            except OSError as error:
                raise storage_error(error, path, "healing") from error
            made = True
    return made


@contextmanager
def _opened(path: str) -> Iterator[tuple[Catalog, ObjectPool]]:
    info = read_store_info(path)
    with ExitStack() as closing:
        closing.callback((catalog := Catalog(os.path.join(path, CATALOG))).close)
        history = bytes.fromhex(info.history)
        objects = ObjectPool(os.path.join(path, OBJECTS), info.layout, history, host_of=catalog.host_of)
        closing.callback(objects.close)
        yield catalog, objects


def _wanted(catalog: Catalog, damage: Damage) -> Wanted:
    """With the narrower of two ranges of writes: where it was met, and that of the interval whose object has it."""
    name = ObjectName.of_file(damage.object)
    assert name and damage.volume is not None and damage.block is not None and damage.checksum is not None
    interval = catalog.interval_to(name.snapshot_id)
    after, through = (interval.from_seq, interval.to_seq) if interval is not None else (0, MAX_NUMBER)
    after, through = max(after, damage.after_seq), min(through, damage.through_seq or MAX_NUMBER)
    return Wanted(damage.volume, damage.block, damage.checksum, after, through)
