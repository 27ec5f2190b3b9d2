"""Opening an existing file or block device so that nobody else writes it, as far as the kernel can tell."""

from __future__ import annotations

import errno
import fcntl
import os
import stat

from pitfs.errors import UsageError
from pitfs.storage.files import closed_on_error, open_fd


def open_exclusively(path: str, name: str) -> tuple[int, int]:
    """Opens a regular file or block device for reading and writing: (descriptor, size in bytes).

    A device is opened with O_EXCL, a file is locked (flock): both exclude other processes of pitfs.

    Args:
        name: for messages.

    Raises:
        BlockingIOError: in use, with errno EBUSY for a device and EAGAIN for a file.
        UsageError: it is of another type.
        OSError: it is missing, or the system refuses.
    """
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise UsageError(f"{name}: neither a regular file nor a block device")
    if stat.S_ISREG(mode) and written_by_others(path):
        raise BlockingIOError(errno.EAGAIN, "written by others", path)
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_EXCL if stat.S_ISBLK(mode) else 0))
    except OSError as error:
        if error.errno == errno.EBUSY:  # mounted, or part of something
            raise BlockingIOError(errno.EBUSY, "in use", path) from error
        raise
    with closed_on_error(fd):
        if stat.S_ISREG(mode):  # udev locks a device to look at it, so a lock of ours would fail now and then
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return fd, os.lseek(fd, 0, os.SEEK_END)


def written_by_others(path: str) -> bool:
    """Whether somebody has the regular file open for writing (a loop device has), as far as the kernel can tell."""
    with open_fd(path, os.O_RDONLY) as fd:
        try:
            # The kernel grants a read lease only while nobody has.
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        except OSError as error:
            # Other errors: this file system has no leases, or the file is not ours.
            return error.errno == errno.EAGAIN
    return False
