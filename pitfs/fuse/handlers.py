"""How a handler may wait: counted, so that the request loop knows of it, and shielded from cancellation."""

from __future__ import annotations

import contextlib
import errno
import logging
import signal
from collections.abc import AsyncIterator, Callable
from typing import Final, TypeVar

import pyfuse3
import trio

from pitfs.errors import PitfsError

TICK_S: Final = 0.001

T = TypeVar("T")
log = logging.getLogger(__name__)


class BlockedHandlers:
    """Counts the handlers of this process that wait for a thread or a lock.

    A context manager around each such wait. While it is entered the timer runs that takes the request loop
    out of a blocking read (`pitfs.fuse.mount.request_loop`); a handler that waits without it waits until the
    next request comes.
    """

    def __init__(self) -> None:
        self.count = 0
        self._tick_s = 0.0

    def enable_timer(self) -> None:
        """Lets the timer run from now on whenever a handler waits. To be called by the main thread."""
        signal.signal(signal.SIGALRM, lambda *_: None)  # a handler without SA_RESTART, as all of Python's
        self._tick_s = TICK_S

    def __enter__(self) -> None:
        self.count += 1
        if self.count == 1 and self._tick_s:
            signal.setitimer(signal.ITIMER_REAL, self._tick_s, self._tick_s)

    def __exit__(self, *_: object) -> None:
        self.count -= 1
        if not self.count and self._tick_s:
            signal.setitimer(signal.ITIMER_REAL, 0)


blocked_handlers = BlockedHandlers()  # of this process: pyfuse3 has one mount in each


def failed(name: str, error: Exception) -> pyfuse3.FUSEError:
    """EIO for an error of the handler `name`, after a line in the log (with a traceback for our mistakes)."""
    if isinstance(error, PitfsError | OSError):
        log.error("%s: %s", name, error)
    else:
        log.error("%s: a bug in pitfs", name, exc_info=error)
    return pyfuse3.FUSEError(errno.EIO)


async def in_thread(
    function: Callable[..., T], *args: object, limiter: trio.CapacityLimiter | None = None
) -> T:
    """`function(*args)` in a thread, never cancelled: without the handler's reply its caller would hang."""
    with blocked_handlers, trio.CancelScope(shield=True):
        result = await trio.to_thread.run_sync(function, *args, limiter=limiter)
    return result  # noqa: RET504 — returned inside, mypy thinks that the scope may swallow it


@contextlib.asynccontextmanager
async def holding(lock: trio.Lock) -> AsyncIterator[None]:
    """Holds the lock. The caller mustn't be cancelled, as no handler may be."""
    with blocked_handlers:
        async with lock:
            yield
