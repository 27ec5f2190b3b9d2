"""A protected volume: its backing, and how far the running copy of it is."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field

from pyroaring import BitMap64

from pitfs.splitter.backing import Backing


@dataclass(slots=True)
class Volume:
    """A protected volume.

    Attributes:
        copied_block: blocks before this one need not be preserved for the running copy.
        copying: the blocks that the running copy has; None for all.
        preserved: the blocks whose before-image the journal has.
    """

    name: str
    backing: Backing
    block_size: int
    copied_block: int = 0
    copying: BitMap64 | None = None
    preserved: BitMap64 = field(default_factory=BitMap64)

    @property
    def size_bytes(self) -> int:
        return self.backing.size_bytes

    @property
    def block_count(self) -> int:
        return -(-self.backing.size_bytes // self.block_size)

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
        if may_wait:
            return os.pread(self.backing.fd, size, offset)
        wanted = max(0, min(size, self.backing.size_bytes - offset))
        content = bytearray(wanted)
        try:
            if os.preadv(self.backing.fd, [content], offset, os.RWF_NOWAIT) == wanted:
                return bytes(content)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP):
                raise
        raise NotCachedError


class NotCachedError(Exception):
    """The content isn't in memory, or the file system can't say: read it where waiting for the disk is allowed."""
