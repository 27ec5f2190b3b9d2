"""The index of a difference journal, and of a sorted run, on disk, and its writer.

It is chunks of rows, and a sparse index of the chunks.

The data area of journal-<s>-<l>.index is chunks one behind the other, its footer is their sparse index. A chunk of
entries has the rows of one volume, sorted by (block, seq), at most 2048, column by column: block int64, seq
int64, pointer uint64, checksum uint64. A chunk of positions has at most 4096: seq int64, time_ns int64. So a
chunk has at most 64 KiB. The sparse index has a row of 40 bytes for each chunk, in the order of writing:

    offset size
     0      8   first      int64   first block, or first time_ns
     8      8   first_seq  int64
    16      8   checksum   uint64  xxh3_64 of the chunk
    24      8   offset     uint64  byte in the file where the chunk begins
    32      4   rows       uint32
    36      2   volume     uint16  0xffff: a chunk of positions
    38      2   reserved   uint16

The catalog has the checksum of the sparse index, so it vouches for every row. Pointers lead to the contents of the
interval's end snapshot, which may be in the object of an earlier one, or to the journal's own; 0 is zeros.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from pitfs.storage.files import write_all
from pitfs.store.index.merge import Rows, by_volume
from pitfs.store.objects.format import HEADER_BYTES

CHUNK_ROWS: Final = 2048
CHUNK_POSITIONS: Final = 4096
CHUNK_BYTES: Final = CHUNK_ROWS * 32
POSITIONS_VOLUME: Final = 0xFFFF
SPARSE_INDEX: Final = np.dtype(
    [
        ("first", "<i8"),
        ("first_seq", "<i8"),
        ("checksum", "<u8"),
        ("offset", "<u8"),
        ("rows", "<u4"),
        ("volume", "<u2"),
        ("reserved", "<u2"),
    ]
)
assert SPARSE_INDEX.itemsize == 40 and CHUNK_POSITIONS * 16 == CHUNK_BYTES

Chunk = npt.NDArray[np.uint64]  # shape (4, rows), or (2, rows) for positions

# A row as writers take it and readers give it; on disk its columns are in a chunk of their volume.
INDEX_ROW: Final = np.dtype(
    [("volume", "<u2"), ("block", "<i8"), ("seq", "<i8"), ("pointer", "<u8"), ("checksum", "<u8")]
)


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
