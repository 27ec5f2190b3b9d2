"""The C library's heap: bounds and trimming, for processes that live long."""

from __future__ import annotations

import ctypes
from typing import Final

M_TRIM_THRESHOLD: Final = -1
M_MMAP_THRESHOLD: Final = -3
M_ARENA_MAX: Final = -8
HEAP_BLOCK_BYTES: Final = 2 << 20  # larger buffers are mappings of their own
HEAP_KEPT_BYTES: Final = 16 << 20  # free memory at the heap's end that is kept


def bound_heap() -> None:
    """Takes buffers of a frame's size from one heap, where they are used again without page faults.

    Call it before threads start. A mapping for each buffer (glibc's first threshold) cost a quarter of the CPU of
    `receive` under the patent's load. Without limits the threshold grows to 32 MiB and each thread has a heap:
    `receive` grew by 15 MiB an interval. Free memory between used memory stays; `trim_heap` gives that back. Another
    libc ignores all this.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, HEAP_BLOCK_BYTES)
        mallopt(M_TRIM_THRESHOLD, HEAP_KEPT_BYTES)
        mallopt(M_ARENA_MAX, 1)
