"""A protected volume: its backing, what is in memory of it, and how far the running copy is."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field

from pyroaring import BitMap64

from pitfs.model.record import CopyProgress
from pitfs.production.backing import Backing


@dataclass(slots=True)
class Volume:
    """A protected volume. `copied_block`: blocks before it needn't be preserved for the running copy."""

    name: str
    backing: Backing
    block_size: int
    copied_block: int = 0
    preserved: BitMap64 = field(default_factory=BitMap64)

    @property
    def size_bytes(self) -> int:
        return self.backing.size_bytes

    @property
    def block_count(self) -> int:
        return -(-self.backing.size_bytes // self.block_size)

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
    return progress.volume >= len(volumes)
