"""A mount is served by several processes: workers, and a minder that started them.

    minder ── mounts, answers the kernel's first request (INIT), forks the workers, reads no further request
      └─ worker, worker, …   each opens the store for itself and takes requests as it has time

Handlers keep nothing that an answer hangs on, so the kernel may hand any request to any worker. Each has a
descriptor of its own (a clone of the minder's): when a worker dies the kernel ends what it had taken with an
error, so nobody waits for it; the minder holds the mount meanwhile and starts another. The mount ends with
umount, which all workers see, or with SIGTERM or SIGINT at the minder. A minder that is killed takes the
workers along.

The minder stays small: neither the store nor numpy, no threads, no trio loop.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import fcntl
import logging
import os
import select
import signal
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NoReturn

from pitfs.errors import PitfsError

if TYPE_CHECKING:
    from pitfs.fuse.mount import MountRequest
    from pitfs.fuse.replica import Replica
    from pitfs.fuse.request_loop import DeferredOperations

DEVICE: Final = "/dev/fuse"
MAX_WORKERS: Final = 16
DEFAULT_WORKERS: Final = 2  # at most, and not more than there are cores: each has caches of its own
RESEND_S: Final = 0.05  # a signal that came just before a blocking read is lost
END_S: Final = 10.0  # for what is under way; then SIGKILL
SCRATCH_END_S: Final = 600.0  # as well, and for making durable what is kept
RESTART_S: Final = 1.0  # at least between two starts in one place
READY: Final = b"ready"
_MAX_MESSAGE_BYTES: Final = 4096
_FUSE_DEV_IOC_CLONE: Final = 0x8004E500  # _IOR(229, 0, uint32_t)
_PR_SET_PDEATHSIG: Final = 1

log = logging.getLogger(__name__)


def default_workers() -> int:
    return min(len(os.sched_getaffinity(0)), DEFAULT_WORKERS)


def tell(error: BaseException) -> bytes:
    """What a process says, in place of `READY`, to the one that waits for it."""
    if isinstance(error, PitfsError | OSError):
        code = error.exit_code if isinstance(error, PitfsError) else 1
        return f"{code} {error}".encode(errors="surrogateescape")[:_MAX_MESSAGE_BYTES]
    log.critical("ended by a bug in pitfs", exc_info=error)
    return f"1 {type(error).__name__}: {error}: this is a bug in pitfs".encode(errors="replace")[:_MAX_MESSAGE_BYTES]


def retell(message: bytes) -> PitfsError:
    """The error that `tell` was given, as far as its user needs it."""
    code, _, words = message.decode(errors="surrogateescape").partition(" ")
    failure = PitfsError(words)
    failure.exit_code = int(code)
    return failure


def fuse_descriptor() -> int:
    """The descriptor of the one mount that this process made; pyfuse3 doesn't tell it."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}") == DEVICE:
                return int(name)
    raise PitfsError(f"no descriptor of {DEVICE} in this process: this is a bug in pitfs")


def open_operations(request: MountRequest) -> Replica:
    """The handlers of a mount like that; in a process that forks no more."""
    if request.scratch is not None:
        from pitfs.fuse.scratch import ScratchReplica

        return ScratchReplica.for_mount(request)
    from pitfs.fuse.replica import Replica

    return Replica.for_mount(request)


@dataclasses.dataclass(slots=True)
class _Child:
    """A process that was started, and the minder's end of the channel to it."""

    pid: int
    channel: socket.socket
    is_ready: bool = False
    has_failed: bool = False  # and said why


class Minder:
    """Starts the workers of one mount and watches over them.

    Args:
        writer: descriptor for the word that the mount answers; none of them may keep it open.
    """

    def __init__(self, request: MountRequest, writer: int) -> None:
        self._request = request
        self._writer = writer
        self._children: dict[int, _Child] = {}
        self._seat: DeferredOperations | None = None
        self._descriptor = -1
        self._history = b""  # of the store that was looked at before it was mounted
        self._pins: tuple[str, int] | None = None  # the holder's file: its path, and what keeps it locked
        self._is_ending = False
        self._last_start_s = 0.0
        self._wakeup, self._waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def probe(self) -> Callable[[], None]:
        """Opens the store as the workers will, in a process of its own, so that what can't be served isn't
        mounted; returns the function that waits for the outcome.

        Raises:
            PitfsError: (that function) it can't be opened, and why.
        """
        child = self._fork(self._open_and_close)

        def outcome() -> None:
            message, descriptors, *_ = socket.recv_fds(child.channel, _MAX_MESSAGE_BYTES, 1)
            os.waitpid(child.pid, 0)
            self._forget(child.pid)
            word, _, told = message.partition(b" ")
            if word != READY:
                raise retell(message or b"1 the store's reader ended before it had it open")
            self._history, _, path = told.partition(b" ")
            self._pins = (os.fsdecode(path), descriptors[0]) if descriptors else None

        return outcome

    def _open_and_close(self, channel: socket.socket) -> None:
        """Also makes the file of what the mount's images hold: the workers are one holder, with one file."""
        from pitfs.store.pins.pins import Pins

        operations = open_operations(self._request)
        operations.close()
        word = READY + b" " + operations.history.encode()
        file = Pins(self._request.store, self._what, owner=os.getppid()).file
        if file is None:
            channel.send(word)
        else:
            socket.send_fds(channel, [word + b" " + os.fsencode(file[0])], [file[1]])

    @property
    def _what(self) -> str:
        return f"mount {self._request.mountpoint}"

    def close(self) -> None:
        """Ends what the mount holds."""
        if self._pins is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._pins[0])

    def serve(self, seat: DeferredOperations) -> None:
        """Starts the workers, writes `READY` when they answer, and returns when the mount is to end.

        Raises:
            PitfsError: no worker can serve.
        """
        self._seat, self._descriptor = seat, fuse_descriptor()
        signal.set_wakeup_fd(self._waker, warn_on_full_buffer=False)  # so that none is lost between two polls
        try:
            for _ in range(self._request.workers):
                self._fork(self._work)
            while not self._is_ending and not all(child.is_ready for child in self._children.values()):
                self._step(None)
            os.write(self._writer, READY)
            os.close(self._writer)
            self._writer = -1
            while not self._is_ending:
                self._step(self._restart())
        finally:
            self._end()

    def _step(self, timeout_s: float | None) -> None:
        """Waits for whatever comes next, and does what it asks for."""
        poll = select.poll()
        poll.register(self._wakeup, select.POLLIN)
        channels = {child.channel.fileno(): child for child in self._children.values()}
        for descriptor in channels:
            poll.register(descriptor, select.POLLIN)
        found = poll.poll(None if timeout_s is None else timeout_s * 1000)
        for descriptor, _ in found:
            if descriptor in channels:
                self._hear(channels[descriptor])
        if any(descriptor == self._wakeup for descriptor, _ in found):
            with contextlib.suppress(BlockingIOError):
                os.read(self._wakeup, 4096)
            self._reap()

    def _hear(self, child: _Child) -> None:
        try:
            message = child.channel.recv(_MAX_MESSAGE_BYTES)
        except ConnectionResetError:  # it is dead
            return
        if message == READY:
            child.is_ready = True
        elif message:
            failure = retell(message)
            child.has_failed = True
            if not any(other.is_ready for other in self._children.values()):
                raise failure
            log.error("a worker can't be started: %s", failure)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            child = self._children.get(pid)
            if child is None or self._is_ending:
                self._forget(pid)
                continue
            self._hear_last(child)
            self._forget(pid)
            if self._is_unmounted():
                self._is_ending = True
                continue
            if child.has_failed:
                continue
            ended = os.waitstatus_to_exitcode(status)
            how = f"by {signal.Signals(-ended).name}" if ended < 0 else f"with {ended}"
            if child.is_ready and self._request.scratch is not None:
                # Another one would show images without what the kernel and its users have written to them.
                raise PitfsError(
                    f"{self._request.mountpoint}: the process that had what was written to the images ended {how}: "
                    f"the mount ends with it; what was fsynced to a kept scratch is there when it is mounted anew"
                )
            if not child.is_ready and not any(other.is_ready for other in self._children.values()):
                raise PitfsError(f"{self._request.mountpoint}: a worker ended {how} before it served")
            log.error("worker %d ended %s: what it had taken has failed, another takes its place", pid, how)

    def _hear_last(self, child: _Child) -> None:
        with contextlib.suppress(OSError):
            if select.select([child.channel], [], [], 0)[0]:
                self._hear(child)

    def _restart(self) -> float | None:
        """Starts those that are missing; the time until the next may be started, None if none is missing."""
        missing = self._request.workers - len(self._children)
        if not missing:
            return None
        pause_s = self._last_start_s + RESTART_S - time.monotonic()
        if pause_s > 0:
            return pause_s
        for _ in range(missing):
            self._fork(self._work)
        return None

    def _forget(self, pid: int) -> None:
        child = self._children.pop(pid, None)
        if child is not None:
            child.channel.close()

    def _is_unmounted(self) -> bool:
        poll = select.poll()
        poll.register(self._descriptor, 0)
        return bool(poll.poll(0))

    def _on_signal(self, number: int, _: object) -> None:
        if number != signal.SIGCHLD:
            self._is_ending = True

    def _end(self) -> None:
        self._is_ending = True
        deadline_s = time.monotonic() + (END_S if self._request.scratch is None else SCRATCH_END_S)
        while self._children:
            number = signal.SIGTERM if time.monotonic() < deadline_s else signal.SIGKILL
            for pid in self._children:
                os.kill(pid, number)
            select.select([self._wakeup], [], [], RESEND_S)
            with contextlib.suppress(BlockingIOError):
                os.read(self._wakeup, 4096)
            self._reap()

    # -------------------------------------------------------------- the children's side

    def _fork(self, work: Callable[[socket.socket], None]) -> _Child:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        minder = os.getpid()
        pid = os.fork()
        if not pid:
            self._be_child(minder, work, theirs)
        theirs.close()
        self._last_start_s = time.monotonic()
        child = self._children[pid] = _Child(pid, ours)
        return child

    def _be_child(
        self, minder: int, work: Callable[[socket.socket], None], channel: socket.socket
    ) -> NoReturn:
        """A child's process from fork to exit; never returns, whatever happens: the minder's stack isn't its."""
        code = 1
        try:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != minder:
                raise PitfsError("the minder has ended")
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: all get it, the minder passes it on
            for descriptor in (self._writer, self._wakeup, self._waker):
                if descriptor >= 0:
                    os.close(descriptor)
            for other in self._children.values():
                other.channel.close()
            work(channel)
            code = 0
        except BaseException as error:
            with contextlib.suppress(OSError):
                channel.send(tell(error))
        finally:
            os._exit(code)

    def _work(self, channel: socket.socket) -> None:
        from pitfs.fuse.request_loop import RequestLoop
        from pitfs.store.pins.pins import Pins

        assert self._seat is not None
        clone = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
        fcntl.ioctl(clone, _FUSE_DEV_IOC_CLONE, self._descriptor.to_bytes(4, "little"))
        os.dup2(clone, self._descriptor, inheritable=False)
        os.close(clone)
        operations = open_operations(self._request)
        try:
            # Inode numbers say seq and volume: the kernel would take what it has cached for the other's.
            if operations.history.encode() != self._history:
                raise PitfsError(f"{self._request.store}: is another one now than when it was mounted: mount it anew")
            if self._pins is not None:
                operations.holder = Pins(self._request.store, self._what, os.getppid(), self._pins)
            self._seat.take(operations)
            channel.send(READY)
            RequestLoop(self._descriptor).run()
        finally:
            operations.close()
