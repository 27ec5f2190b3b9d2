"""The directory STORE/pins and its lock: whoever changes or reads pins takes that (`store.pins.pins` says why)."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
        return os.open(LOCK, flags | os.O_CREAT, 0o600, dir_fd=directory)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES):
            raise
        return os.open(LOCK, flags, dir_fd=directory)
