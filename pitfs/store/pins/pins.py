"""Who holds which instants: what an open or attached image needs isn't removed under it.

Every process that reads images (a mount, an NBD server, an export) is a holder and has a file in the store:

    STORE/holders/lock           flock: whoever changes or reads what is held
    STORE/holders/<pid>-<hex>    one holder; flocked as long as it lives, so one that isn't is a dead one's

Two locks, two questions. **Does the holder live?** Its file is flocked for its whole life, by a descriptor that
forked workers share: the lock goes with the last of them, however it dies. A pid would say nothing: it is used
again. **Can a pin and a removal cross?** Both sides take holders/lock, exclusively:

    reader: resolves TIME to a seq; pins it (lock, write, unlock); resolves the seq again; reads
    prune:  locks; reads all pins; decides; commits the catalog without what goes; unlocks; unlinks objects

A pin that comes first is seen and kept. One that comes later is followed by a look at a catalog that doesn't have
the instant any more: the reader finds nothing rather than half. `pin` is the reader's half, `pins_locked` that of
prune, `pinned` does the reader's steps in order.

Nothing is synced: after a power loss every holder is dead. Files of the dead are removed by whoever comes next. What
stands in them: `store.holder_file`.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Self

import numpy as np

from pitfs.errors import CorruptionError, NoSuchInstantError
from pitfs.model.position import format_instant
from pitfs.storage.files import storage_error, write_all
from pitfs.store.catalog.records import Resolution
from pitfs.store.objects.format import PINS
from pitfs.store.pins.lock import LOCK, PinsLock, open_directory
from pitfs.store.pins.pin_file import (
    HEADER,
    MAGIC,
    MAX_WHAT_BYTES,
    PAGE_BYTES,
    PAGES,
    VERSION,
    Entries,
    PinnedInstants,
    entries_in,
    read,
    read_page,
    sealed,
)
from pitfs.store.store import Store

log = logging.getLogger(__name__)



class Pins:
    """This process, and those that it forks, as a holder of a store's instants.

    Made after the fork that goes to the background and before workers are forked (those before any thread pins): they
    may pin and unpin through the copy that they inherit, from any thread, and one may unpin what another has pinned.
    Where the store can't be written, reading goes on without pins, and the log says so once.

    Args:
        store: directory of an existing store.
        what: what it is and where, with a path that is absolute and has no links: "mount /mnt/db1",
            "export /srv/x.img". `pitfs status` shows it, and for a mount the loop devices over files below.
        owner: pid of the process that it stands for, this one unless told: one that is to stay small, without
            numpy, has another make it. `file` is what it is given for those that it forks, `inherited` is theirs.
    """

    def __init__(self, store: str, what: str, owner: int | None = None) -> None:
        self.what = what
        self._path = os.path.join(store, PINS)
        self._owner = os.getpid() if owner is None else owner
        self._name = f"{self._owner}-{secrets.token_hex(4)}"
        self._directory = self._fd = -1
        self._told = False
        try:
            self._directory = open_directory(self._path, make=True)
            self._lock = PinsLock(self._directory)
            self._make_file()
        except OSError as error:
            self.close()
            self._not_pinned(error)

    @classmethod
    def inherited(cls, what: str, owner: int, path: str, fd: int) -> Self:
        """One that another process has made, in a process forked by its owner; takes the descriptor over."""
        holder = cls.__new__(cls)
        holder.what, holder._owner, holder._fd, holder._told = what, owner, fd, False
        holder._path, holder._name = os.path.split(path)
        try:
            holder._directory = open_directory(holder._path, make=False)
        except OSError as error:  # removed since: as where it can't be written
            os.close(fd)
            holder._directory = holder._fd = -1
            holder._not_pinned(error)
        else:
            holder._lock = PinsLock(holder._directory)
        return holder

    @property
    def file(self) -> tuple[str, int] | None:
        """Path and descriptor of its file; None where the store can't be written."""
        return (os.path.join(self._path, self._name), self._fd) if self._fd >= 0 else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends all pins; in a forked worker only its own copy is closed."""
        if self._fd >= 0:
            with suppress(OSError):
                if os.getpid() == self._owner:
                    os.unlink(self._name, dir_fd=self._directory)
            os.close(self._fd)
            self._lock.close()
        if self._directory >= 0:
            os.close(self._directory)
        self._directory = self._fd = -1

    def pin(self, seq: int, time_ns: int, wait: bool = True) -> bool:
        """Holds an instant once more, before it is resolved: see above.

        Args:
            wait: for whoever has the lock; a removal may have it for seconds. In an event loop: no, and where it
                returns False again with it in a thread.

        Returns:
            False if it would have had to wait.
        """
        return self._change(lambda: self._pin(seq, time_ns), wait)

    def unpin(self, seq: int, wait: bool = True) -> bool:
        """Takes one `pin` of that seq back; one that didn't come about is passed over. Waits as `pin` does."""
        return self._change(lambda: self._unpin(seq), wait)

    def pinned(self, store: Store, resolution: Resolution) -> Resolution:
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

    # -------------------------------------------------------------- inside

    def _make_file(self) -> None:
        what = self.what.encode("utf-8", "replace")[:MAX_WHAT_BYTES]
        header = HEADER.pack(MAGIC, VERSION, self._owner, time.time_ns(), 0, 0, 0, 0, 0, len(what)) + what
        self._lock.take(True)
        try:  # under the lock, so that nobody takes it for a dead one's before it is flocked
            _sweep(self._directory)
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            fd = os.open(self._name, flags, 0o600, dir_fd=self._directory)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
                write_all(fd, sealed(header) + bytes(PAGES * PAGE_BYTES), 0)  # whole: pins don't need new room
            except BaseException:
                os.close(fd)
                with suppress(OSError):
                    os.unlink(self._name, dir_fd=self._directory)
                raise
            self._fd = fd
        finally:
            self._lock.give()

    def _change(self, change: Callable[[], None], wait: bool) -> bool:
        if self._fd < 0:
            return True
        try:
            if not self._lock.take(wait):
                return False
            try:
                change()
            finally:
                self._lock.give()
        except (OSError, CorruptionError) as error:
            self._not_pinned(error)
        return True

    def _pin(self, seq: int, time_ns: int) -> None:
        page, entries = self._entries_of(seq)
        found = np.flatnonzero((entries[:, 0] == seq) & (entries[:, 2] != 0))
        room = found if len(found) else np.flatnonzero(entries[:, 2] == 0)
        if len(room):
            entries[room[0]] = seq, time_ns, int(entries[room[0], 2]) + 1
            self._write(page, entries)
            return
        header, what = self._header()
        count, least, greatest = header[4], tuple(header[5:7]), tuple(header[7:9])
        here = (seq, time_ns)
        if count:
            least, greatest = min(least, here), max(greatest, here)
        else:
            least = greatest = here
        self._write_header((*header[:4], count + 1, *least, *greatest, header[9]), what)

    def _unpin(self, seq: int) -> None:
        page, entries = self._entries_of(seq)
        found = np.flatnonzero((entries[:, 0] == seq) & (entries[:, 2] != 0))
        if len(found):
            entries[found[0], 2] -= 1
            self._write(page, entries)
            return
        header, what = self._header()
        if header[4] and header[5] <= seq <= header[7]:
            self._write_header((*header[:4], header[4] - 1, *header[5:]), what)

    def _entries_of(self, seq: int) -> tuple[int, Entries]:
        page = 1 + ((seq * 0x9E3779B97F4A7C15 & (1 << 64) - 1) >> 40) % PAGES
        return page, entries_in(read_page(self._fd, page, self._name))

    def _write(self, page: int, entries: Entries) -> None:
        write_all(self._fd, sealed(entries.tobytes()), page * PAGE_BYTES)

    def _header(self) -> tuple[tuple[int, ...], bytes]:
        body = read_page(self._fd, 0, self._name)
        return HEADER.unpack_from(body), body[HEADER.size :]

    def _write_header(self, header: tuple[int, ...], what: bytes) -> None:
        write_all(self._fd, sealed(HEADER.pack(*header) + what), 0)

    def _not_pinned(self, error: Exception) -> None:
        if not self._told:
            self._told = True
            reason = os.strerror(error.errno or 0) if isinstance(error, OSError) else str(error)
            log.warning("%s: not pinned: %s: what is read here may be pruned meanwhile", self._path, reason)


@contextmanager
def pins_locked(store: str) -> Iterator[list[PinnedInstants]]:
    """All living holders, and no pin comes or goes until the block ends: prune's half, see above.

    Raises:
        PitfsError: the directory can't be made or read.
    """
    path = os.path.join(store, PINS)
    try:
        directory = open_directory(path, make=True)
    except OSError as error:
        raise storage_error(error, path, "looking who holds what") from error
    with _locked(directory, path) as found:
        yield found


def held(store: str) -> list[PinnedInstants]:
    """All living holders, oldest first; files of dead ones are removed. Also of a store that can't be written.

    Raises:
        PitfsError: the directory can't be read.
    """
    path = os.path.join(store, PINS)
    try:
        directory = open_directory(path, make=False)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise storage_error(error, path, "looking who holds what") from error
    with _locked(directory, path) as found:
        return found


@contextmanager
def _locked(directory: int, path: str) -> Iterator[list[PinnedInstants]]:
    """Takes the descriptor of holders/ over."""
    try:
        lock = PinsLock(directory)
        try:
            lock.take(True)
        except FileNotFoundError:  # read-only, and there was never a holder
            found = []
        except OSError as error:
            raise storage_error(error, path, "locking") from error
        else:
            try:
                found = _sweep(directory)
            except OSError as error:
                raise storage_error(error, path, "looking who holds what") from error
        try:
            yield sorted(found, key=lambda each: (each.since_ns, each.pid))
        finally:
            lock.close()
    finally:
        os.close(directory)


def _sweep(directory: int) -> list[PinnedInstants]:
    """Reads the files of the living, removes those of the dead; under the lock."""
    found = []
    for name in sorted(os.listdir(directory)):
        if name == LOCK:
            continue
        try:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
        except FileNotFoundError:  # closing takes no lock
            continue
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                found.append(read(fd, name))
            else:
                with suppress(OSError):  # read-only: it stays, and means nothing
                    os.unlink(name, dir_fd=directory)
        finally:
            os.close(fd)
    return found


