"""What both FUSE adapters need: every handler guarded, every wait shielded (pyfuse3's two traps)."""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any, ParamSpec, TypeVar

import pyfuse3
import trio

from pitfs.errors import PitfsError
from pitfs.fuse.request_loop import waiting

P = ParamSpec("P")
T = TypeVar("T")
log = logging.getLogger(__name__)


def guard(
    expected: Mapping[type[Exception], int] | None = None,
) -> Callable[[Callable[P, Coroutine[Any, Any, T]]], Callable[P, Coroutine[Any, Any, T]]]:
    """Decorator for each handler: only `FUSEError` leaves it. Anything else would end pyfuse3's main loop and
    leave all callers hanging.

    Args:
        expected: errors that are an answer, and their errno. Others are EIO and a line in the log, with a
            traceback if they are a mistake of ours.
    """
    answers = dict(expected or {})

    def decorate(function: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
        @functools.wraps(function)
        async def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                return await function(*args, **kwargs)
            except pyfuse3.FUSEError:
                raise
            except Exception as error:
                number = answers.get(type(error))
                if number is not None:
                    raise pyfuse3.FUSEError(number) from None
                raise failed(function.__name__, error) from error

        return guarded

    return decorate


def failed(name: str, error: Exception) -> pyfuse3.FUSEError:
    """EIO for an error of the handler `name`, after a line in the log, with a traceback if it's our mistake."""
    if isinstance(error, PitfsError | OSError):
        log.error("%s: %s", name, error)
    else:
        log.error("%s: a bug in pitfs", name, exc_info=error)
    return pyfuse3.FUSEError(errno.EIO)


async def in_thread(function: Callable[..., T], *args: object, limiter: trio.CapacityLimiter) -> T:
    """`function(*args)` in a thread, never cancelled: a handler that is cancelled gives no reply."""
    with waiting, trio.CancelScope(shield=True):
        result = await trio.to_thread.run_sync(function, *args, limiter=limiter)
    return result  # noqa: RET504 — returned inside, mypy thinks that the scope may swallow it


@contextlib.asynccontextmanager
async def holding(lock: trio.Lock) -> AsyncIterator[None]:
    """Holds the lock; not to be cancelled, as all handlers."""
    with waiting:
        async with lock:
            yield
