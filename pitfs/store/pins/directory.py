"""The directory STORE/pins and its lock: whoever changes or reads pins takes that (`store.pins.pins` says why)."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from contextlib import suppress
from typing import Final

from pitfs.storage.files import fsync_directory
from pitfs.store.objects.format import PINS

LOCK: Final = "lock"
HOLDERS: Final = "holders"  # what the directory was called first


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


class PinsLock:
    """pins/lock, an flock.

    A process opens it for itself: a descriptor that it inherited would share the lock with the parent instead of
    competing for it. The threads of a process share its descriptor, so they take turns before they take the lock.
    """

    def __init__(self, directory: int) -> None:
        self._directory = directory
        self._fd = self._pid = -1
        self._turn = threading.Lock()

    def take(self, wait: bool) -> bool:
        """False where another has it and this one isn't to wait."""
        if not self._turn.acquire(blocking=wait):
            return False
        try:
            if self._pid != os.getpid():
                self.close()
                self._fd = self._open()
                self._pid = os.getpid()
            fcntl.flock(self._fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BaseException as error:
            self._turn.release()
            if isinstance(error, BlockingIOError):
                return False
            raise
        return True

    def give(self) -> None:
        fcntl.flock(self._fd, fcntl.LOCK_UN)
        self._turn.release()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = self._pid = -1

    def _open(self) -> int:
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            return os.open(LOCK, flags | os.O_CREAT, 0o600, dir_fd=self._directory)
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES):
                raise
            return os.open(LOCK, flags, dir_fd=self._directory)
