"""Pins: the instants that processes read, which a removal has to leave.

Every process that reads images (a mount, an NBD server, an export) has a file in the store, with what it has pinned:

    STORE/pins/lock           flock: whoever changes or reads pins
    STORE/pins/<pid>-<hex>    the pins of one process; flocked as long as the process lives

There are two locks, since there are two questions.

**Does the process live?** Its file is flocked for its whole life, by a descriptor that the workers it forks share.
The kernel drops the lock with the last of them, however it dies. A file that isn't locked is a dead process's and
means nothing; whoever comes next removes it. A pid would prove nothing: the system uses it again.

**Can a pin and a removal cross?** Both sides take pins/lock, exclusively:

    reader:   resolves TIME to a seq; takes the lock; writes its pin; gives the lock back; resolves the seq again;
              reads
    removal:  takes the lock; reads all pins; decides; commits the catalog without what goes; gives the lock back;
              unlinks objects

If the pin comes first, the removal sees it and leaves the instant. If the removal comes first, the reader's second
look finds that the catalog no longer has the instant, and says so before it has read anything. `Pins.pin` is the
reader's half, `pins_locked` is the removal's, and `Pins.pinned` does the reader's steps in order.

Nothing here is synced: after a power loss no process lives, so no pin counts.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import Final, Protocol

from pitfs.errors import CorruptionError, NoSuchInstantError
from pitfs.model.position import Position, format_instant
from pitfs.storage.files import fsync_directory, storage_error
from pitfs.store.catalog.records import Resolution
from pitfs.store.objects.format import PINS
from pitfs.store.pins.pin_file import PinFile, PinnedInstants

log = logging.getLogger(__name__)

_LOCK: Final = "lock"
HOLDERS: Final = "holders"  # what the directory was called first


class Resolver(Protocol):
    """What pins need of a store."""

    path: str

    def at_seq(self, seq: int) -> Resolution: ...


class Pins(AbstractContextManager["Pins"]):
    """The pins of this process, and of those that it forks.

    Made after the fork that goes to the background and before workers are forked (those before any thread pins): they
    may pin and unpin through the copy that they inherit, from any thread, and one may unpin what another has pinned.
    Where the store isn't writable, reading goes on without pins, and the log says so once.

    Args:
        store: directory of an existing store.
        what: what it is and where, with a path that is absolute and has no links: "mount /mnt/db1",
            "export /srv/x.img". `pitfs status` shows it, and for a mount the loop devices over files below.
        owner: pid of the process that it stands for, this one unless told. A process that is to stay small, without
            numpy, has another make its pins: it gets `file` from there, for those that it forks.
        file: in those: the `file` that they have inherited. The descriptor is closed with this.
    """

    def __init__(self, store: str, what: str, owner: int | None = None, file: tuple[str, int] | None = None) -> None:
        self.what = what
        self._path = os.path.join(store, PINS)
        self._owner = os.getpid() if owner is None else owner
        name = f"{self._owner}-{secrets.token_hex(4)}"
        self._name, self._fd = (os.path.basename(file[0]), file[1]) if file else (name, -1)
        self._directory: int | None = None
        self._is_warned = False
        try:
            self._directory = open_directory(store, make=file is None)
            if self._directory is None:
                raise FileNotFoundError(errno.ENOENT, "pins/ has been removed")
            if file is None:
                self._make_file(self._directory)
        except OSError as error:
            self.close()
            self._not_pinned(error)

    @property
    def file(self) -> tuple[str, int] | None:
        """Path and descriptor of its file; None where the store isn't writable."""
        return (os.path.join(self._path, self._name), self._fd) if self._fd >= 0 else None

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends all pins; in a forked worker it closes the worker's copy alone."""
        if self._fd >= 0:
            with suppress(OSError):
                if self._directory is not None and os.getpid() == self._owner:
                    os.unlink(self._name, dir_fd=self._directory)
            os.close(self._fd)
        if self._directory is not None:
            os.close(self._directory)
        self._directory, self._fd = None, -1

    def pin(self, seq: int, time_ns: int, wait: bool = True) -> bool:
        """Pins an instant once more, before it is resolved: see above.

        Args:
            wait: for whoever has the lock; a removal may have it for seconds. In an event loop: no, and where it
                returns False again with it in a thread.

        Returns:
            False if it would have had to wait.
        """
        return self._change(lambda file: file.pin(Position(seq, time_ns)), wait)

    def unpin(self, seq: int, wait: bool = True) -> bool:
        """Takes one `pin` of that seq back; one that didn't come about is passed over. Waits as `pin` does."""
        return self._change(lambda file: file.unpin(seq), wait)

    def pinned(self, store: Resolver, resolution: Resolution) -> Resolution:
        """Pins an instant, and resolves it again now that it can't go.

        Raises:
            NoSuchInstantError: it went before; nothing is pinned.
        """
        self.pin(resolution.seq, resolution.time_ns)
        try:
            now = store.at_seq(resolution.seq)
            if (now.seq, now.time_ns) != (resolution.seq, resolution.time_ns):
                instant = format_instant(resolution.time_ns)
                raise NoSuchInstantError(f"{store.path}: {instant} has just been pruned: see pitfs list {store.path}")
        except BaseException:
            self.unpin(resolution.seq)
            raise
        return now

    def _make_file(self, directory: int) -> None:
        with locked(directory):  # nobody may take the file for a dead process's before it is flocked
            _read_all(directory)
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._fd = os.open(self._name, flags, 0o600, dir_fd=directory)
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            PinFile(self._fd, self._name).make(self._owner, self.what)

    def _change(self, change: Callable[[PinFile], None], wait: bool) -> bool:
        if self._fd < 0 or self._directory is None:
            return True
        try:
            with locked(self._directory, wait) as is_held:
                if is_held:
                    change(PinFile(self._fd, self._name))
                return is_held
        except (OSError, CorruptionError) as error:
            self._not_pinned(error)
        return True

    def _not_pinned(self, error: Exception) -> None:
        if not self._is_warned:
            self._is_warned = True
            reason = os.strerror(error.errno or 0) if isinstance(error, OSError) else str(error)
            log.warning("%s: not pinned: %s: what is read here may be pruned meanwhile", self._path, reason)


@contextmanager
def pins_locked(store: str, make: bool = True) -> Iterator[list[PinnedInstants]]:
    """The pins of all living processes, oldest first; none comes or goes until the block ends: a removal's half.

    Files of dead processes are removed.

    Args:
        make: the directory if it is missing: without it there is nothing to lock.

    Raises:
        PitfsError: the directory can't be made or read.
    """
    path = os.path.join(store, PINS)
    with ExitStack() as stack:
        try:
            found: list[PinnedInstants] = []
            directory = open_directory(store, make)
            if directory is not None:
                stack.callback(os.close, directory)
                with suppress(FileNotFoundError):  # read-only, and nobody has ever pinned
                    stack.enter_context(locked(directory))
                    found = _read_all(directory)
                with suppress(FileNotFoundError):  # an older pitfs has made its own beside pins/
                    older = os.open(os.path.join(store, HOLDERS), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                    stack.callback(os.close, older)
                    if not os.path.samestat(os.fstat(older), os.fstat(directory)):
                        stack.enter_context(locked(older))
                        found += _read_all(older)
        except OSError as error:
            raise storage_error(error, path, "looking who has pinned what") from error
        yield sorted(found, key=lambda each: (each.since_ns, each.pid))


def list_pins(store: str) -> list[PinnedInstants]:
    """The pins of all living processes, oldest first. Also of a store that isn't writable. Raises as `pins_locked`."""
    with pins_locked(store, make=False) as found:
        return found


def _read_all(directory: int) -> list[PinnedInstants]:
    """Reads the files of the living and removes those of the dead; under the lock."""
    found = []
    for name in sorted(set(os.listdir(directory)) - {_LOCK}):
        try:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
        except FileNotFoundError:  # closing takes no lock
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            found.append(PinFile(fd, name).pinned_instants())
        else:
            with suppress(OSError):  # read-only: it stays, and means nothing
                os.unlink(name, dir_fd=directory)
        finally:
            os.close(fd)
    return found


def open_directory(store: str, make: bool) -> int | None:
    """A descriptor of pins/; None where there isn't one and none is to be made.

    A store that no writer has opened since the directory got its name has HOLDERS in its place. Its readers use that:
    two directories would be two locks, and a pin in one wouldn't be seen by who looks into the other.
    """
    for name in (PINS, HOLDERS, PINS):  # once more: it may have been renamed between the first two
        with suppress(FileNotFoundError):
            return os.open(os.path.join(store, name), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    if not make:
        return None
    with suppress(FileExistsError):
        os.mkdir(os.path.join(store, PINS), 0o700)
    return open_directory(store, make=False)


def convert_directory(store: str) -> None:
    """Gives the directory of an older store its name of today; only for the store's one writer.

    Who pins in it goes on: files and the lock are reached by a descriptor of the directory, which a rename leaves
    alone.
    """
    before, now = os.path.join(store, HOLDERS), os.path.join(store, PINS)
    if os.path.isdir(before) and not os.path.exists(now):
        os.rename(before, now)
        fsync_directory(store)


@contextmanager
def locked(directory: int, wait: bool = True) -> Iterator[bool]:
    """Holds pins/lock, an flock, until the block ends; gives False where another has it and this one isn't to wait.

    The file is opened anew each time, since an flock is of what was opened: threads and forked workers that share a
    descriptor would share the lock as well, not compete for it. Closing gives the lock back.
    """
    fd, is_held = _open_lock(directory), False
    try:
        with suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            is_held = True
        yield is_held
    finally:
        os.close(fd)


def _open_lock(directory: int) -> int:
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(_LOCK, flags | os.O_CREAT, 0o600, dir_fd=directory)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES):
            raise
        return os.open(_LOCK, flags, dir_fd=directory)
