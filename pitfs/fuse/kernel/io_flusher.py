"""A process that serves writes mustn't wait for memory that only its own writing can free."""

from __future__ import annotations

import ctypes
import logging
import os
from typing import Final

PR_SET_IO_FLUSHER: Final = 57

log = logging.getLogger(__name__)


def set_io_flusher() -> None:
    """Lets this process, and threads that it starts later, allocate memory without waiting for writeback."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) != 0:
        log.debug("PR_SET_IO_FLUSHER: %s: going on without", os.strerror(ctypes.get_errno()))
