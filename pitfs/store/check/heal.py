"""Damaged contents come back from production.

Whoever receives into a store asks for the contents that its `damaged` names, while production is connected and speaks
a version of the protocol that can answer. `Healer` holds a lock for so long: others see that something may come,
however the receiver dies. Contents are written in place: the very bytes that were committed, as their checksum says.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from itertools import islice
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
from pitfs.store.objects.format import CATALOG, HEADER_BYTES, HEAL_LOCK, ObjectHeader, ObjectKind, ObjectName
from pitfs.store.opening import changes_locked
from pitfs.store.store import Store

log = logging.getLogger(__name__)

STALL_S: Final = 60.0  # without an answer: then no more is waited for
POLL_S: Final = 0.2


def may_heal(damage: Damage) -> bool:
    """Whether production may have it: a content that isn't known to be gone there."""
    return damage.checksum is not None and damage.state != "gone"


class Healer:
    """Heals the store ROOT/GROUP for a session: see `link.sessions.applier.HealerProtocol`."""

    def __init__(self, root: str, hello: Hello) -> None:
        self._path, self._closing = os.path.join(root, hello.group), ExitStack()
        self._log = DamageLog(self._path)
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
                known = self._log.known()
                unusable = {each.object for each in known if each.checksum is None}  # until `heal` makes it again
                wanted = (each for each in known if may_heal(each) and each.object not in unusable)
                self._asked = list(islice(wanted, MAX_WANTED))
                if self._asked:
                    with closing(Catalog(os.path.join(self._path, CATALOG))) as catalog:
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
        gone = sum(each is not None for each in settled.values())
        if settled:
            said = "%s: damaged contents: %d healed, %d that production has no more"
            log.warning(said, self._path, len(settled) - gone, gone)
        if failure is not None:
            raise failure

    def _write(self, damage: Damage, content: bytes) -> None:
        """Writes a content where the object is now, and reads it again from the disk."""
        name = ObjectName.of_file(damage.object)
        with changes_locked(self._path), _opened(self._path) as (catalog, store):
            is_wal = name in {each.wal for each in catalog.open_intervals()}
            if name is None or not (is_wal or catalog.object(name.file)):
                return  # it was removed since
            path, found = store.objects.path_of(name), store.objects.fd_of(name)
            if (len(content), xxh3_64_intdigest(content)) != (damage.size, damage.checksum):
                raise PitfsError(f"{path}: byte {damage.offset}: production gave another content: is it pitfs?")
            if catalog.host_of(name) and not _is_live(catalog, store, name, damage):
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


def heal(store: str, progress: Callable[[int], AbstractContextManager[Callable[[int], None]]]) -> int:
    """Waits until production has answered for the contents that are damaged now.

    Args:
        progress: gives, for a number of bytes, what is told how many of these have an answer.

    Returns:
        how many came, or were made again here.

    Raises:
        LinkError: no production that can give them is connected, or none came for STALL_S.
    """
    made, damages, since_s = _make_frames(store), DamageLog(store), time.monotonic()
    asked = left = {each.place: each.size for each in damages.known() if may_heal(each)}
    waiting = f"{store}: %d damaged contents wait for production, and %s"
    if asked and not _production_listens(store):
        why = "none that can give them is connected: start 'pitfs protect' of this version there"
        raise LinkError(waiting % (len(left), why))
    with progress(sum(asked.values())) as reached:
        while left:
            time.sleep(POLL_S)
            waits = {each.place for each in damages.known() if may_heal(each)}
            before, left = left, {place: size for place, size in left.items() if place in waits}
            since_s = time.monotonic() if len(left) < len(before) else since_s
            reached(sum(asked.values()) - sum(left.values()))
            if time.monotonic() - since_s > STALL_S:
                raise LinkError(waiting % (len(left), f"none came for {STALL_S:g} s: see the log of 'pitfs receive'"))
    return made + len(asked.keys() - {each.place for each in damages.known()})


def _production_listens(store: str) -> bool:
    """Whether a production host that can give contents is connected to who receives into the store."""
    with suppress(FileNotFoundError), open_fd(os.path.join(store, HEAL_LOCK), os.O_RDONLY) as fd:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _make_frames(path: str) -> int:
    """Makes files and headers of contents again where these are missing or damaged; returns how many.

    What was in a file is zeros then: damage that is known already, or that the next check finds.
    """
    damages, made, contents = DamageLog(path), 0, (ObjectKind.SNAPSHOT_BLOCKS, ObjectKind.JOURNAL_BLOCKS)
    names = {name for each in damages.known() if each.checksum is None and (name := ObjectName.of_file(each.object))}
    if not (names := {name for name in names if name.kind in contents}):
        return 0
    try:
        with changes_locked(path), _opened(path) as (catalog, store):
            for name in names:
                record = catalog.object(name.file)
                if record is None or catalog.host_of(name):
                    continue
                file, sizes = store.objects.path_of(name), () if name.number & 1 else (record.data_bytes,)
                header = ObjectHeader(name.kind, bytes.fromhex(store.history), name.snapshot_id, *sizes)
                os.makedirs(os.path.dirname(file), 0o700, exist_ok=True)
                with open_fd(file, os.O_RDWR | os.O_CREAT) as fd:
                    write_all(fd, header.encode(), 0)
                    os.ftruncate(fd, max(os.fstat(fd).st_size, HEADER_BYTES + record.data_bytes))
                    os.fsync(fd)
                fsync_directory(os.path.dirname(file))
                made += 1
    except OSError as error:
        raise storage_error(error, path, "healing") from error
    files = {name.file for name in names}
    damages.update(lambda known: [each for each in known if each.checksum is not None or each.object not in files])
    return made


@contextmanager
def _opened(path: str) -> Iterator[tuple[Catalog, Store]]:
    with closing(Store.open(path)) as store, closing(Catalog(os.path.join(path, CATALOG))) as catalog:
        yield catalog, store


def _is_live(catalog: Catalog, store: Store, name: ObjectName, damage: Damage) -> bool:
    """Whether the first snapshot that may have it does: what is dead of a moved object isn't in its host."""
    layout, row = store.objects.layout, catalog.row("snapshots", "WHERE id >= ? ORDER BY id", name.snapshot_id)
    if row is None:
        return False
    maps = block_maps(node_loader(store.objects), catalog.roots(row[0]), store.volumes)
    pointers, checksums = look_up(maps, np.array([damage.volume], "<u2"), np.array([damage.block], "<i8"))
    place = layout.object_of(pointers.item()), layout.offset_of(pointers.item()), checksums.item()
    return place == (name.number, damage.offset, damage.checksum)


def _wanted(catalog: Catalog, damage: Damage) -> Wanted:
    """With the narrower of two ranges of writes: where it was met, and that of the interval whose object has it."""
    name = ObjectName.of_file(damage.object)
    assert name and damage.volume is not None and damage.block is not None and damage.checksum is not None
    interval = catalog.interval_to(name.snapshot_id)
    after, through = (interval.from_seq, interval.to_seq) if interval is not None else (0, MAX_NUMBER)
    after, through = max(after, damage.after_seq), min(through, damage.through_seq or MAX_NUMBER)
    return Wanted(damage.volume, damage.block, damage.checksum, after, through)
