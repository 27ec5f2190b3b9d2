"""A protected volume: its backing file or device, and how far the running copy of it is."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass, field

from pyroaring import BitMap64

from pitfs.errors import UsageError
from pitfs.storage.exclusive import open_exclusively


@dataclass(slots=True)
class Volume:
    """A protected volume.

    Attributes:
        path, fd: of the backing file or device.
        copied_block: blocks before this one need not be preserved for the running copy.
        copying: the blocks that the running copy has; None for all.
        preserved: the blocks whose before-image the journal has.
    """

    name: str
    block_size: int
    path: str
    fd: int
    size_bytes: int
    copied_block: int = 0
    copying: BitMap64 | None = None
    preserved: BitMap64 = field(default_factory=BitMap64)

    @property
    def block_count(self) -> int:
        return -(-self.size_bytes // self.block_size)

    @property
    def mtime_ns(self) -> int:
        """Of the backing; 0 for a block device, which has none."""
        status = os.fstat(self.fd)
        return status.st_mtime_ns if stat.S_ISREG(status.st_mode) else 0

    def begin_copy(self, blocks: BitMap64 | None) -> None:
        """A copy of these blocks begins; None for all blocks."""
        self.copied_block, self.copying, self.preserved = 0, blocks, BitMap64()

    def unpreserved(self, first: int, count: int) -> list[int]:
        """Those of blocks [first, first + count) that must be preserved before they are overwritten.

        The running copy may not have read them yet, and the journal doesn't have them.
        """
        if first + count <= self.copied_block:
            return []
        blocks = range(max(first, self.copied_block), first + count)
        copying, preserved = self.copying, self.preserved
        if copying is None:
            return [block for block in blocks if block not in preserved]
        return [block for block in blocks if block in copying and block not in preserved]

    def read(self, offset: int, size: int, may_wait: bool) -> bytes:
        """The current content, cut at the end of the volume. Raises OSError, or NotCachedError if it may not wait."""
        wanted = max(0, min(size, self.size_bytes - offset))
        if may_wait:
            return os.pread(self.fd, wanted, offset)
        content = bytearray(wanted)
        try:
            if os.preadv(self.fd, [content], offset, os.RWF_NOWAIT) == wanted:
                return bytes(content)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP):
                raise
        raise NotCachedError

    def close(self) -> None:
        os.close(self.fd)


def open_volume(name: str, path: str, block_size: int) -> Volume:
    """Opens a volume's backing, exclusively as far as the kernel can. Raises UsageError: it is empty, in use, …"""
    what = f"{path}: backing volume"
    try:
        fd, size_bytes = open_exclusively(path, what)
    except BlockingIOError as error:
        raise UsageError(
            f"{what}: in use by another program: unmount it, detach its loop device (losetup -j {path}) "
            "or stop what holds it (fuser -v); only the splitter may write it"
        ) from error
    except OSError as error:
        raise UsageError(
            f"{what}: {os.strerror(error.errno or 0)}: create it first, for example with "
            f"'truncate -s 10G {path}', or correct `backing`"
        ) from error
    if size_bytes == 0:
        os.close(fd)
        raise UsageError(f"{what}: is empty: give it its size first, with truncate(1)")
    return Volume(name, block_size, path, fd, size_bytes)


class NotCachedError(Exception):
    """The content isn't in memory, or the file system can't say: read it where waiting for the disk is allowed."""
