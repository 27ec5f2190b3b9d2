"""The C library's heap, bounded: for the processes that live long."""

from __future__ import annotations

import ctypes
from typing import Final

M_TRIM_THRESHOLD: Final = -1
M_MMAP_THRESHOLD: Final = -3
M_ARENA_MAX: Final = -8
HEAP_BLOCK_BYTES: Final = 2 << 20  # from this size on a buffer is a mapping of its own
HEAP_KEPT_BYTES: Final = 16 << 20  # free memory at the heap's end that isn't given back at once


def bound_heap() -> None:
    """Has buffers of a frame's size come from one heap, where they are used again without a page fault each.

    A mapping of its own for each (glibc's threshold to begin with) cost a quarter of the CPU of `receive`
    under the patent's load. Without limits, on the other hand, the threshold goes up to 32 MiB and each
    thread has a heap: `receive` grew by 15 MiB an interval. What lies unused between other memory still
    stays; `trim_heap` gives that back. Before threads start; another libc ignores it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in (
            (M_MMAP_THRESHOLD, HEAP_BLOCK_BYTES), (M_TRIM_THRESHOLD, HEAP_KEPT_BYTES), (M_ARENA_MAX, 1)
        ):  # fmt: skip
            mallopt(parameter, value)
