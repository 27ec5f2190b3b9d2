"""Open objects: a bounded number of file descriptors, each object's header checked when it is opened."""

from __future__ import annotations

import errno
import os
import resource
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial, wraps
from string import hexdigits
from typing import Final, ParamSpec, Self, TypeVar

from xxhash import xxh3_64_intdigest

from pitfs.errors import CorruptionError
from pitfs.storage.files import read_exactly, storage_error
from pitfs.store.objects.damage import KINDS, Damage, DamageLog, Kind
from pitfs.store.objects.format import HEADER_BYTES, Layout, ObjectHeader, ObjectKind, ObjectName

P = ParamSpec("P")
T = TypeVar("T")

MAX_OPEN_OBJECTS: Final = 256  # well below the usual soft limit of 1024 descriptors
# The blocks of one image may be in as many objects as there were snapshots before it: with 256 descriptors and
# 1,000 such objects reads took 2.5 times as long. Some 500 bytes each, kernel and all.
MAX_OPEN_OBJECTS_READING: Final = 8192
# An object that was removed takes room while it is open. So often that many are looked at: 0.3 ms, all within 16 s.
SWEEP_S: Final = 1.0
SWEEP_COUNT: Final = 512
_OTHER_FILES: Final = 256  # descriptors that are left to whatever else the process does
_CONTENTS: Final = (ObjectKind.SNAPSHOT_BLOCKS, ObjectKind.JOURNAL_BLOCKS)


def reading_limit() -> int:
    """How many objects a reader may keep open: raises the process's soft limit of descriptors as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_OPEN_OBJECTS_READING + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_OPEN_OBJECTS_READING if soft == resource.RLIM_INFINITY else max(min(wanted, soft) - _OTHER_FILES, 64)


class MissingObjectError(CorruptionError):
    """An object is missing: a finer index may have taken its place, or an interval the place of an open one.

    Attributes:
        remember: called where it is still missing when what took its place was looked for.
    """

    remember: Callable[[], None] = staticmethod(lambda: None)


@contextmanager
def remembers_missing() -> Iterator[None]:
    """For a second look: an object that is missing in the block is damage."""
    try:
        yield
    except MissingObjectError as error:
        error.remember()
        raise


def again_if_replaced(method: Callable[P, T]) -> Callable[P, T]:
    """Asks once more where an object is missing: what took its place is in the catalog by now."""

    @wraps(method)
    def ask(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return method(*args, **kwargs)
        except MissingObjectError:
            with remembers_missing():
                return method(*args, **kwargs)

    return ask


class Descriptor(int):
    """A file descriptor, closed when the last one who holds it lets go.

    A thread may be kept waiting between asking for an object's descriptor and reading from it, for as long as
    others need to open any number of objects. Were it closed by then, the read would fail, or be of another file.

    Attributes:
        base: byte o of the object is byte base + o of the file. start: byte of the file where its data area begins.
        path: of the file, if it is another object's; else "".
    """

    __slots__ = ()
    base: int = 0
    start: int = HEADER_BYTES
    path: str = ""

    def __del__(self) -> None:
        os.close(self)


class HostedDescriptor(Descriptor):
    """That of another object, in whose file this one is."""

    def __new__(cls, host: Descriptor, base: int, path: str = "") -> Self:
        """`base`: as the catalog has it."""
        found = super().__new__(cls, host)
        found.host, found.base, found.start, found.path = host, base, base + HEADER_BYTES, path
        return found

    host: Descriptor

    def __del__(self) -> None:
        """The host's is closed when nobody holds it any more, and this one does."""


def _key(name: ObjectName) -> int | ObjectName:
    return name.number if name.kind in _CONTENTS else name


class ObjectPool:
    """Objects of one store, opened for reading as they are needed.

    Args:
        directory: objects/ of the store. layout: of the store.
        history: 16 bytes; an object of another history isn't this store's.
        limit: descriptors that are kept; those in use at the moment come on top.
        clock: seconds that only go forward.
        host_of: of an object that was moved into another one's file: that one, and its base in there; else None.

    Attributes:
        damage: what the store remembers of it; what is met here goes there.
    """

    def __init__(
        self, directory: str, layout: Layout, history: bytes, limit: int = MAX_OPEN_OBJECTS,
        clock: Callable[[], float] = time.monotonic,
        host_of: Callable[[ObjectName], tuple[ObjectName, int] | None] = lambda _: None,
    ) -> None:  # fmt: skip
        self.directory, self.layout, self.damage = directory, layout, DamageLog(os.path.dirname(directory))
        self._history, self._host_of = history, host_of
        self._limit = limit
        # Contents objects by their number, others by their name. Look-ups by number take no lock, since every read
        # makes one. They don't count as a use: at worst an object is opened once more.
        self._open: OrderedDict[int | ObjectName, Descriptor] = OrderedDict()
        self._lock = threading.Lock()
        self._clock, self._swept_s = clock, clock()
        self._unswept: list[int | ObjectName] = []
        # Descriptor of the contents object with that number (of a pointer) if it is open: never waits.
        self.opened: Callable[[int], Descriptor | None] = self._open.get

    def fd(self, object_number: int) -> Descriptor:
        """As `opened`, but opens it if need be; good for as long as the caller holds it.

        Raises:
            CorruptionError: it is missing, or it isn't that object.
            PitfsError: the disk refuses.
        """
        fd = self.opened(object_number)
        return fd if fd is not None else self.fd_of(ObjectName.of_number(object_number))

    def fd_of(self, name: ObjectName) -> Descriptor:
        """As `fd`, for an object of any kind."""
        key = _key(name)
        with self._lock:
            fd = self._open.get(key)
            if fd is not None:
                self._open.move_to_end(key)
                return fd
        fd = self._open_checked(name)  # without the lock: one slow object delays no other
        with self._lock:
            fd = self._open.setdefault(key, fd)  # another thread may have been faster
            if len(self._open) > self._limit:
                self._open.popitem(last=False)
        return fd

    def forget(self, name: ObjectName) -> None:
        """Lets go of an object that was removed: its room is free when the last one who reads it is done."""
        with self._lock:
            self._open.pop(_key(name), None)

    def sweep(self) -> None:
        """As `forget`, of objects that another process removed: each second some of those that are open are looked at.

        Whoever reads one goes on: it holds the descriptor. Whoever asks for it again finds what took its place.
        """
        if self._clock() - self._swept_s < SWEEP_S:
            return
        with self._lock:
            self._swept_s = self._clock()
            self._unswept = self._unswept or list(self._open)
            keys, self._unswept = self._unswept[-SWEEP_COUNT:], self._unswept[:-SWEEP_COUNT]
            for key in keys:
                fd = self._open.get(key)
                if fd is not None and not os.fstat(fd).st_nlink:
                    del self._open[key]

    def path_of(self, name: ObjectName) -> str:
        return os.path.join(self.directory, self.layout.path_of(name.file))

    def place(self, name: ObjectName, offset: int) -> tuple[str, int]:
        """The file in which a byte of an object is, and which one it is there."""
        host, base = self._host_of(name) or (name, 0)
        return self.path_of(host), base + offset

    def newest(self) -> list[ObjectName]:
        """Objects in the newest folder, committed or not; none where the store has no folders."""
        path = self.directory
        for digits in (4, 3) if self.layout.has_folders else ():
            folders = [name for name in os.listdir(path) if len(name) == digits and not set(name) - set(hexdigits)]
            if not folders:
                return []
            path = os.path.join(path, max(folders))
        return [] if path == self.directory else list(filter(None, map(ObjectName.of_file, os.listdir(path))))

    def read_verified(self, name: ObjectName, size: int, offset: int, checksum: int) -> bytes:
        """Bytes of an object whose xxh3_64 is `checksum`.

        Raises:
            CorruptionError: they aren't those.
            PitfsError: the disk refuses.
        """
        fd = self.fd_of(name)
        path, start = fd.path or self.path_of(name), fd.base + offset
        with self._remembers(name, offset, size, KINDS[name.kind]):
            try:
                data = read_exactly(fd, size, start, path)
            except OSError as error:
                raise storage_error(error, path, "reading") from error
            if xxh3_64_intdigest(data) != checksum:
                raise CorruptionError(path, start, f"{size} bytes that don't match their checksum")
        return data

    @contextmanager
    def _remembers(self, name: ObjectName, offset: int, size: int, kind: Kind) -> Iterator[None]:
        try:
            yield
        except MissingObjectError:
            raise
        except CorruptionError:
            self.damage.note(Damage(name.file, offset, size, kind))
            raise

    def close(self) -> None:
        with self._lock:
            self._open.clear()

    def _open_checked(self, name: ObjectName) -> Descriptor:
        path = self.path_of(name)
        try:
            fd = Descriptor(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            if error.errno == errno.ENOENT:
                return self._open_hosted(name)
            raise storage_error(error, path, "opening") from error
        with self._remembers(name, 0, HEADER_BYTES, "header"):
            try:
                header = ObjectHeader.decode(read_exactly(fd, HEADER_BYTES, 0, path), path)
            except OSError as error:
                raise storage_error(error, path, "reading") from error
            if (header.kind, header.snapshot_id, header.history) != (name.kind, name.snapshot_id, self._history):
                raise CorruptionError(path, 0, "it is another object than its name says")
        return fd

    def _open_hosted(self, name: ObjectName) -> Descriptor:
        """That of an object which has no file of its own (any more)."""
        last = None
        while (found := self._host_of(name)) not in (None, last):
            assert found is not None
            try:
                with self._remembers(name, 0, HEADER_BYTES, "header"):
                    return HostedDescriptor(self.fd_of(found[0]), found[1], self.path_of(found[0]))
            except MissingObjectError:  # it may have been moved on meanwhile
                last = found
        missing = MissingObjectError(self.path_of(name), 0, "the object is missing")
        missing.remember = partial(self.damage.note, Damage(name.file, 0, 0, "missing"))
        raise missing
