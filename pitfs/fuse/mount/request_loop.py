"""pyfuse3's main loop in a process that shares its mount: several processes read the requests of one mount.

**The cheap way.** pyfuse3 waits with trio until its descriptor is readable, then reads. If another process
has taken the request by then, the read blocks inside the kernel until the next request comes; it blocks the
whole process, since pyfuse3 keeps Python's lock during the read. While no handler waits for anything, that is
right: only a request can give this process work. So `RequestLoop` leaves trio's wait out and goes straight
into the blocking read.

**The danger.** While a handler waits for a thread (`blocked_handlers.count` is above zero) a blocking read
would be wrong. The thread couldn't go on without Python's lock, nor could trio take its result. If the
handler's caller is the only user of the mount, no further request would ever come.

**The way out.** While a handler waits:

* The loop waits for requests with trio, so that it takes a thread's result as soon as that is there.
* An interval timer runs. If the read blocks all the same, because another process was faster, the timer's
  signal ends it with EINTR. pyfuse3 then goes round its loop, through trio: the lock is free for the threads,
  and results are handed over. A signal that comes just before the read begins has no effect, but the next one
  comes a tick later. So a result reaches its caller two ticks later at most, whatever the other processes do.

SIGTERM has the same race: who sends it repeats it until the process has ended.
"""

from __future__ import annotations

import inspect
import signal
from typing import Final

import pyfuse3
import trio

from pitfs.fuse.handlers import blocked_handlers

MAX_TASKS: Final = 32  # handlers under way in one process; further requests are left to the others


class DeferredOperations(pyfuse3.Operations):
    """What pyfuse3 gets when it mounts, before there are handlers: each worker delegates to its own."""

    supports_dot_lookup = False
    enable_writeback_cache = False  # it would hold writes back, and a full scratch would be met too late

    def __init__(self) -> None:
        super().__init__()
        self._scope = trio.CancelScope()

    def init(self) -> None:
        self._scope.cancel()

    def answer_init(self) -> None:
        """Answers the kernel's first request (INIT), which comes with the mount, and no other."""

        async def answer() -> None:
            with self._scope:  # no handler is under way when it is cancelled: `init` is one that doesn't wait
                await pyfuse3.main()

        trio.run(answer)

    def delegate_to(self, operations: pyfuse3.Operations) -> None:
        """Lets `operations` answer from now on. Its flags (`enable_…`) have no effect after INIT."""
        for name, function in inspect.getmembers(pyfuse3.Operations, inspect.isfunction):
            if not name.startswith("_"):
                setattr(self, name, getattr(operations, name, function))


class RequestLoop:
    """Serves requests until the mount is gone or SIGTERM comes, then finishes those that are under way."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._is_ending = False
        self._has_reader = False

    def run(self) -> None:
        blocked_handlers.enable_timer()
        # pyfuse3's loop looks this function up by name. If it didn't, the loop would be slower, and not wrong.
        pyfuse3._wait_fuse_readable = self._wait_for_request  # type: ignore[attr-defined]
        trio.run(self._main)

    async def _main(self) -> None:
        token = trio.lowlevel.current_trio_token()

        def end(*_: object) -> None:
            self._is_ending = True
            token.run_sync_soon(pyfuse3.terminate, idempotent=True)

        signal.signal(signal.SIGTERM, end)
        try:
            await pyfuse3.main(max_tasks=MAX_TASKS)
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # there is no loop to end any more

    async def _wait_for_request(self) -> bool:
        """Called by each of pyfuse3's tasks before it reads a request; the task ends where this is False.

        pyfuse3 starts another task whenever one has read a request. One that finds another waiting may end.
        """
        if self._is_ending:
            return False
        if not blocked_handlers.count:
            return True  # nothing but a request can come
        if self._has_reader:
            return False
        self._has_reader = True
        try:
            await trio.lowlevel.wait_readable(self._descriptor)
        except trio.ClosedResourceError:  # terminate() was called
            return False
        finally:
            self._has_reader = False
        return True
