"""Mounting a store: the checks before, a daemon that serves it, and a return only when the mount answers.

    mount_store ── checks the mountpoint, clears a dead mount of the same store
        │ fork (before trio and threads exist; numpy starts some when it is imported)
        ├─ daemon     mounts, starts the workers (pitfs.fuse.mount.workers), writes READY to a pipe when
        │             they have the store open, supervises them until umount or SIGTERM
        └─ observer   waits for READY, stats the root from outside the daemon, raises the readahead

In the background the observer is the parent, whose exit code is the command's. In the foreground it is a
child, and the caller's process is the daemon.

Log lines of a background daemon go to syslog. Where there is none (/dev/log) standard error is kept if it is
a terminal or a file. A pipe isn't kept, since its reader would wait for its end until the unmount; the
kernel's log (/dev/kmsg) gets the lines instead.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import logging
import logging.handlers
import os
import signal
import stat
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final, NoReturn

from pitfs.errors import PitfsError, UsageError
from pitfs.fuse.kernel.mountinfo import DEAD_ERRNOS, clear_dead_mount, escaped, in_real_directory, mounted_at
from pitfs.fuse.kernel.processes import run
from pitfs.fuse.mount import workers
from pitfs.fuse.mount.request import FSTYPE, SUBTYPE, MountRequest, source_name

if TYPE_CHECKING:
    import pyfuse3

# 128 KiB is the kernel's; sequential reads with 1 MiB are more than twice as fast, with 4 MiB no faster.
READAHEAD_KIB: Final = 2048
UMOUNT_HELPER: Final = "/sbin/umount.pitfs"
UMOUNT_OPTION: Final = "helper=pitfs"

log = logging.getLogger(__name__)


def mount_store(request: MountRequest) -> int:
    """Mounts; returns the exit code when the mount answers (in the foreground: when it has ended).

    Raises:
        PitfsError: the mount fails; with the reason.
    """
    store = os.path.realpath(request.store)
    mountpoint = _prepare_mountpoint(in_real_directory(request.mountpoint), store)
    scratch = None if request.scratch is None else _check_scratch(request.scratch, store, mountpoint)
    request = dataclasses.replace(request, store=store, mountpoint=mountpoint, scratch=scratch)
    reader, writer = os.pipe()
    pid = os.fork()
    if (pid == 0) == request.foreground:
        os.close(writer)
        if not request.foreground:
            return _observe(reader, request.mountpoint, pid)
        try:
            _observe(reader, request.mountpoint, None)
        finally:  # an error, too: the foreground process says it itself
            os._exit(0)
    os.close(reader)
    if not request.foreground:
        _run_daemon(request, writer)
    _serve(request, writer)
    return 0


# ------------------------------------------------------------------ the mountpoint


def _prepare_mountpoint(mountpoint: str, store: str) -> str:
    """Makes sure that the store can be mounted there; returns the mountpoint without symbolic links."""
    source = source_name(store)
    if clear_dead_mount(mountpoint, FSTYPE, source):
        print(f"mount.pitfs: {mountpoint}: cleared a dead mount of this store", file=sys.stderr)
    try:
        found = os.stat(mountpoint)
    except OSError as error:
        if error.errno in DEAD_ERRNOS:
            reason = "on a dead filesystem (its daemon is gone): umount that first"
            if dead := mounted_at(mountpoint):
                what = f"a dead mount of {dead.source} ({dead.type})"
                reason = f"{what} is there: clear it with: umount -l {mountpoint}"
            raise PitfsError(f"{mountpoint}: {reason}") from None
        if error.errno == errno.ENOENT:
            raise UsageError(f"{mountpoint}: no such directory: make it first (mkdir)") from None
        raise UsageError(f"{mountpoint}: {error.strerror}: give a directory to mount on") from None
    if not stat.S_ISDIR(found.st_mode):
        raise UsageError(f"{mountpoint}: not a directory: give a directory to mount on")
    mountpoint = os.path.realpath(mountpoint)
    there = mounted_at(mountpoint)
    if there is not None and there.type == FSTYPE:
        what = "this store is" if there.source == source else f"{there.source} is"
        raise PitfsError(
            f"{mountpoint}: {what} already mounted there: end it with umount, or choose another directory"
        )
    if _contains(mountpoint, store):
        raise UsageError(f"{mountpoint}: the store {store} lies inside and would be hidden: choose another place")
    if _contains(store, mountpoint):
        raise UsageError(f"{mountpoint}: lies inside the store {store}: choose a directory outside")
    return mountpoint


def _check_scratch(scratch: str, store: str, mountpoint: str) -> str:
    """Makes sure that overlays can be kept there; returns the directory without symbolic links."""
    if not os.path.isdir(scratch):
        raise UsageError(f"{scratch}: scratch: no such directory: make it first (mkdir)")
    scratch = os.path.realpath(scratch)
    if _contains(store, scratch):
        raise UsageError(f"{scratch}: scratch: lies inside the store {store}: choose a directory outside")
    if _contains(scratch, store):
        raise UsageError(f"{scratch}: scratch: the store {store} lies inside: choose a directory of its own")
    if _contains(mountpoint, scratch):
        raise UsageError(f"{scratch}: scratch: lies inside the mountpoint and would be hidden: choose another place")
    return scratch


def _contains(directory: str, path: str) -> bool:
    return os.path.commonpath((directory, path)) == directory


# ------------------------------------------------------------------ the observer


def _observe(reader: int, mountpoint: str, daemon: int | None) -> int:
    """Waits until the mount answers to another process than its daemon, or raises the daemon's error."""
    with open(reader, "rb") as pipe:
        try:
            message = pipe.read()
        except KeyboardInterrupt:  # the caller is told that there is no mount: none may appear after that
            if daemon is not None:
                os.kill(daemon, signal.SIGTERM)
                os.waitpid(daemon, 0)
            raise
    if message == workers.READY:
        try:
            device = os.stat(mountpoint).st_dev
        except OSError as error:
            if error.errno not in DEAD_ERRNOS:
                raise
        else:
            _raise_readahead(device)
            _register_umount_helper(mountpoint)
            return 0
    elif message:
        raise workers.decode_failure(message)
    how = f" {workers.end_of_process(os.waitpid(daemon, 0)[1])}" if daemon is not None else ""
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


def _register_umount_helper(mountpoint: str) -> None:
    """Has umount(8) call umount.pitfs, by an entry in libmount's table: it names who holds a busy mount."""
    mount = mounted_at(mountpoint)
    if os.geteuid() != 0 or mount is None or not os.path.exists(UMOUNT_HELPER):
        return
    entry = f"SRC={escaped(mount.source)} TARGET={escaped(mountpoint)} "
    try:
        with open("/run/mount/utab", encoding="utf-8", errors="surrogateescape") as file:
            if any(entry in line and UMOUNT_OPTION in line for line in file):
                return  # of a mount that ended without umount(8); umount(8) removes only one entry
    except FileNotFoundError:
        pass
    command = ["mount", "--fake", "--internal-only", "--no-canonicalize", "-t", FSTYPE]
    command += ["-o", UMOUNT_OPTION, "--", mount.source, mountpoint]
    done = run(command)
    if done.returncode:  # for a busy mount umount(8) then says only that it is busy
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
        message = workers.encode_failure(error)
        code = workers.decode_failure(message).exit_code
        try:
            os.write(writer, message)
        except OSError:  # the mount has answered before, and the observer is gone
            log.error("%s", workers.decode_failure(message))
    finally:
        os._exit(code)


def _serve(request: MountRequest, writer: int) -> None:
    """Mounts, starts the workers, writes READY to the observer, and supervises the workers until the end."""
    supervisor = workers.WorkerSupervisor(request, writer)
    finish_probe = supervisor.start_probe()
    import pyfuse3  # while another process opens the store, which takes about as long

    from pitfs.fuse.kernel.init_flags import killpriv_flag_added
    from pitfs.fuse.mount.request_loop import DeferredOperations

    try:
        finish_probe()
        operations = DeferredOperations()
        _fuse_init(operations, request)
        try:
            with killpriv_flag_added(workers.fuse_descriptor()) if request.scratch else contextlib.nullcontext():
                operations.answer_init()
            if not request.foreground:
                _detach_from_caller(request.verbose)
            supervisor.serve(operations)
        finally:
            pyfuse3.close()
    finally:
        supervisor.close()


def _fuse_init(operations: pyfuse3.Operations, request: MountRequest) -> None:
    import pyfuse3

    source = source_name(request.store).replace("\\", "\\\\").replace(",", "\\,")
    # default_permissions always: without it, allow_other would let everybody in.
    options = {*request.kernel_options, "default_permissions", f"fsname={source}", f"subtype={SUBTYPE}"}
    if request.scratch is None:
        options.add("ro")
    if request.allow_other:
        options.add("allow_other")
    with _captured_stderr() as captured:
        try:
            pyfuse3.init(operations, request.mountpoint, options)
        except RuntimeError as error:
            reason = captured().strip().replace("\n", "; ").removeprefix("fuse: ") or str(error)
            raise PitfsError(f"{request.mountpoint}: {reason}") from None


@contextlib.contextmanager
def _captured_stderr() -> Iterator[Callable[[], str]]:
    """Captures descriptor 2, where libfuse writes why it fails; yields a function that reads what came."""
    saved = os.dup(2)
    with io.FileIO(os.memfd_create("stderr"), "r+") as file:
        os.dup2(file.fileno(), 2)
        try:
            yield lambda: os.pread(file.fileno(), 4096, 0).decode(errors="replace")
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def _detach_from_caller(verbose: bool) -> None:
    """Closes the terminal or the caller's pipes; from here on all lines go to the log."""
    destination: logging.Handler
    closed: tuple[int, ...] = (0, 1, 2)
    if os.path.exists("/dev/log"):
        destination = logging.handlers.SysLogHandler("/dev/log", logging.handlers.SysLogHandler.LOG_DAEMON)
    elif os.isatty(2) or stat.S_ISREG(os.fstat(2).st_mode):
        destination, closed = logging.StreamHandler(), (0, 1)
    else:
        try:
            destination = logging.StreamHandler(open("/dev/kmsg", "w", buffering=1, encoding="utf-8"))  # noqa: SIM115
        except OSError:  # a container: there is nowhere to write
            destination = logging.NullHandler()
    level = logging.INFO if verbose else logging.WARNING
    line = "mount.pitfs[%(process)d]: %(levelname)s: %(message)s"
    logging.basicConfig(level=level, format=line, handlers=[destination], force=True)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in closed:
        os.dup2(null, descriptor)
    os.close(null)
