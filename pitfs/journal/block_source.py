"""Contents of an interval's blocks, read from the journal's segments."""

from __future__ import annotations

import os
from typing import Final

import numpy as np

from pitfs.errors import CorruptionError
from pitfs.journal.reader import Interval
from pitfs.model.difference import Rows
from pitfs.storage.segment import segment_error, segment_path


class BlockSource:
    """Reads the contents of an interval's rows. Keeps at most OPEN_SEGMENTS files open.

    Args:
        interval: whose rows are read.
        block_sizes: of the volumes, bytes.
    """

    OPEN_SEGMENTS: Final = 64

    def __init__(self, directory: str, interval: Interval, block_sizes: list[int]) -> None:
        self._directory = directory
        self._interval = interval
        self._block_sizes = np.array(block_sizes, dtype=np.int64)
        self._fds: dict[int, int] = {}

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def _fd(self, number: int) -> int:
        fd = self._fds.get(number)
        if fd is None:
            if len(self._fds) >= self.OPEN_SEGMENTS:
                os.close(self._fds.pop(next(iter(self._fds))))
            path = segment_path(self._directory, number)
            fd = self._fds[number] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return fd

    def read(self, rows: Rows) -> bytearray:
        """The rows' blocks in their order, not verified. Blocks that are adjacent in a segment take one read.

        Raises:
            CorruptionError: a segment is missing, too short, or unreadable there.
            PitfsError: this process lacks memory, descriptors or rights to read it.
        """
        sizes = self._block_sizes[self._interval.columns.volume[rows]]
        segment, offset = self._interval.segment[rows], self._interval.offset[rows]
        adjacent = (segment[1:] == segment[:-1]) & (offset[1:] == offset[:-1] + sizes[:-1])
        begins = np.concatenate(([0], np.flatnonzero(~adjacent) + 1, [len(rows)]))
        ends = np.concatenate(([0], np.cumsum(sizes)))
        buffer = bytearray(int(ends[-1]))
        view = memoryview(buffer)
        places = ends[begins].tolist()
        firsts = begins[:-1]
        for number, at, start, end in zip(
            segment[firsts].tolist(), offset[firsts].tolist(), places[:-1], places[1:], strict=True
        ):
            path = segment_path(self._directory, number)
            try:
                done = os.preadv(self._fd(number), [view[start:end]], at)
            except OSError as error:
                raise segment_error(error, path, at) from error
            if done != end - start:
                raise CorruptionError(path, at, "the file ends inside a record")
        return buffer
