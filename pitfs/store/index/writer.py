"""Writes the index of a difference journal, or of a sorted run, as its rows come (`store.index.format`)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from pitfs.storage.files import write_all
from pitfs.store.index.format import CHUNK_POSITIONS, CHUNK_ROWS, POSITIONS_VOLUME, SPARSE_INDEX, Chunk
from pitfs.store.index.merge import Rows, by_volume
from pitfs.store.objects.format import HEADER_BYTES


class IndexWriter:
    """Writes an index as its rows come; holds at most one chunk of each kind, and the sparse index.

    Args:
        fd: the file. start: byte from which the chunks are written; what is before it is left to the caller.
    """

    def __init__(self, fd: int, start: int = HEADER_BYTES) -> None:
        self._fd = fd
        self._start = self._offset = start
        self._sparse_index: list[tuple[int, int, int, int, int, int, int]] = []
        self._volume = -1
        self._rows = np.zeros((4, 0), "<u8")
        self._positions = np.zeros((2, 0), "<u8")

    def add_rows(self, rows: Rows) -> None:
        """INDEX_ROWs; over all calls strictly ascending by (volume, block, seq)."""
        for volume, part in by_volume(rows):
            if volume != self._volume:
                self._rows = self._write_chunks(self._rows, CHUNK_ROWS, self._volume, 1)
                self._volume = volume
            new = _columns(part["block"], part["seq"], part["pointer"], part["checksum"])
            self._rows = np.concatenate([self._rows, new], axis=1)
            self._rows = self._write_chunks(self._rows, CHUNK_ROWS, volume, CHUNK_ROWS)

    def add_positions(self, rows: Rows) -> None:
        """POSITIONs; over all calls strictly ascending."""
        positions = np.concatenate([self._positions, _columns(rows["seq"], rows["time_ns"])], axis=1)
        self._positions = self._write_chunks(positions, CHUNK_POSITIONS, POSITIONS_VOLUME, CHUNK_POSITIONS)

    def finish(self) -> tuple[int, int, int]:
        """Writes what is left and the sparse index; (data_bytes, footer_bytes, footer_checksum)."""
        self._write_chunks(self._rows, CHUNK_ROWS, self._volume, 1)
        self._write_chunks(self._positions, CHUNK_POSITIONS, POSITIONS_VOLUME, 1)
        footer = np.array(self._sparse_index, SPARSE_INDEX).tobytes()
        write_all(self._fd, footer, self._offset)
        return self._offset - self._start, len(footer), xxh3_64_intdigest(footer) if footer else 0

    def _write_chunks(self, columns: Chunk, chunk_rows: int, volume: int, least: int) -> Chunk:
        """Writes chunks while there are at least `least` rows; returns what is left."""
        first, seq = (1, 0) if volume == POSITIONS_VOLUME else (0, 1)  # rows of a chunk
        start, count = 0, columns.shape[1]
        while count - start >= least:
            chunk = np.ascontiguousarray(columns[:, start : start + chunk_rows])
            data = chunk.data.cast("B")
            write_all(self._fd, data, self._offset)
            begins = int(chunk[first, 0]), int(chunk[seq, 0])
            self._sparse_index.append(
                (*begins, xxh3_64_intdigest(data), self._offset, chunk.shape[1], volume, 0)
            )
            self._offset += len(data)
            start += chunk.shape[1]
        return columns[:, start:]


def _columns(*columns: npt.NDArray[np.generic]) -> Chunk:
    """int64 and uint64 columns as rows of uint64: a chunk's bytes."""
    return np.stack([np.ascontiguousarray(column).view("<u8") for column in columns])
