"""Several processes serve one mount: workers, and a supervisor that starts them.

    supervisor ── mounts, answers the kernel's first request (INIT), forks the workers, reads no further request
      └─ worker, worker, …   each opens the store for itself and takes requests as it has time

**Any worker answers any request.** Handlers keep nothing that an answer depends on, so the kernel may hand a
request to any of them.

**Each worker reads from a clone of /dev/fuse.** The kernel remembers by which descriptor it handed a request
out. With one descriptor for all, a request that a killed worker had taken would stay open as long as any
other worker lives, and its caller would hang. With a clone for each (FUSE_DEV_IOC_CLONE) the kernel ends such
requests with an error as soon as the worker's own descriptor is closed, which it is however the worker dies.
The supervisor's descriptor keeps the mount alive meanwhile, and the supervisor starts another worker.

**The workers share one file of pins.** A file that one worker opened may be closed through another one, so
what one has pinned another must be able to unpin. The file is made once, by the process that tries whether
the store can be opened, in the supervisor's name. The supervisor holds its descriptor, and each worker
inherits that: the file stays locked until the last of them has ended.

**The end.** The mount ends with umount, which all workers see, or with SIGTERM or SIGINT at the supervisor.
If the supervisor is killed, the kernel kills the workers (PR_SET_PDEATHSIG).

The supervisor stays small: it loads neither the store nor numpy, and has no threads and no trio loop.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import logging
import os
import select
import signal
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from pitfs.errors import PitfsError
from pitfs.fuse.mount.request import MountRequest

if TYPE_CHECKING:
    from pitfs.fuse.mount.request_loop import DeferredOperations
    from pitfs.fuse.replica import Replica

DEVICE: Final = "/dev/fuse"
RESEND_S: Final = 0.05  # a signal that came just before a blocking read is lost
END_S: Final = 10.0  # for what is under way; then SIGKILL
SCRATCH_END_S: Final = 600.0  # as well, and for making durable what is kept
RESTART_S: Final = 1.0  # at least, between two starts
READY: Final = b"ready"
_MAX_MESSAGE_BYTES: Final = 4096
_FUSE_DEV_IOC_CLONE: Final = 0x8004E500  # _IOR(229, 0, uint32_t)
_PR_SET_PDEATHSIG: Final = 1

log = logging.getLogger(__name__)


def encode_failure(error: BaseException) -> bytes:
    """The message that a process sends in place of `READY`: exit code and text."""
    if isinstance(error, PitfsError | OSError):
        code = error.exit_code if isinstance(error, PitfsError) else 1
        return f"{code} {error}".encode(errors="surrogateescape")[:_MAX_MESSAGE_BYTES]
    log.critical("ended by a bug in pitfs", exc_info=error)
    return f"1 {type(error).__name__}: {error}: this is a bug in pitfs".encode(errors="replace")[:_MAX_MESSAGE_BYTES]


def decode_failure(message: bytes) -> PitfsError:
    """The error in a message of `encode_failure`, with its text and exit code."""
    code, _, text = message.decode(errors="surrogateescape").partition(" ")
    failure = PitfsError(text)
    failure.exit_code = int(code)
    return failure


def end_of_process(status: int) -> str:
    """How a process ended, by its status of waitpid(2): "by SIGKILL", "with 1"."""
    code = os.waitstatus_to_exitcode(status)
    return f"by {signal.Signals(-code).name}" if code < 0 else f"with {code}"


def fuse_descriptor() -> int:
    """The descriptor of the one mount that this process made; pyfuse3 doesn't say it."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}") == DEVICE:
                return int(name)
    raise PitfsError(f"no descriptor of {DEVICE} in this process: this is a bug in pitfs")


def open_operations(request: MountRequest) -> Replica:
    """Opens the store, and the scratch if there is one, for the handlers of a process that forks no more.

    Raises:
        PitfsError: opening one of them fails, or the store has nothing to show.
    """
    if request.scratch is not None:
        from pitfs.fuse.kernel.io_flusher import set_io_flusher

        set_io_flusher()  # before there are threads; the first come with numpy

    from pitfs.fuse.replica import Ownership, Replica
    from pitfs.store.store import Store
    from pitfs.view.tree import Tree

    store = Store.open(request.store)  # the process ends if what follows fails, and the store with it
    tree = Tree(store, time.time_ns, request.zone, request.strict)
    ownership = Ownership(request.uid, request.gid, request.mode)
    if request.scratch is None:
        return Replica(store, tree, ownership, request.workers)

    from pitfs.fuse.scratch import ScratchReplica
    from pitfs.view.scratch import ScratchDirectory

    scratch = ScratchDirectory(request.scratch, store, request.scratch_size_bytes, request.scratch_keep)
    return ScratchReplica(store, tree, ownership, scratch)


class WorkerSupervisor:
    """Starts the workers of one mount, and others for those that die.

    Args:
        writer: the pipe to the one who waits for the mount; no worker may keep it open.
    """

    def __init__(self, request: MountRequest, writer: int) -> None:
        self._request = request
        self._writer = writer
        self._workers: dict[int, bool] = {}  # by pid: whether it is ready
        self._operations: DeferredOperations | None = None
        self._descriptor = -1
        self._history = b""  # of the store as it was before it was mounted
        self._pins_label = f"mount {request.mountpoint}"
        self._pins: tuple[str, int] | None = None  # their file, and the descriptor that keeps it locked
        self._is_ending = False
        self._last_start_s = 0.0
        # The workers' messages: pid, and READY or a failure.
        self._inbox, self._outbox = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._wakeup, self._waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def start_probe(self) -> Callable[[], None]:
        """Opens the store in another process, as workers do: one that doesn't open isn't mounted.

        Returns:
            the function that waits for the outcome; it raises PitfsError if the store doesn't open.
        """
        pid = self._fork(self._probe)

        def finish() -> None:
            os.waitpid(pid, 0)
            try:
                received = socket.recv_fds(self._inbox, _MAX_MESSAGE_BYTES, 1, socket.MSG_DONTWAIT)
            except BlockingIOError:
                raise PitfsError("the process that opens the store ended before it had it open") from None
            message, descriptors, *_ = received
            _, word, *rest = message.split(b" ", 3)
            if word != READY:
                raise decode_failure(message.partition(b" ")[2])
            self._history, path = rest
            self._pins = (os.fsdecode(path), descriptors[0]) if descriptors else None

        return finish

    def close(self) -> None:
        """Ends the pins of the mount."""
        if self._pins is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._pins[0])

    def serve(self, operations: DeferredOperations) -> None:
        """Starts the workers, writes `READY` when all answer, and returns when the mount is to end.

        Raises:
            PitfsError: no worker can serve.
        """
        self._operations, self._descriptor = operations, fuse_descriptor()
        signal.set_wakeup_fd(self._waker, warn_on_full_buffer=False)  # no signal is lost between two polls
        try:
            self._start_missing()
            while not self._is_ending and not all(self._workers.values()):
                self._wait(None)
            os.write(self._writer, READY)
            os.close(self._writer)
            self._writer = -1
            while not self._is_ending:
                self._wait(self._start_missing())
        finally:
            self._end_workers()

    def _wait(self, timeout_s: float | None) -> None:
        """Waits for a message or the end of a worker, or for a signal, and acts on it."""
        select.select([self._wakeup, self._inbox.fileno()], [], [], timeout_s)
        self._receive()
        self._reap()

    def _receive(self) -> None:
        """Takes the messages that are there."""
        while not self._is_ending:
            try:
                message = self._inbox.recv(_MAX_MESSAGE_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            number, _, text = message.partition(b" ")
            pid = int(number)
            if text == READY:
                self._workers[pid] = True
                continue
            if not any(self._workers.values()):
                raise decode_failure(text)
            log.error("starting a worker failed: %s", decode_failure(text))
            if not self._workers[pid]:
                del self._workers[pid]  # it ends at once, and all is said

    def _reap(self) -> None:
        """Takes note of all workers that have ended."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._wakeup, 4096)
        while self._workers:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            try:
                self._receive()  # its last message
            finally:
                was_ready = self._workers.pop(pid, None)
            # None: the start failed, or it is the observer of a mount in the foreground.
            if was_ready is not None and not self._is_ending:
                self._on_end(pid, was_ready, end_of_process(status))

    def _on_end(self, pid: int, was_ready: bool, how: str) -> None:
        """A worker has ended: so does the mount, or another worker takes its place."""
        if self._is_unmounted():
            self._is_ending = True
            return
        if was_ready and self._request.scratch is not None:
            # Another one would show images without what the kernel and its users have written to them.
            raise PitfsError(
                f"{self._request.mountpoint}: the process that had what was written to images ended {how}: "
                f"the mount ends with it; what was fsynced to a kept scratch is there when it is mounted anew"
            )
        if not was_ready and not any(self._workers.values()):
            raise PitfsError(f"{self._request.mountpoint}: a worker ended {how} before it served")
        log.error("worker %d ended %s: the requests it had taken fail, another takes its place", pid, how)

    def _start_missing(self) -> float | None:
        """Starts the workers that are missing; returns the time to wait before that, or None."""
        missing = self._request.workers - len(self._workers)
        pause_s = self._last_start_s + RESTART_S - time.monotonic()
        if missing and pause_s > 0:
            return pause_s
        for _ in range(missing):
            self._workers[self._fork(self._work)] = False
            self._last_start_s = time.monotonic()
        return None

    def _is_unmounted(self) -> bool:
        poll = select.poll()
        poll.register(self._descriptor, 0)
        return bool(poll.poll(0))

    def _on_signal(self, number: int, _: object) -> None:
        if number != signal.SIGCHLD:
            self._is_ending = True

    def _end_workers(self) -> None:
        self._is_ending = True
        deadline_s = time.monotonic() + (END_S if self._request.scratch is None else SCRATCH_END_S)
        while self._workers:
            number = signal.SIGTERM if time.monotonic() < deadline_s else signal.SIGKILL
            for pid in self._workers:
                os.kill(pid, number)
            select.select([self._wakeup], [], [], RESEND_S)
            self._reap()

    def _fork(self, work: Callable[[], None]) -> int:
        """The pid of a child that does `work` and exits. It never returns: the stack below is the supervisor's."""
        supervisor = os.getpid()
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != supervisor:
                raise PitfsError("the supervisor has ended")
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's goes to all: the supervisor acts
            for descriptor in (self._writer, self._wakeup, self._waker):
                if descriptor >= 0:
                    os.close(descriptor)
            work()
            code = 0
        except BaseException as error:
            with contextlib.suppress(OSError):
                self._send(encode_failure(error))
        finally:
            os._exit(code)

    # -------------------------------------------------------------- in the children

    def _send(self, message: bytes, *descriptors: int) -> None:
        socket.send_fds(self._outbox, [b"%d %s" % (os.getpid(), message)], descriptors)

    def _probe(self) -> None:
        """Opens the store once, and makes the file of the mount's pins: the workers share one."""
        from pitfs.store.pins.pins import Pins

        operations = open_operations(self._request)
        operations.close()
        file = Pins(self._request.store, self._pins_label, owner=os.getppid()).file
        path, *descriptors = file or ("",)
        self._send(b"%s %s %s" % (READY, operations.history.encode(), os.fsencode(path)), *descriptors)

    def _work(self) -> None:
        from pitfs.fuse.mount.request_loop import RequestLoop
        from pitfs.store.pins.pins import Pins

        assert self._operations is not None
        clone = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
        fcntl.ioctl(clone, _FUSE_DEV_IOC_CLONE, self._descriptor.to_bytes(4, "little"))
        os.dup2(clone, self._descriptor, inheritable=False)  # pyfuse3 reads from this number
        os.close(clone)
        operations = open_operations(self._request)
        try:
            # An inode number is a seq and a volume. If the store were another one now, the kernel would show
            # what it has cached of the former.
            if operations.history.encode() != self._history:
                raise PitfsError(f"{self._request.store}: is another one now than when it was mounted: mount it anew")
            if self._pins is not None:
                operations.pins = Pins(self._request.store, self._pins_label, os.getppid(), self._pins)
            self._operations.delegate_to(operations)
            self._send(READY)
            RequestLoop(self._descriptor).run()
        finally:
            operations.close()
