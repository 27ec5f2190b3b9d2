"""The backing volume: an existing regular file or block device, opened so that nobody else writes it."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass

from pitfs.errors import UsageError
from pitfs.storage.exclusive import open_exclusively


@dataclass(frozen=True, slots=True)
class Backing:
    """An open backing volume. `mtime_ns` is 0 for a block device, which keeps none."""

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
    name = f"{path}: backing volume"
    try:
        fd, size_bytes = open_exclusively(path, name)
    except BlockingIOError as error:
        raise UsageError(
            f"{name}: in use by another program: unmount it, detach its loop device (losetup -j {path}) "
            "or stop what holds it (fuser -v); only the splitter may write it"
        ) from error
    except OSError as error:
        raise UsageError(
            f"{name}: {os.strerror(error.errno or 0)}: create it first, for example with "
            f"'truncate -s 10G {path}', or correct `backing`"
        ) from error
    if size_bytes == 0:
        os.close(fd)
        raise UsageError(f"{name}: is empty: give it its size first, with truncate(1)")
    return Backing(path, fd, size_bytes)
