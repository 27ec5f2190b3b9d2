"""Mounting a store: a place for it, a daemon, and a return only when the mount answers.

    mount_store ── checks the mountpoint, clears a dead mount of the same store
        │ fork (before trio and threads exist; numpy starts some when it is imported)
        ├─ daemon     mounts, starts the workers (pitfs.fuse.workers) and says so through a pipe when they have the
        │             store open; minds them until umount or SIGTERM
        └─ observer   waits for the daemon's word, stats the root from outside, raises the readahead

In the background the observer is the parent, whose exit code is the command's; in the foreground it is a
child, and the caller's process is the daemon. Log lines of a background daemon go to syslog; where there is none
(/dev/log) standard error is kept if it is a terminal or a file. A pipe isn't kept: whoever reads it to its
end would wait for the unmount; the kernel's log (/dev/kmsg) gets the lines instead.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import io
import logging
import logging.handlers
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NoReturn

from pitfs.errors import PitfsError, UsageError
from pitfs.fuse.kernel.mountinfo import escaped, mounted_at
from pitfs.fuse.workers import READY, Minder, default_workers, fuse_descriptor, retell, tell

if TYPE_CHECKING:
    import pyfuse3

SUBTYPE: Final = "pitfs"
FSTYPE: Final = "fuse.pitfs"
# 128 KiB is the kernel's; sequential reads with 1 MiB are more than twice as fast, with 4 MiB no faster.
READAHEAD_KIB: Final = 2048
MAX_DEAD_MOUNTS: Final = 16  # stacked on one mountpoint; more is somebody's loop
UMOUNT_HELPER: Final = "/sbin/umount.pitfs"
UMOUNT_OPTION: Final = "helper=pitfs"
_DEAD: Final = (errno.ENOTCONN, errno.ECONNABORTED)

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class MountRequest:
    """What to mount, where and how.

    Attributes:
        mode: of images; directories get the right to enter where there is one to read.
        kernel_options: of mount(8), passed on as they are.
        scratch: the directory of the overlays that make images writable; None: they are read-only.
        scratch_size_bytes: what may be written over all; None: what the disk has.
        scratch_keep: whether overlays stay.
        workers: processes that serve it.
    """

    store: str
    mountpoint: str
    uid: int = 0
    gid: int = 0
    mode: int = 0o400
    zone: datetime.tzinfo = datetime.UTC
    strict: bool = False
    allow_other: bool = False
    kernel_options: tuple[str, ...] = ()
    scratch: str | None = None
    scratch_size_bytes: int | None = None
    scratch_keep: bool = False
    workers: int = dataclasses.field(default_factory=default_workers)
    foreground: bool = False
    verbose: bool = False


def mount_store(request: MountRequest) -> int:
    """Mounts; returns the exit code when the mount answers (in the foreground: when it has ended).

    Raises:
        PitfsError: it can't be mounted, and why.
    """
    # The parents' links are followed, the mountpoint itself is not asked: it may be dead.
    parent, name = os.path.split(os.path.abspath(request.mountpoint))
    mountpoint = os.path.join(os.path.realpath(parent), name)
    request = dataclasses.replace(request, store=os.path.realpath(request.store), mountpoint=mountpoint)
    request = dataclasses.replace(request, mountpoint=_prepare_mountpoint(request))
    if request.scratch is not None:
        request = dataclasses.replace(request, scratch=_check_scratch(request.scratch, request))
    reader, writer = os.pipe()
    pid = os.fork()
    if (pid == 0) == request.foreground:
        os.close(writer)
        if not request.foreground:
            return _observe(reader, request.mountpoint, pid)
        try:
            _observe(reader, request.mountpoint, None)
        except PitfsError as error:  # the foreground process says it itself
            log.debug("%s", error)
        finally:
            os._exit(0)
    os.close(reader)
    if not request.foreground:
        _run_daemon(request, writer)
    _serve(request, writer)
    return 0


def source_name(store: str) -> str:
    """The store's path as the mount's source: in ASCII, which is what pyfuse3 passes on."""
    return os.fsencode(store).decode("ascii", "backslashreplace")


# ------------------------------------------------------------------ the mountpoint


def _prepare_mountpoint(request: MountRequest) -> str:
    """Makes sure that the store can be mounted there; returns the mountpoint without symbolic links."""
    mountpoint = request.mountpoint
    for _ in range(MAX_DEAD_MOUNTS):
        try:
            found = os.stat(mountpoint)
        except OSError as error:
            if error.errno in _DEAD:
                _clear_dead_mount(mountpoint, source_name(request.store))
                continue
            if error.errno == errno.ENOENT:
                raise UsageError(f"{mountpoint}: no such directory: make it first (mkdir)") from None
            raise UsageError(f"{mountpoint}: {error.strerror}: give a directory to mount on") from None
        break
    else:
        raise PitfsError(f"{mountpoint}: more than {MAX_DEAD_MOUNTS} dead mounts: clear them with umount -l")
    if not stat.S_ISDIR(found.st_mode):
        raise UsageError(f"{mountpoint}: not a directory: give a directory to mount on")
    mountpoint = os.path.realpath(mountpoint)
    there = mounted_at(mountpoint)
    if there is not None and there.type == FSTYPE:
        what = "this store is" if there.source == source_name(request.store) else f"{there.source} is"
        raise PitfsError(
            f"{mountpoint}: {what} already mounted there: end it with umount, or choose another directory"
        )
    if _contains(mountpoint, request.store):
        raise UsageError(
            f"{mountpoint}: the store {request.store} lies inside and would be hidden: choose another place"
        )
    if _contains(request.store, mountpoint):
        raise UsageError(f"{mountpoint}: lies inside the store {request.store}: choose a directory outside")
    return mountpoint


def _check_scratch(scratch: str, request: MountRequest) -> str:
    """Makes sure that overlays can be kept there; returns the directory without symbolic links."""
    if not os.path.isdir(scratch):
        raise UsageError(f"{scratch}: scratch: no such directory: make it first (mkdir)")
    scratch = os.path.realpath(scratch)
    if _contains(request.store, scratch):
        raise UsageError(f"{scratch}: scratch: lies inside the store {request.store}: choose a directory outside")
    if _contains(scratch, request.store):
        raise UsageError(f"{scratch}: scratch: the store {request.store} lies inside: choose a directory of its own")
    if _contains(request.mountpoint, scratch):
        raise UsageError(f"{scratch}: scratch: lies inside the mountpoint and would be hidden: choose another place")
    return scratch


def _contains(directory: str, path: str) -> bool:
    return path == directory or path.startswith(directory.rstrip("/") + "/")


def _clear_dead_mount(mountpoint: str, source: str) -> None:
    """Takes down the mount of a daemon that is gone, if it was one of this store."""
    dead = mounted_at(mountpoint)
    command = f"umount -l {mountpoint}"
    if dead is None:
        raise PitfsError(f"{mountpoint}: on a dead filesystem (its daemon is gone): umount that first")
    if (dead.type, dead.source) != (FSTYPE, source):
        raise PitfsError(
            f"{mountpoint}: a dead mount of {dead.source} ({dead.type}) is there: clear it with: {command}"
        )
    done = subprocess.run(["umount", "-l", "--", mountpoint], capture_output=True, text=True, check=False)
    if done.returncode:
        raise PitfsError(f"{mountpoint}: {done.stderr.strip()}: clear the dead mount with: {command}")
    print(f"mount.pitfs: {mountpoint}: cleared a dead mount of this store", file=sys.stderr)


# ------------------------------------------------------------------ the observer


def _observe(reader: int, mountpoint: str, daemon: int | None) -> int:
    """Waits until the mount answers to somebody outside its daemon; passes on what that says instead."""
    with open(reader, "rb") as pipe:
        try:
            word = pipe.read()
        except KeyboardInterrupt:  # a mount that the caller was told isn't there mustn't come after that
            if daemon is not None:
                os.kill(daemon, signal.SIGTERM)
                os.waitpid(daemon, 0)
            raise
    if word == READY:
        try:
            device = os.stat(mountpoint).st_dev
        except OSError as error:
            if error.errno not in _DEAD:
                raise
        else:
            _raise_readahead(device)
            _have_umount_ask_us(mountpoint)
            return 0
    elif word:
        raise retell(word)
    how = ""
    if daemon is not None:
        status = os.waitpid(daemon, 0)[1]
        ended = os.waitstatus_to_exitcode(status)
        how = f" by {signal.Signals(-ended).name}" if ended < 0 else f" with {ended}"
    raise PitfsError(
        f"{mountpoint}: the daemon ended{how} before the mount answered: the system's log may say why"
    )


def _raise_readahead(device: int) -> None:
    path = f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb"
    try:
        with open(path, "w", encoding="ascii") as file:
            file.write(str(READAHEAD_KIB))
    except OSError as error:  # a container without a writable /sys: slower, that is all
        log.info("%s: %s: sequential reads will be slower", path, error.strerror)


def _have_umount_ask_us(mountpoint: str) -> None:
    """Leaves word in libmount's table that umount(8) is to call umount.pitfs, which names who holds a busy mount."""
    mount = mounted_at(mountpoint)
    if os.geteuid() != 0 or mount is None or not os.path.exists(UMOUNT_HELPER):
        return
    entry = f"SRC={escaped(mount.source)} TARGET={escaped(mountpoint)} "
    try:
        with open("/run/mount/utab", encoding="utf-8", errors="surrogateescape") as file:
            if any(entry in line and UMOUNT_OPTION in line for line in file):
                return  # left by a mount that ended without umount(8); one more would stay with it
    except FileNotFoundError:
        pass
    command = ["mount", "--fake", "--internal-only", "--no-canonicalize", "-t", FSTYPE]
    command += ["-o", UMOUNT_OPTION, "--", mount.source, mountpoint]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:  # umount(8) then says no more than that it is busy
        log.info("%s: %s", mountpoint, done.stderr.strip())


# ------------------------------------------------------------------ the daemon


def _run_daemon(request: MountRequest, writer: int) -> NoReturn:
    """The daemon's process from fork to exit; never returns."""
    code = 1
    try:
        os.setsid()
        os.chdir("/")
        _serve(request, writer)
        code = 0
    except BaseException as error:
        message = tell(error)
        if isinstance(error, PitfsError):
            code = error.exit_code
        try:
            os.write(writer, message)
        except OSError:  # the mount had answered already, the observer is gone
            log.error("%s", retell(message))
    finally:
        os._exit(code)


def _serve(request: MountRequest, writer: int) -> None:
    """Mounts, starts those who serve, tells the observer, and minds them until the end."""
    minder = Minder(request, writer)
    probed = minder.probe()
    import pyfuse3  # while the store is looked at; the first of these takes longer

    from pitfs.fuse.kernel.init_flags import without_privileges
    from pitfs.fuse.request_loop import DeferredOperations

    try:
        probed()
        seat = DeferredOperations()
        _fuse_init(seat, request)
        try:
            with without_privileges(fuse_descriptor()) if request.scratch else contextlib.nullcontext():
                seat.answer_init()
            if not request.foreground:
                _detach(request.verbose)
            minder.serve(seat)
        finally:
            pyfuse3.close()
    finally:
        minder.close()


def _fuse_init(operations: pyfuse3.Operations, request: MountRequest) -> None:
    import pyfuse3

    source = source_name(request.store).replace("\\", "\\\\").replace(",", "\\,")
    # default_permissions always: without it, allow_other would let everybody in.
    options = {*request.kernel_options, "default_permissions", f"fsname={source}", f"subtype={SUBTYPE}"}
    if request.scratch is None:
        options.add("ro")
    if request.allow_other:
        options.add("allow_other")
    with _CapturedStderr() as said:
        try:
            pyfuse3.init(operations, request.mountpoint, options)
        except RuntimeError as error:
            reason = said().strip().replace("\n", "; ").removeprefix("fuse: ") or str(error)
            raise PitfsError(f"{request.mountpoint}: {reason}") from None


class _CapturedStderr:
    """libfuse writes the reason of a failure to descriptor 2: takes it into the error."""

    def __enter__(self) -> Callable[[], str]:
        self._saved = os.dup(2)
        self._file = io.FileIO(os.memfd_create("stderr"), "r+")
        os.dup2(self._file.fileno(), 2)
        return lambda: os.pread(self._file.fileno(), 4096, 0).decode(errors="replace")

    def __exit__(self, *_: object) -> None:
        os.dup2(self._saved, 2)
        os.close(self._saved)
        self._file.close()


def _detach(verbose: bool) -> None:
    """Lets go of the terminal and of the caller's pipes; from here on the log is where lines go."""
    logger = logging.getLogger()
    for each in list(logger.handlers):
        logger.removeHandler(each)
    logger.setLevel(logging.INFO if verbose else logging.WARNING)
    destination: logging.Handler
    keep_stderr = False
    kind = os.fstat(2).st_mode
    if os.path.exists("/dev/log"):
        destination = logging.handlers.SysLogHandler("/dev/log", logging.handlers.SysLogHandler.LOG_DAEMON)
    elif os.isatty(2) or stat.S_ISREG(kind):
        destination, keep_stderr = logging.StreamHandler(), True
    else:
        try:
            destination = logging.StreamHandler(open("/dev/kmsg", "w", buffering=1, encoding="utf-8"))  # noqa: SIM115
        except OSError:  # a container: there is nowhere to write
            destination = logging.NullHandler()
    destination.setFormatter(logging.Formatter("mount.pitfs[%(process)d]: %(levelname)s: %(message)s"))
    logger.addHandler(destination)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1) if keep_stderr else (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)
