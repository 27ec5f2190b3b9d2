"""A protected volume: its backing, what is in memory of it, and how far the running copy is."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field

from pyroaring import BitMap64

from pitfs.model.record import CopyProgress
from pitfs.splitter.backing import Backing


@dataclass(slots=True)
class Volume:
    """A protected volume.

    Attributes:
        copied_block: blocks before it needn't be preserved for the running copy.
        copying: the blocks that it copies at all; None: every one.
        preserved: those whose before-image the journal has.
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
        """A copy of these blocks begins; None: of all."""
        self.copied_block, self.copying, self.preserved = 0, blocks, BitMap64()

    def unpreserved(self, first: int, count: int) -> list[int]:
        """Of blocks [first, first + count) those that the running copy may not have read yet, nor the journal has."""
        if first + count <= self.copied_block:
            return []
        copying, preserved = self.copying, self.preserved
        todo = range(max(first, self.copied_block), first + count)
        if copying is None:
            return [block for block in todo if block not in preserved]
        return [block for block in todo if block in copying and block not in preserved]

    def read(self, offset: int, size: int, may_wait: bool) -> bytes:
        """The current content, short at the end of the volume. Raises OSError, or NotCachedError."""
        if may_wait:
            return os.pread(self.backing.fd, size, offset)
        wanted = max(0, min(size, self.backing.size_bytes - offset))
        content = bytearray(wanted)
        try:
            if os.preadv(self.backing.fd, [content], offset, os.RWF_NOWAIT) == wanted:
                return bytes(content)
        except OSError as error:  # or this file system can't tell
            if error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP):
                raise
        raise NotCachedError


class NotCachedError(Exception):
    """Content isn't in memory: who may wait for the disk asks again."""


def is_copied(volumes: list[Volume], progress: CopyProgress) -> bool:
    """Notes how far the running copy is on the replica: before that nothing needs preserving. True: it is complete."""
    for index, volume in enumerate(volumes):
        if index < progress.volume:
            volume.copied_block = volume.block_count
        elif index == progress.volume:
            volume.copied_block = progress.block
        volume.preserved.remove_range(0, volume.copied_block)
    if progress.volume < len(volumes):
        return False
    for volume in volumes:
        volume.copying = None
    return True
