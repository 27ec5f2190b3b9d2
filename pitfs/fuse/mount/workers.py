"""Several processes serve one mount: workers, and a supervisor that starts them.

    supervisor ── mounts, answers the kernel's first request (INIT), forks the workers, reads no further request
      └─ worker, worker, …   each opens the store for itself and takes requests as it has time

**Any worker answers any request.** Handlers keep nothing that an answer depends on, so the kernel may hand a request
to any of them.

**Each worker reads from a clone of /dev/fuse.** The kernel remembers by which descriptor it handed a request out.
With one descriptor for all, a request that a killed worker had taken would stay open as long as any other worker
lives, and its caller would hang. With a clone for each (FUSE_DEV_IOC_CLONE) the kernel ends such requests with an
error as soon as the worker's own descriptor is closed, which it is however the worker dies. The supervisor's
descriptor keeps the mount alive meanwhile, and the supervisor starts another worker.

**The workers share one file of pins.** A file that one worker opened may be closed through another one, so what one
has pinned another must be able to unpin. The file is made once, by the process that tries whether the store can be
opened, in the supervisor's name. The supervisor holds its descriptor, and each worker inherits that: the file stays
locked until the last of them has ended.

**The end.** The mount ends with umount, which all workers see, or with SIGTERM or SIGINT at the supervisor. If the
supervisor is killed, the kernel kills the workers (PR_SET_PDEATHSIG).

The supervisor stays small: it loads neither the store nor numpy, and has no threads and no trio loop.
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
        PitfsError: one of them can't be opened, or the store not be shown.
    """
    if request.scratch is not None:
        from pitfs.fuse.kernel.io_flusher import set_io_flusher

        set_io_flusher()  # before there are threads; the first come with numpy

    from pitfs.fuse.replica import Ownership, Replica
    from pitfs.store.store import Store
    from pitfs.view.tree import Tree

    with contextlib.ExitStack() as undo:
        store = Store.open(request.store)
        undo.callback(store.close)
        tree = Tree(store, time.time_ns, request.zone, request.strict)
        ownership = Ownership(request.uid, request.gid, request.mode)
        if request.scratch is None:
            operations = Replica(store, tree, ownership, request.workers)
        else:
            from pitfs.fuse.scratch import ScratchReplica
            from pitfs.view.scratch import ScratchDirectory

            scratch = ScratchDirectory(request.scratch, store, request.scratch_size_bytes, request.scratch_keep)
            operations = ScratchReplica(store, tree, ownership, scratch)
        undo.pop_all()
    return operations


@dataclasses.dataclass(slots=True)
class _Child:
    """A process that was started, and the supervisor's end of the channel to it."""

    pid: int
    channel: socket.socket
    is_ready: bool = False
    has_failed: bool = False  # and said why


class WorkerSupervisor:
    """Starts the workers of one mount, and others for those that die.

    Args:
        writer: the pipe to the one who waits for the mount; no worker may keep it open.
    """

    def __init__(self, request: MountRequest, writer: int) -> None:
        self._request = request
        self._writer = writer
        self._children: dict[int, _Child] = {}
        self._operations: DeferredOperations | None = None
        self._descriptor = -1
        self._history = b""  # of the store as it was before it was mounted
        self._pins: tuple[str, int] | None = None  # file of the pins: its path, and the descriptor that keeps it locked
        self._is_ending = False
        self._last_start_s = 0.0
        self._wakeup, self._waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def start_probe(self) -> Callable[[], None]:
        """Opens the store in another process, as the workers will: a store that can't be served isn't mounted.

        Returns:
            the function that waits for the outcome; it raises PitfsError if the store can't be opened.
        """
        child = self._fork(self._probe)

        def finish() -> None:
            message, descriptors, *_ = socket.recv_fds(child.channel, _MAX_MESSAGE_BYTES, 1)
            os.waitpid(child.pid, 0)
            self._remove(child.pid)
            word, _, rest = message.partition(b" ")
            if word != READY:
                raise decode_failure(message or b"1 the process that opens the store ended before it had it open")
            self._history, _, path = rest.partition(b" ")
            self._pins = (os.fsdecode(path), descriptors[0]) if descriptors else None

        return finish

    @property
    def _pins_label(self) -> str:
        return f"mount {self._request.mountpoint}"

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
            for _ in range(self._request.workers):
                self._fork(self._work)
            while not self._is_ending and not all(child.is_ready for child in self._children.values()):
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
        poll = select.poll()
        poll.register(self._wakeup, select.POLLIN)
        channels = {child.channel.fileno(): child for child in self._children.values()}
        for descriptor in channels:
            poll.register(descriptor, select.POLLIN)
        for descriptor, _ in poll.poll(None if timeout_s is None else timeout_s * 1000):
            if descriptor in channels:
                self._receive(channels[descriptor])
        self._reap()

    def _receive(self, child: _Child) -> None:
        """Takes the worker's message, if there is one."""
        try:
            message = child.channel.recv(_MAX_MESSAGE_BYTES, socket.MSG_DONTWAIT)
        except (BlockingIOError, ConnectionResetError):
            return
        if message == READY:
            child.is_ready = True
        elif message:
            failure = decode_failure(message)
            child.has_failed = True
            if not self._any_ready():
                raise failure
            log.error("a worker can't be started: %s", failure)

    def _any_ready(self) -> bool:
        return any(child.is_ready for child in self._children.values())

    def _reap(self) -> None:
        """Takes note of all workers that have ended."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._wakeup, 4096)
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            child = self._children.get(pid)
            try:
                if child is not None and not self._is_ending:
                    self._receive(child)  # its last message
            finally:
                self._remove(pid)
            if child is not None and not self._is_ending:
                self._on_end(child, end_of_process(status))

    def _on_end(self, child: _Child, how: str) -> None:
        """A worker has ended: so does the mount, or another worker takes its place."""
        if self._is_unmounted():
            self._is_ending = True
            return
        if child.has_failed:
            return
        if child.is_ready and self._request.scratch is not None:
            # Another one would show images without what the kernel and its users have written to them.
            raise PitfsError(
                f"{self._request.mountpoint}: the process that had what was written to the images ended {how}: "
                f"the mount ends with it; what was fsynced to a kept scratch is there when it is mounted anew"
            )
        if not child.is_ready and not self._any_ready():
            raise PitfsError(f"{self._request.mountpoint}: a worker ended {how} before it served")
        log.error("worker %d ended %s: the requests that it had taken fail, another takes its place", child.pid, how)

    def _start_missing(self) -> float | None:
        """Starts the workers that are missing; returns the time until they may be, None if none is missing."""
        missing = self._request.workers - len(self._children)
        pause_s = self._last_start_s + RESTART_S - time.monotonic()
        if missing and pause_s > 0:
            return pause_s
        for _ in range(missing):
            self._fork(self._work)
        return None

    def _remove(self, pid: int) -> None:
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

    def _end_workers(self) -> None:
        self._is_ending = True
        deadline_s = time.monotonic() + (END_S if self._request.scratch is None else SCRATCH_END_S)
        while self._children:
            number = signal.SIGTERM if time.monotonic() < deadline_s else signal.SIGKILL
            for pid in self._children:
                os.kill(pid, number)
            select.select([self._wakeup], [], [], RESEND_S)
            self._reap()

    # -------------------------------------------------------------- in the children

    def _fork(self, work: Callable[[socket.socket], None]) -> _Child:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        supervisor = os.getpid()
        pid = os.fork()
        if not pid:
            self._run_child(supervisor, work, theirs)
        theirs.close()
        self._last_start_s = time.monotonic()
        child = self._children[pid] = _Child(pid, ours)
        return child

    def _run_child(
        self, supervisor: int, work: Callable[[socket.socket], None], channel: socket.socket
    ) -> NoReturn:
        """A child's process from fork to exit. It never returns, since the stack below is the supervisor's."""
        code = 1
        try:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != supervisor:
                raise PitfsError("the supervisor has ended")
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's goes to all; the supervisor ends the workers
            for descriptor in (self._writer, self._wakeup, self._waker):
                if descriptor >= 0:
                    os.close(descriptor)
            for other in self._children.values():
                other.channel.close()
            work(channel)
            code = 0
        except BaseException as error:
            with contextlib.suppress(OSError):
                channel.send(encode_failure(error))
        finally:
            os._exit(code)

    def _probe(self, channel: socket.socket) -> None:
        """Opens the store once, and makes the file of the mount's pins: the workers share one."""
        from pitfs.store.pins.pins import Pins

        operations = open_operations(self._request)
        operations.close()
        message = READY + b" " + operations.history.encode()
        file = Pins(self._request.store, self._pins_label, owner=os.getppid()).file
        if file is None:
            channel.send(message)
        else:
            socket.send_fds(channel, [message + b" " + os.fsencode(file[0])], [file[1]])

    def _work(self, channel: socket.socket) -> None:
        from pitfs.fuse.mount.request_loop import RequestLoop
        from pitfs.store.pins.pins import Pins

        assert self._operations is not None
        clone = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
        fcntl.ioctl(clone, _FUSE_DEV_IOC_CLONE, self._descriptor.to_bytes(4, "little"))
        os.dup2(clone, self._descriptor, inheritable=False)  # pyfuse3 reads from this number
        os.close(clone)
        operations = open_operations(self._request)
        try:
            # An inode number is a seq and a volume. If the store were another one now, the kernel would show what it
            # has cached of the former.
            if operations.history.encode() != self._history:
                raise PitfsError(f"{self._request.store}: is another one now than when it was mounted: mount it anew")
            if self._pins is not None:
                operations.pins = Pins.inherited(self._pins_label, os.getppid(), *self._pins)
            self._operations.delegate_to(operations)
            channel.send(READY)
            RequestLoop(self._descriptor).run()
        finally:
            operations.close()
