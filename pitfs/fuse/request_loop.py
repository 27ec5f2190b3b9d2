"""pyfuse3's main loop in a process that isn't alone: several may read the requests of one mount.

pyfuse3 waits with trio until its descriptor is readable, then reads: a read that blocks, outside of trio, with
Python's lock held. When another process was faster it stays in there until the next request comes. While no
handler of ours waits for anything that is as good a place to wait as any, and the cheapest: so the wait with
trio is left out (`Loop`). While one does wait for a thread (`waiting`) it would be wrong: neither the thread
nor trio could go on, and where its caller is the only one no request would ever come. Then

* requests are waited for with trio, so that a result is taken as soon as it is there, and
* an interval timer runs. Should the read block all the same, its signal ends that with EINTR, on which pyfuse3
  goes round its loop: through trio, where the lock is free for the threads and results are handed over. A
  signal that comes just before the read begins is lost; the next one isn't, a tick later. So what a thread has
  is with its caller two ticks later at most, whatever the other processes do.

What tells the process to end (SIGTERM) has that race, too: who sends it sends it again until the process ends.
"""

from __future__ import annotations

import inspect
import signal
from typing import Final

import pyfuse3
import trio

TICK_S: Final = 0.001
MAX_TASKS: Final = 32  # handlers under way in one process; further requests are left to the others


class Waiting:
    """Counts the handlers of this process that wait for something else than the next request.

    A context manager around each such wait (`pitfs.fuse.handlers.in_thread` has it): a handler that waited outside
    of it would wait until the next request comes.
    """

    def __init__(self) -> None:
        self.count = 0
        self._tick_s = 0.0

    def tick(self) -> None:
        """From now on the timer runs while somebody waits. For the main thread, the one that runs the loop."""
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


waiting = Waiting()  # of this process: pyfuse3 has one mount in each


class DeferredOperations(pyfuse3.Operations):
    """What pyfuse3 is given when it mounts: an empty seat, taken in each process by the handlers made there."""

    supports_dot_lookup = False

    def __init__(self) -> None:
        super().__init__()
        self._scope = trio.CancelScope()

    def init(self) -> None:
        self._scope.cancel()

    def answer_init(self) -> None:
        """Answers the kernel's first request, which comes with the mount, and no other."""

        async def answer() -> None:
            with self._scope:  # no handler is under way when it is cancelled: `init` is one that doesn't wait
                await pyfuse3.main()

        trio.run(answer)

    def take(self, operations: pyfuse3.Operations) -> None:
        """From now on `operations` answers; its flags (`enable_…`) have no effect any more."""
        for name, function in inspect.getmembers(pyfuse3.Operations, inspect.isfunction):
            if not name.startswith("_"):
                setattr(self, name, getattr(operations, name, function))


class RequestLoop:
    """Serves requests until the mount is gone or SIGTERM comes; then what is under way is finished."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._is_ending = False
        self._has_reader = False

    def run(self) -> None:
        waiting.tick()
        # Called by name in pyfuse3's loop. Were it not: slower, and not wrong.
        pyfuse3._wait_fuse_readable = self._next_request  # type: ignore[attr-defined]
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

    async def _next_request(self) -> bool:
        """What one of pyfuse3's tasks does before it reads a request; False: it ends.

        pyfuse3 starts a task whenever one has read a request; those that find another waiting aren't needed.
        """
        if self._is_ending:
            return False
        if not waiting.count:
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
