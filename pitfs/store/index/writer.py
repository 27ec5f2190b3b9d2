"""Writes the index of a difference journal, or of a sorted run, as its rows come (`store.index.format`)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from pitfs.storage.files import write_all
from pitfs.store.index.format import CHUNK_POSITIONS, CHUNK_ROWS, POSITIONS_VOLUME, SPARSE_INDEX
from pitfs.store.index.merge import Rows, by_volume
from pitfs.store.objects.format import HEADER_BYTES


class IndexWriter:
    """Writes a journal index as its rows come; holds at most one chunk of each kind and the sparse index.

    Args:
        fd: the file; start: byte from which the chunks are written, what is before it is left to the caller.
    """

    def __init__(self, fd: int, start: int = HEADER_BYTES) -> None:
        self._fd = fd
        self._start = self._offset = start
        self._sparse_index: list[tuple[int, int, int, int, int, int, int]] = []
        self._volume = -1
        self._rows = np.zeros((4, 0), "<u8")
        self._positions = np.zeros((2, 0), "<i8")

    def add_rows(self, rows: Rows) -> None:
        """INDEX_ROWs; over all calls strictly ascending by (volume, block, seq)."""
        for volume, part in by_volume(rows):
            if volume != self._volume:
                self._write_rows(0)
                self._volume = volume
            blocks, seqs = (np.ascontiguousarray(part[name]).view("<u8") for name in ("block", "seq"))
            new = np.stack([blocks, seqs, part["pointer"], part["checksum"]])
            self._rows = np.concatenate([self._rows, new], axis=1)
            self._write_rows(CHUNK_ROWS)

    def add_positions(self, positions: Rows) -> None:
        """POSITIONs; over all calls strictly ascending."""
        new = np.stack([positions["seq"].astype("<i8"), positions["time_ns"]])
        self._positions = np.concatenate([self._positions, new], axis=1)
        self._write_positions(CHUNK_POSITIONS)

    def finish(self) -> tuple[int, int, int]:
        """Writes what is left and the sparse index; (data_bytes, footer_bytes, footer_checksum)."""
        self._write_rows(0)
        self._write_positions(0)
        footer = np.array(self._sparse_index, SPARSE_INDEX).tobytes()
        write_all(self._fd, footer, self._offset)
        return self._offset - self._start, len(footer), xxh3_64_intdigest(footer) if footer else 0

    def _write_rows(self, least: int) -> None:
        """Writes whole chunks while there are at least `least` rows; 0: all of them."""
        start, count = 0, self._rows.shape[1]
        while count - start >= max(least, 1):
            chunk = np.ascontiguousarray(self._rows[:, start : start + CHUNK_ROWS])
            self._write_chunk(chunk, int(chunk[0, 0]), int(chunk[1, 0]), chunk.shape[1], self._volume)
            start += chunk.shape[1]
        self._rows = self._rows[:, start:]

    def _write_positions(self, least: int) -> None:
        start, count = 0, self._positions.shape[1]
        while count - start >= max(least, 1):
            chunk = np.ascontiguousarray(self._positions[:, start : start + CHUNK_POSITIONS])
            self._write_chunk(chunk, int(chunk[1, 0]), int(chunk[0, 0]), chunk.shape[1], POSITIONS_VOLUME)
            start += chunk.shape[1]
        self._positions = self._positions[:, start:]

    def _write_chunk(
        self, chunk: npt.NDArray[np.generic], first: int, seq: int, rows: int, volume: int
    ) -> None:
        data = chunk.data.cast("B")
        write_all(self._fd, data, self._offset)
        self._sparse_index.append((first, seq, xxh3_64_intdigest(data), self._offset, rows, volume, 0))
        self._offset += len(data)
