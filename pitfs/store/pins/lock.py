"""STORE/holders and its lock: whoever changes or reads what is held takes that (`pitfs.store.pins.pins` says why)."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from contextlib import suppress
from typing import Final

LOCK: Final = "lock"


def open_directory(path: str, make: bool) -> int:
    if make:
        with suppress(FileExistsError):
            os.mkdir(path, 0o700)
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


class PinsLock:
    """holders/lock. A descriptor for each process: one that is inherited would share the lock, not compete for it.
    Threads of a process would, too, so they take turns first."""

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
        except BlockingIOError:
            self._turn.release()
            return False
        except BaseException:
            self._turn.release()
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
