"""How much memory compressed bitmaps (Roaring) take."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from pyroaring import BitMap64

CONTAINER_BYTES: Final = 64  # of memory for each stretch of 65,536 numbers that isn't empty, beside its content


def bitmap_bytes(bitmaps: Iterable[BitMap64]) -> int:
    """The memory of all of them: a stretch of 65,536 numbers takes 2 bytes for each number in it or 4 for each run,
    and 8 KiB at most."""
    size = 0
    for bitmap in bitmaps:
        statistics = bitmap.get_statistics()
        size += statistics["n_bytes_array_containers"] + statistics["n_bytes_run_containers"]
        size += statistics["n_bytes_bitset_containers"] + CONTAINER_BYTES * statistics["n_containers"]
    return size
