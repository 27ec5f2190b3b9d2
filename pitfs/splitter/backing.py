"""The backing volume: an existing regular file or block device, opened so that nobody else writes to it."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from dataclasses import dataclass

from pitfs.errors import UsageError


@dataclass(frozen=True, slots=True)
class Backing:
    """An open backing volume. `mtime_ns` is 0 for a block device, which has none."""

    path: str
    fd: int
    size_bytes: int

    @property
    def mtime_ns(self) -> int:
        status = os.fstat(self.fd)
        return status.st_mtime_ns if stat.S_ISREG(status.st_mode) else 0

    def close(self) -> None:
        os.close(self.fd)


def open_backing(path: str) -> Backing:
    """Opens a backing volume for reading and writing, exclusively as far as the kernel can ensure.

    Raises:
        UsageError: it is missing, of another type, empty, or in use.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise UsageError(
            f"{path}: backing volume: {os.strerror(error.errno or 0)}: create it first, for example with "
            f"'truncate -s 10G {path}', or correct `backing`"
        ) from error
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise UsageError(f"{path}: backing volume: neither a regular file nor a block device")
    if stat.S_ISREG(mode) and written_by_others(path):
        raise in_use(path)
    flags = os.O_RDWR | os.O_CLOEXEC | (os.O_EXCL if stat.S_ISBLK(mode) else 0)  # EXCL: EBUSY if mounted
    try:
        fd = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise in_use(path) from error
        raise UsageError(f"{path}: backing volume: {os.strerror(error.errno or 0)}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        size = os.lseek(fd, 0, os.SEEK_END)
        if size == 0:
            raise UsageError(f"{path}: backing volume: is empty: give it its size first, with truncate(1)")
    except BlockingIOError as error:
        os.close(fd)
        raise in_use(path) from error
    except BaseException:
        os.close(fd)
        raise
    return Backing(path, fd, size)


def in_use(path: str) -> UsageError:
    return UsageError(
        f"{path}: backing volume: in use by another program: unmount it, detach its loop device (losetup -j {path}) "
        "or stop what holds it (fuser -v); only the splitter may write it"
    )


def written_by_others(path: str) -> bool:
    """Whether anybody has the regular file open for writing, as a loop device has. False if the kernel can't say."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        # The kernel grants a read lease only if nobody has it open for writing.
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as error:
        # Other errors: this file system has no leases, or this process isn't the owner.
        return error.errno == errno.EAGAIN
    finally:
        os.close(fd)
    return False
