"""The mounts that `pitfs attach` makes under its loop devices, and `pitfs detach` takes down.

    /run/pitfs/attached.lock            locked while a mount or device is made or taken down
    /run/pitfs/attached/GROUP.xxxxxxxx  a mount made by attach: one of its own for each image that can be written,
                                        also for the replay of a journal; one read-only mount for each store
    /var/tmp/pitfs-scratch.GROUP.xxxx…  what is written to that mount, unless another directory was given

There is no other state. The kernel's tables say which device is over which image of which mount, so nothing
can disagree with them after a reboot or a killed attach. A mount here without a device over it is unused: the
next attach or detach takes it down.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Final

from pitfs.errors import PitfsError, UsageError
from pitfs.fuse.attach.images import image_loops
from pitfs.fuse.kernel import loop_devices
from pitfs.fuse.kernel.loop_devices import polls
from pitfs.fuse.kernel.mountinfo import MountInfo, is_dead, mounts
from pitfs.fuse.kernel.processes import process_ids, processes_below, run
from pitfs.fuse.mount.request import FSTYPE, source_name

RUN: Final = "/run/pitfs"
DIRECTORY: Final = f"{RUN}/attached"
SCRATCH: Final = "/var/tmp/pitfs-scratch."  # not /tmp, which may be memory
INTERRUPTS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
END_S: Final = 3.0  # for the kernel and the mount's daemon to release what is taken down


@dataclasses.dataclass(frozen=True, slots=True)
class ScratchOptions:
    """Where a writable image's writes go (None: to a directory made for it), and how many bytes at most."""

    directory: str | None
    size: str | None

    def __post_init__(self) -> None:
        for value in (self.directory, self.size):
            if value is not None and "," in value:
                raise UsageError(f"{value}: holds a comma, which mount options can't: choose another")


@contextlib.contextmanager
def attach_lock() -> Iterator[None]:
    """Lets one attach or detach run at a time on this machine. SIGTERM and SIGHUP interrupt as Ctrl-C does.

    Raises:
        UsageError: not as root.
    """
    if os.geteuid() != 0:
        raise UsageError("only root may mount and make loop devices: run it as root")
    os.makedirs(RUN, 0o755, exist_ok=True)
    fd = os.open(f"{DIRECTORY}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with signals_interrupt():
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)


def signals_interrupt() -> contextlib.AbstractContextManager[None]:
    """Lets SIGTERM and SIGHUP end what the block does as Ctrl-C does: by KeyboardInterrupt."""
    return _signals_call(signal.default_int_handler, INTERRUPTS[1:])


@contextlib.contextmanager
def signals_deferred() -> Iterator[None]:
    """Lets the block finish before Ctrl-C or the like ends the command, so that it is known what to undo."""
    caught: list[int] = []
    with _signals_call(lambda number, _: caught.append(number), INTERRUPTS):
        yield
    if caught:
        raise KeyboardInterrupt


@contextlib.contextmanager
def _signals_call(
    handler: Callable[[int, FrameType | None], object], numbers: Sequence[signal.Signals]
) -> Iterator[None]:
    # What nohup, or a shell for its background jobs, has set to be ignored stays so.
    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    previous = [(number, signal.signal(number, handler)) for number in heard]
    try:
        yield
    finally:
        for number, former in previous:
            signal.signal(number, former)


def is_made_by_attach(mount: MountInfo) -> bool:
    return os.path.dirname(mount.mountpoint) == DIRECTORY


def find_mount(store: str, image: str) -> str | None:
    """The mountpoint of a read-only mount of the store that has this image (INSTANT/VOLUME.img).

    A mount that attach has made is preferred. None if there is no such mount.
    """
    wanted = FSTYPE, source_name(store), True, True
    there = [each for each in mounts() if (each.type, each.source, each.read_only, each.whole) == wanted]
    for mount in sorted(there, key=is_made_by_attach, reverse=True):
        try:
            with open(f"{mount.mountpoint}/{image}", "rb", buffering=0) as file:
                device = os.fstat(file.fileno()).st_dev
        except OSError:  # dead, hidden by another mount, or of another store that was at this path before
            continue
        if f"{os.major(device)}:{os.minor(device)}" == mount.device:
            return mount.mountpoint
    return None


def make_mount(store: str, group: str, scratch: ScratchOptions | None) -> str:
    """Mounts the store at a new mountpoint, which it returns. `unmount_unused` removes what a failure leaves.

    Raises:
        PitfsError: the mount failed; with the message of mount.pitfs.
    """
    os.makedirs(DIRECTORY, 0o700, exist_ok=True)
    mountpoint = tempfile.mkdtemp(prefix=f"{group}.", dir=DIRECTORY)
    command = [sys.executable, "-P", "-m", "pitfs.cli.mount", os.path.realpath(store), mountpoint]
    if scratch is not None:
        directory = scratch.directory
        if directory is None:
            directory = _scratch_of(mountpoint)
            os.mkdir(directory, 0o700)
        directory = os.path.realpath(directory)
        command += ["-o", f"scratch={directory}" + (f",scratch_size={scratch.size}" if scratch.size else "")]
    done = run(command)
    message = done.stderr.strip().replace("mount.pitfs: ", "")
    if done.returncode:
        failure = PitfsError(message or f"{store}: mount.pitfs ended with {done.returncode}")
        failure.exit_code = done.returncode if done.returncode in (1, 2) else 1
        raise failure
    if message:
        print(f"pitfs: {message}", file=sys.stderr)
    return mountpoint


@contextlib.contextmanager
def scratch_mount(store: str, group: str, directory: str | None) -> Iterator[str]:
    """A mount with writable images to the end of the block, which may have devices over them one after the other.

    It is held open, so that no other attach or detach takes it for unused while there is no device. Gives the
    mountpoint. `directory`: where what is written goes; None: to one made for it.
    """
    with contextlib.ExitStack() as undo:

        @undo.callback
        def end() -> None:
            with attach_lock(), signals_deferred():
                unmount_unused()

        with attach_lock(), signals_deferred():
            unmount_unused()
            mountpoint = make_mount(store, group, ScratchOptions(directory, None))
            undo.callback(os.close, os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        yield mountpoint


def attach_image(
    image: str, undo: contextlib.ExitStack, *, read_only: bool = False, sector_size: int | None = None
) -> tuple[str, list[str]]:
    """Makes a loop device over an image; returns it, and those of its partitions that have no nodes.

    `undo` detaches it, and unmounts first what is mounted of it. `sector_size`: None: what its partition table needs.
    """
    sector_size = sector_size or loop_devices.sector_size_of(image)
    with signals_deferred():
        device = loop_devices.attach(image, read_only=read_only, sector_size=sector_size)
        undo.callback(signals_deferred()(_release), device)
    return device, loop_devices.wait_for_partitions(device)


def _release(device: str) -> None:
    loop = loop_devices.loop_of(device)
    if loop is not None:
        for place in reversed(loop_devices.mountpoints_of(loop)):
            run(["umount", "--", place])
        loop_devices.detach(loop)


def unmount_unused() -> list[str]:
    """Unmounts what attach has mounted and no loop device uses any more, and removes the scratch of that.

    Returns:
        the mountpoints that stay because a process uses them.
    """
    used = {image.mount.mountpoint for image in image_loops() if image.mount is not None}
    busy = []
    with contextlib.suppress(FileNotFoundError):
        for name in sorted(os.listdir(DIRECTORY)):
            mountpoint = f"{DIRECTORY}/{name}"
            if mountpoint in used:
                continue
            if not _unmount(mountpoint):
                busy.append(mountpoint)
                continue
            with contextlib.suppress(OSError):  # not empty: it has a file that isn't ours
                os.rmdir(mountpoint)
            _remove_scratch(_scratch_of(mountpoint))
    return busy


def _unmount(mountpoint: str) -> bool:
    """Unmounts the mountpoint and waits for the daemon's end; False if a process uses the mount."""
    daemons = set(_daemons(mountpoint))
    for _ in polls(END_S):
        if not any(mount.mountpoint == mountpoint for mount in mounts()):
            break
        lazily = ["--lazy"] if is_dead(mountpoint) else []
        done = run(["umount", "--internal-only", *lazily, "--", mountpoint])
        # The kernel closes a detached device's file a little later; until then the mount is busy.
        if done.returncode and processes_below(mountpoint):
            return False
    else:
        return False
    for _ in polls(END_S):  # the daemon removes the scratch at its very end
        if not daemons.intersection(_daemons(mountpoint)):
            break
    return True


def _daemons(mountpoint: str) -> list[int]:
    """Processes that serve the mount: no other command has the name of a mountpoint made by attach."""
    found = []
    for pid in process_ids():
        with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
            if os.fsencode(mountpoint) in file.read().split(b"\0"):
                found.append(pid)
    return found


def _scratch_of(mountpoint: str) -> str:
    return SCRATCH + os.path.basename(mountpoint)


def _remove_scratch(directory: str) -> None:
    """Removes the directory and what is in it; the mount's daemon may be doing the same."""
    for _ in polls(END_S):
        shutil.rmtree(directory, ignore_errors=True)
        if not os.path.lexists(directory):
            return
    print(f"pitfs: {directory}: can't be removed: remove it by hand", file=sys.stderr)
