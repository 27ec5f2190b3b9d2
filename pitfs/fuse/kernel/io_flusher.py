"""A process that serves writes mustn't wait for memory that only its own writing can free."""

from __future__ import annotations

import ctypes
import os
from typing import Final

PR_SET_IO_FLUSHER: Final = 57


def set_io_flusher() -> str:
    """Lets this process, and threads that it starts later, allocate memory without waiting for writeback.

    Returns a line for the log where the kernel refuses that, as in a container; else an empty one.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) == 0:
        return ""
    reason = os.strerror(ctypes.get_errno())
    return f"PR_SET_IO_FLUSHER: {reason}: going on without: very little memory may slow writes down"
