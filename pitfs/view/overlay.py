"""A writable image: a sparse file with the blocks that were written, over the image of an instant.

    write -> edges of blocks that aren't in the overlay yet, copied up from the image below -> pwrite -> index
    read  -> runs of blocks by who has them -> one preadv per run of the overlay, the image below for the rest

Block n stands at n * block_size of the file, so a run of blocks is one preadv. There are no checksums over what
was written: the image below is history and is verified on each read, also where it is copied up; what lies over
it is the user's own, as on any disk. But what the kernel says it couldn't write is never read: after a failed
sync the overlay answers with errors only.

An fsync makes durable, in this order: the file with the blocks, then (if the overlay is kept) a record in its log
that names those which came since the last. So a power cut leaves for each block what was written last or what was
there before it, as on a disk: never zeros, nor half a copied-up block.

Writes and all bookkeeping happen in one thread; reads and `sync` may run in others.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from pyroaring import BitMap64

from pitfs.errors import CapacityError, CorruptionError, PitfsError
from pitfs.model.bitmap import bitmap_bytes
from pitfs.model.overlay import runs_within
from pitfs.storage.files import write_all
from pitfs.storage.overlay_log import OverlayLog
from pitfs.view.view import PointInTimeView, ReadBuffer

# Of the indexes of all overlays of a mount: 2 bytes for each block where they are strewn (128 GiB in blocks of
# 4 KiB), a bit where they aren't (2 TiB). Beyond it the scratch is full.
MAX_INDEX_BYTES: Final = 64 << 20
UNMEASURED_BLOCKS: Final = 1 << 18  # between two looks at the size of the indexes
WRITE_WEIGHT: Final = 32  # and a write counts for so many, as it may begin a container
_NOWAIT: Final = os.RWF_NOWAIT

Begun = tuple[int, BitMap64]  # writes so far, and the blocks that aren't in the log
Edges = tuple[bytes, bytes]  # what is before and behind a write in its first and its last block


class NotCachedError(Exception):
    """What must be copied up isn't in memory: `read_edges` may wait for it."""


class Write(NamedTuple):
    """A write as it goes to the overlay's file: whole where blocks are new to it.

    Attributes:
        first, last: blocks [first, last) that it touches.
        new_count: how many of them weren't there; room is taken for these.
    """

    offset: int
    data: bytes
    first: int
    last: int
    new_count: int


@dataclass(slots=True)
class Room:
    """What all overlays of a mount may take together.

    Attributes:
        limit_bytes: of blocks written; None: what the disk has.
        bitmaps: the indexes.
    """

    limit_bytes: int | None = None
    used_bytes: int = 0
    bitmaps: list[BitMap64] = field(default_factory=list)
    unmeasured: int = 0
    edges: ReadBuffer = field(
        default_factory=lambda: ReadBuffer(0)
    )  # for one block: writes happen in one thread

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
        log: of a kept one; becomes the overlay's own.
        room: what it shares with the other overlays.

    Attributes:
        blocks: those that are in it; the same object for ever.
        writes: how many there were.
        synced_writes: how many of them are durable.
    """

    def __init__(
        self, fd: int, name: str, size_bytes: int, block_size: int, room: Room, log: OverlayLog | None = None
    ) -> None:
        self.fd = fd
        self.name = name
        self.size_bytes = size_bytes
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
        """Raises PitfsError after a sync failed: what is in the overlay since may not be what was written."""
        if self.failed:
            raise PitfsError(f"{self.name}: {self.failed}: what was written is lost; mount anew")

    def store(self, write: Write) -> None:
        """Writes the file; may wait for the disk. Raises OSError; then the blocks that are new aren't there."""
        done = os.pwrite(self.fd, write.data, write.offset)
        if done != len(write.data):
            write_all(self.fd, memoryview(write.data)[done:], write.offset + done)

    def stored(self, write: Write) -> None:
        """From now on it is read."""
        self.writes += 1
        if write.new_count:
            if write.last - write.first == 1:
                self.blocks.add(write.first)
            else:
                self.blocks.add_range(write.first, write.last)
            if self._log is not None:
                self._fresh.add_range(write.first, write.last)

    def not_stored(self, write: Write) -> None:
        """Gives back the room that it was to have."""
        self.room.used_bytes -= write.new_count * self.block_size

    def begin_sync(self) -> Begun:
        """What `sync` is to make durable; to be given to `unsynced` if that fails."""
        fresh, self._fresh = self._fresh, BitMap64()
        return self.writes, fresh

    def sync(self, begun: Begun) -> None:
        """Makes it durable; one at a time. Without a log only errors of the disk are learnt of in time.

        Raises:
            CapacityError: the log has no room; the next try may go well.
            OSError: the disk refuses; the overlay is lost.
            PitfsError: it was lost before.
        """
        self.check()
        try:
            os.fdatasync(self.fd)
            if begun[1] and self._log is not None:
                self._log.append(begun[1])
        except OSError as error:
            # The kernel has forgotten the pages by now: asked again it would say that all is well.
            self.failed = f"a sync failed: {os.strerror(error.errno or 0)}"
            raise
        self.synced_writes = begun[0]

    def unsynced(self, begun: Begun) -> None:
        """What was begun is still to be made durable."""
        self._fresh |= begun[1]

    def close(self) -> None:
        os.close(self.fd)
        if self._log is not None:
            self._log.close()


class OverlayView:
    """An image with an overlay: reads as a `PointInTimeView`, and writes.

    Args:
        below: the image of the same volume.
    """

    def __init__(self, below: PointInTimeView, overlay: Overlay) -> None:
        self.overlay = overlay
        self.size_bytes = below.size_bytes
        self.block_size = below.block_size
        self._below = below
        self._below_cached = below.try_read_cached
        self._blocks = overlay.blocks
        self._shift = below.block_size.bit_length() - 1
        self._can_nowait = True

    # -------------------------------------------------------------- reading

    def try_read_cached(self, offset: int, size: int, buffer: ReadBuffer) -> memoryview | None:
        """As `PointInTimeView.try_read_cached`; also PitfsError where a sync of the overlay has failed."""
        shift, end = self._shift, offset + size
        if end > self.size_bytes:
            end = self.size_bytes
        first, last = offset >> shift, ((end - 1) >> shift) + 1
        if last - first == 1:
            if first not in self._blocks:
                return self._below_cached(offset, size, buffer)
        elif last <= first or not (count := self._blocks.range_cardinality(first, last)):
            return self._below_cached(offset, size, buffer)
        elif count < last - first:
            return self._mixed(offset, end, buffer, _NOWAIT) if self._can_nowait else None
        if not self._can_nowait:
            return None
        target = buffer.memory[: end - offset]
        return target if self._fill(target, offset, _NOWAIT) else None

    def read(self, offset: int, size: int, buffer: ReadBuffer) -> memoryview:
        """As `PointInTimeView.read`; also PitfsError where a sync of the overlay has failed, and OSError."""
        end = min(offset + size, self.size_bytes)
        first, last = offset >> self._shift, ((end - 1) >> self._shift) + 1
        count = self._blocks.range_cardinality(first, last) if offset < end else 0
        if not count:
            return self._below.read(offset, size, buffer)
        if count < last - first:
            data = self._mixed(offset, end, buffer, 0)
            assert data is not None
            return data
        target = buffer.memory[: end - offset]
        self._fill(target, offset, 0)
        return target

    def _fill(self, target: memoryview, offset: int, flags: int) -> bool:
        """Fills it from the overlay; False if that would wait and flags say not to."""
        if self.overlay.failed:
            self.overlay.check()
        try:
            done = os.preadv(self.overlay.fd, (target,), offset, flags)
        except OSError as error:
            if not flags or error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP):
                raise
            if error.errno == errno.EOPNOTSUPP:  # this filesystem can't tell: always read in a thread
                self._can_nowait = False
            return False
        while done < len(target):
            if flags:
                return False
            more = os.preadv(self.overlay.fd, (target[done:],), offset + done)
            if not more:
                raise CorruptionError(self.overlay.name, offset + done, "the overlay's file was cut short")
            done += more
        return True

    def _mixed(self, offset: int, end: int, buffer: ReadBuffer, flags: int) -> memoryview | None:
        """A range of which some blocks are in the overlay: all of it from below, then those over it."""
        shift = self._shift
        runs = runs_within(self._blocks, offset >> shift, ((end - 1) >> shift) + 1)
        ranges = [(max(first << shift, offset), min(last << shift, end)) for first, last in runs]
        try:
            if flags:
                data = self._below_cached(offset, end - offset, buffer)
                if data is None:
                    return None
            else:
                data = self._below.read(offset, end - offset, buffer)
        except PitfsError:
            if flags:
                return None
            return self._around_damage(offset, end, ranges, buffer)
        if data.readonly:  # zeros that all share
            buffer.memory[: len(data)] = data
            data = buffer.memory[: len(data)]
        for start, stop in ranges:
            if not self._fill(data[start - offset : stop - offset], start, flags):
                return None
        return data

    def _around_damage(
        self, offset: int, end: int, ranges: Iterable[tuple[int, int]], buffer: ReadBuffer
    ) -> memoryview:
        """The same where the image below has a block that can't be read: that is no harm if it was written since."""
        spare = ReadBuffer(end - offset)
        data, position = buffer.memory[: end - offset], offset
        for start, stop in (*ranges, (end, end)):
            if position < start:
                data[position - offset : start - offset] = self._below.read(position, start - position, spare)
            self._fill(data[start - offset : stop - offset], start, 0)
            position = stop
        return data

    # -------------------------------------------------------------- writing

    def write(self, offset: int, data: bytes) -> None:
        """Writes `data` (bytes) at byte `offset`, all of it within the volume. Raises as `prepare` and `store`."""
        write = self.prepare(offset, data)
        try:
            self.overlay.store(write)
        except BaseException:
            self.overlay.not_stored(write)
            raise
        self.overlay.stored(write)

    def prepare(self, offset: int, data: bytes, edges: Edges | None = None) -> Write:
        """What `store` is to write; until it is `stored`, or `not_stored`, no other write of the overlay may begin.

        Args:
            edges: what `read_edges` said of the same range at any time before.

        Raises:
            NotCachedError: the image below must be read for it and isn't in memory.
            CapacityError: the scratch is full.
            CorruptionError: what must be copied up can't be read.
            PitfsError: a sync has failed.
        """
        overlay, blocks, shift = self.overlay, self._blocks, self._shift
        if overlay.failed:
            overlay.check()
        end = offset + len(data)
        first, last = offset >> shift, ((end - 1) >> shift) + 1
        if last - first == 1:
            new_count = 0 if first in blocks else 1
        else:
            new_count = last - first - blocks.range_cardinality(first, last)
        if new_count:
            head, tail = self._edges(offset, end)
            if head or tail:
                before, after = self._cached_edges(offset, end) if edges is None else edges
                before, after = before if head else b"", after if tail else b""
                offset -= len(before)
                data = b"".join((before, data, after))
            overlay.room.take(new_count, self.block_size)
        return Write(offset, data, first, last, new_count)

    def has_edges(self, offset: int, size: int) -> bool:
        """Whether `read_edges` has anything to read."""
        return self._edges(offset, offset + size) != (0, 0)

    def read_edges(self, offset: int, size: int, buffer: ReadBuffer) -> Edges:
        """What must be copied up for a write of that range; waits for the disk. Raises as a read does."""
        end = offset + size
        head, tail = self._edges(offset, end)
        before = bytes(self._below.read(offset - head, head, buffer)) if head else b""
        return before, bytes(self._below.read(end, tail, buffer)) if tail else b""

    def _cached_edges(self, offset: int, end: int) -> Edges:
        head, tail = self._edges(offset, end)
        parts = []
        for start, size in ((offset - head, head), (end, tail)):
            part = self._below_cached(start, size, self.overlay.room.edges) if size else _NOTHING
            if part is None:
                raise NotCachedError
            parts.append(bytes(part))
        return parts[0], parts[1]

    def _edges(self, offset: int, end: int) -> tuple[int, int]:
        """Bytes to be copied up before and behind a range: of blocks that it has in part and the overlay not at all."""
        shift = self._shift
        first, last_block = offset >> shift, (end - 1) >> shift
        head = offset - (first << shift)
        if head and first in self._blocks:
            head = 0
        tail = min((last_block + 1) << shift, self.size_bytes) - end
        if tail and last_block in self._blocks:
            tail = 0
        return head, tail


_NOTHING: Final = memoryview(b"")
