"""A writable image: an overlay's blocks over the image of an instant.

    write -> edges of blocks that aren't in the overlay yet, copied up from the image below -> pwrite -> index
    read  -> runs of blocks by who has them -> one preadv per run of the overlay, the image below for the rest
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Final

from pitfs.errors import CorruptionError, PitfsError
from pitfs.model.overlay import runs_within
from pitfs.view.overlay import Overlay, Write
from pitfs.view.view import PointInTimeView, ReadBuffer

Ranges = list[tuple[int, int]]
Read = Callable[[int, int, ReadBuffer], memoryview | None]
Edges = tuple[bytes, bytes]  # the bytes before and behind a write in its first and its last block
_NOWAIT: Final = os.RWF_NOWAIT


class NotCachedError(Exception):
    """Bytes to be copied up aren't in memory: `read_edges` may wait for them."""


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
        block = offset >> self._shift
        if block not in self._blocks and (offset + size - 1) >> self._shift == block:  # random reads: at once
            return self._below_cached(offset, size, buffer)
        return self._read(offset, size, buffer, _NOWAIT)

    def read(self, offset: int, size: int, buffer: ReadBuffer) -> memoryview:
        """As `PointInTimeView.read`; also PitfsError where a sync of the overlay has failed, and OSError."""
        data = self._read(offset, size, buffer, 0)
        assert data is not None
        return data

    def _read(self, offset: int, size: int, buffer: ReadBuffer, flags: int) -> memoryview | None:
        """None if it would wait and flags forbid it."""
        end = min(offset + size, self.size_bytes)
        first, last = offset >> self._shift, ((end - 1) >> self._shift) + 1
        count = 0
        if last - first > 1:
            count = self._blocks.range_cardinality(first, last)
        elif offset < end:  # the common case, for which counting would take several times as long
            count = int(first in self._blocks)
        if not count:
            return (self._below_cached if flags else self._below.read)(offset, size, buffer)
        if flags and not self._can_nowait:
            return None
        if count < last - first:
            return self._mixed(offset, end, buffer, flags)
        target = buffer.memory[: end - offset]
        return target if self._fill(target, offset, flags) else None

    def _fill(self, target: memoryview, offset: int, flags: int) -> bool:
        """Fills it from the overlay; False if it would wait and flags forbid it."""
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
        while done < len(target) and not flags:
            more = os.preadv(self.overlay.fd, (target[done:],), offset + done)
            if not more:
                raise CorruptionError(self.overlay.name, offset + done, "the overlay's file was cut short")
            done += more
        return done == len(target)

    def _mixed(self, offset: int, end: int, buffer: ReadBuffer, flags: int) -> memoryview | None:
        """A range of which the overlay has some blocks: all of it from below, then these over it."""
        shift = self._shift
        runs = runs_within(self._blocks, offset >> shift, ((end - 1) >> shift) + 1)
        ranges = [(max(first << shift, offset), min(last << shift, end)) for first, last in runs]
        read_below = self._below_cached if flags else self._below.read
        try:
            data = read_below(offset, end - offset, buffer)
        except PitfsError:
            return None if flags else self._around_damage(offset, end, ranges, buffer)
        if data is None:
            return None
        if data.readonly:  # zeros that all views share
            buffer.memory[: len(data)] = data
            data = buffer.memory[: len(data)]
        for start, stop in ranges:
            if not self._fill(data[start - offset : stop - offset], start, flags):
                return None
        return data

    def _around_damage(self, offset: int, end: int, ranges: Ranges, buffer: ReadBuffer) -> memoryview:
        """`_mixed` where a block below is damaged: it reads only those blocks below that weren't written since."""
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
        """Writes `data` at byte `offset`, all of it within the volume. Raises as `prepare` and `store` do."""
        write = self.prepare(offset, data)
        try:
            self.overlay.store(write)
        except BaseException:
            self.overlay.not_stored(write)
            raise
        self.overlay.stored(write)

    def prepare(self, offset: int, data: bytes, edges: Edges | None = None) -> Write:
        """The write for `store`. Until it is `stored` or `not_stored`, no other write of the overlay may begin.

        Args:
            edges: as `read_edges` returned them for the same range at any time before.

        Raises:
            NotCachedError: bytes of the image below must be copied up and aren't in memory.
            CapacityError: the scratch is full.
            CorruptionError: bytes to be copied up are damaged.
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
                if edges is None:
                    edges = self._copy_up(offset, end, self._below_cached, overlay.room.edges)
                before, after = edges[0] if head else b"", edges[1] if tail else b""
                offset -= len(before)
                data = b"".join((before, data, after))
            overlay.room.take(new_count, self.block_size)
        return Write(offset, data, first, last, new_count)

    def has_edges(self, offset: int, size: int) -> bool:
        """Whether a write of that range must copy up anything."""
        return self._edges(offset, offset + size) != (0, 0)

    def read_edges(self, offset: int, size: int, buffer: ReadBuffer) -> Edges:
        """The bytes to be copied up for a write of that range; waits for the disk. Raises as `read` does."""
        return self._copy_up(offset, offset + size, self._below.read, buffer)

    def _copy_up(self, offset: int, end: int, read: Read, buffer: ReadBuffer) -> Edges:
        def copy(start: int, size: int) -> bytes:
            data = read(start, size, buffer) if size else b""
            if data is None:
                raise NotCachedError
            return bytes(data)

        head, tail = self._edges(offset, end)
        return copy(offset - head, head), copy(end, tail)

    def _edges(self, offset: int, end: int) -> tuple[int, int]:
        """How many bytes must be copied up before and behind a range: of blocks that it covers in part and that
        aren't in the overlay."""
        shift = self._shift
        first, last = offset >> shift, (end - 1) >> shift
        head = 0 if first in self._blocks else offset - (first << shift)
        tail = 0 if last in self._blocks else min((last + 1) << shift, self.size_bytes) - end
        return head, tail
