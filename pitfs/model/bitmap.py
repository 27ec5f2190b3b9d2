"""How much memory compressed bitmaps (Roaring) take."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from pyroaring import BitMap64

CONTAINER_BYTES: Final = 64  # of memory for each 65536 numbers of which one is there, beside what is in them


def bitmap_bytes(bitmaps: Iterable[BitMap64]) -> int:
    """Of all of them: 2 bytes for each number that is there, or 4 for each run, and 8 KiB at most, for each 65536."""
    size = 0
    for bitmap in bitmaps:
        facts = bitmap.get_statistics()
        size += facts["n_bytes_array_containers"] + facts["n_bytes_run_containers"]
        size += facts["n_bytes_bitset_containers"] + CONTAINER_BYTES * facts["n_containers"]
    return size
