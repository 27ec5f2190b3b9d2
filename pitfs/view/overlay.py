"""An overlay: a sparse file with the blocks of an image that were written.

Block n stands at n * block_size of the file, so a run of blocks is one preadv. The file has no checksums: it is the
user's own data, as on any disk, while the image below is history and is verified on each read, also where it is copied
up. After a failed sync the kernel may have dropped what was written, so the overlay answers with errors only.

An fsync makes durable, in this order: the file with the blocks, then (if the overlay is kept) a record in its log
with the blocks that came since the last one. So a power cut leaves for each block what was written last or what was
there before it, as on a disk: never zeros, nor half a copied-up block.

Writes and all bookkeeping happen in one thread; reads and `sync` may run in others.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from pyroaring import BitMap64

from pitfs.errors import CapacityError, PitfsError
from pitfs.model.bitmap import bitmap_bytes
from pitfs.storage.files import write_all
from pitfs.storage.overlay_log import OverlayLog
from pitfs.view.view import ReadBuffer

# Of the indexes of all overlays of a mount: 2 bytes for each block where they are strewn (128 GiB in blocks of
# 4 KiB), a bit where they aren't (2 TiB). Beyond it the scratch is full.
MAX_INDEX_BYTES: Final = 64 << 20
UNMEASURED_BLOCKS: Final = 1 << 18  # taken before the indexes are measured again
WRITE_WEIGHT: Final = 32  # blocks that a write counts for, as it may begin a container of the index

Begun = tuple[int, BitMap64]  # what a sync covers: writes so far, and the blocks that aren't in the log


class Write(NamedTuple):
    """A write as it goes to the overlay's file: with whole blocks where they are new to it.

    Attributes:
        first, last: blocks [first, last) that it touches.
        new_count: how many of them are new; room is taken for these.
    """

    offset: int
    data: bytes
    first: int
    last: int
    new_count: int


@dataclass(slots=True)
class Room:
    """The space that all overlays of a mount share.

    Attributes:
        limit_bytes: of blocks written; None: as much as the disk has.
        bitmaps: the indexes.
        edges: for one block: writes happen in one thread.
    """

    limit_bytes: int | None = None
    used_bytes: int = 0
    bitmaps: list[BitMap64] = field(default_factory=list)
    unmeasured: int = 0
    edges: ReadBuffer = field(default_factory=lambda: ReadBuffer(0))

    def take(self, count: int, block_size: int) -> None:
        """Takes room for `count` more blocks. Raises CapacityError where there is none."""
        if self.limit_bytes is not None and self.used_bytes + count * block_size > self.limit_bytes:
            raise CapacityError(f"scratch_size is reached ({self.limit_bytes} bytes)")
        self.unmeasured += count + WRITE_WEIGHT
        if self.unmeasured >= UNMEASURED_BLOCKS:
            if bitmap_bytes(self.bitmaps) > MAX_INDEX_BYTES:
                for bitmap in self.bitmaps:
                    bitmap.run_optimize()
                if bitmap_bytes(self.bitmaps) > MAX_INDEX_BYTES:
                    raise CapacityError(f"the scratch's index takes more than {MAX_INDEX_BYTES >> 20} MiB")
            self.unmeasured = 0
        self.used_bytes += count * block_size


class Overlay:
    """The blocks that were written of one volume at one instant.

    Args:
        fd: the file with the blocks, of the volume's size; becomes the overlay's own.
        name: for messages.
        log: of a kept overlay; becomes its own.
        room: shared with the other overlays.

    Attributes:
        blocks: those that are in it; the same object for ever.
        failed: why a sync failed, else empty.
        writes: how many there were.
        synced_writes: how many of them are durable.
    """

    def __init__(self, fd: int, name: str, block_size: int, room: Room, log: OverlayLog | None = None) -> None:
        self.fd = fd
        self.name = name
        self.block_size = block_size
        self.room = room
        self.blocks = log.blocks if log is not None else BitMap64()
        self.failed: str = ""
        self.writes = self.synced_writes = 0
        self._log = log
        self._fresh = BitMap64()  # blocks that aren't in the log yet
        room.bitmaps.append(self.blocks)
        room.used_bytes += len(self.blocks) * block_size

    @property
    def mtime_ns(self) -> int | None:
        """Of the last write; None before the first."""
        return os.fstat(self.fd).st_mtime_ns if self.blocks else None

    def check(self) -> None:
        """Raises PitfsError after a failed sync: the overlay may have lost what was written."""
        if self.failed:
            raise PitfsError(f"{self.name}: {self.failed}: what was written is lost; mount anew")

    def store(self, write: Write) -> None:
        """Writes the file; may wait for the disk. Raises OSError; then the new blocks stay out of the index."""
        done = os.pwrite(self.fd, write.data, write.offset)
        if done != len(write.data):
            write_all(self.fd, memoryview(write.data)[done:], write.offset + done)

    def stored(self, write: Write) -> None:
        """Enters the write into the index: from now on it is read."""
        self.writes += 1
        if write.new_count:
            if write.last - write.first == 1:
                self.blocks.add(write.first)
            else:
                self.blocks.add_range(write.first, write.last)
            if self._log is not None:
                self._fresh.add_range(write.first, write.last)

    def not_stored(self, write: Write) -> None:
        """Gives back the room that `prepare` took for it."""
        self.room.used_bytes -= write.new_count * self.block_size

    def begin_sync(self) -> Begun:
        """What `sync` makes durable; the caller gives it to `unsynced` if that fails."""
        fresh, self._fresh = self._fresh, BitMap64()
        return self.writes, fresh

    def sync(self, begun: Begun) -> None:
        """Makes it durable; one sync at a time. Without a log it only reports errors of the disk in time.

        Raises:
            CapacityError: the log has no room; a retry may succeed.
            OSError: the disk refuses; the overlay is lost.
            PitfsError: it was lost before.
        """
        self.check()
        try:
            os.fdatasync(self.fd)
            if begun[1] and self._log is not None:
                self._log.append(begun[1])
        except OSError as error:
            # The kernel has dropped the pages by now, so a second sync would succeed without them.
            self.failed = f"a sync failed: {os.strerror(error.errno or 0)}"
            raise
        self.synced_writes = begun[0]

    def unsynced(self, begun: Begun) -> None:
        """The next sync covers these blocks again."""
        self._fresh |= begun[1]

    def close(self) -> None:
        os.close(self.fd)
        if self._log is not None:
            self._log.close()
