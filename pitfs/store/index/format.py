"""The index of a difference journal, and of a sorted run, on disk: chunks of rows, and a sparse index of the chunks.

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
interval's end snapshot or to the journal's own; 0 is zeros.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

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
