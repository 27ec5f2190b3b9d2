"""What `pitfs attach` makes and `pitfs detach` takes down: mounts, and loop devices over images in them.

    /run/pitfs/attached.lock            held while anything below is made or taken down
    /run/pitfs/attached/GROUP.xxxxxxxx  a mount that attach has made: one read-only mount for each store, a mount of
                                        its own for each scratch image
    /var/tmp/pitfs-scratch.GROUP.xxxx…  what is written to that mount, unless another directory was given

There is no other state: the kernel's tables say which device is over which image of which mount. So what a killed
attach left, or a reboot, can't disagree with anything: a mount here over which there is no device is in nobody's
way, and whoever comes next takes it down.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Final

from pitfs.errors import PitfsError, UsageError
from pitfs.fuse.kernel.loop_devices import image_loops
from pitfs.fuse.kernel.mountinfo import MountInfo, is_dead, mounts
from pitfs.fuse.kernel.users import users_below
from pitfs.fuse.mount import FSTYPE, source_name

RUN: Final = "/run/pitfs"
DIRECTORY: Final = f"{RUN}/attached"
SCRATCH: Final = "/var/tmp/pitfs-scratch."  # not /tmp, which may be memory
INTERRUPTS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
END_S: Final = 3.0  # for the kernel and the mount's daemon to let go of what is taken down
POLL_S: Final = 0.02


@dataclasses.dataclass(frozen=True, slots=True)
class Scratch:
    """Where a writable image's writes go: a directory, else one made for it; at most so much, as the mount reads it."""

    directory: str | None
    size: str | None


@contextlib.contextmanager
def exclusive() -> Iterator[None]:
    """One attach or detach at a time on this machine; the others wait. SIGTERM and SIGHUP interrupt as Ctrl-C does.

    Raises:
        UsageError: not as root.
    """
    if os.geteuid() != 0:
        raise UsageError("only root may mount and make loop devices: run it as root")
    os.makedirs(RUN, 0o755, exist_ok=True)
    fd = os.open(f"{DIRECTORY}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    previous = [(number, signal.signal(number, signal.default_int_handler)) for number in INTERRUPTS[1:]]
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
        for number, handler in previous:
            signal.signal(number, handler)


@contextlib.contextmanager
def signals_wait() -> Iterator[None]:
    """Ctrl-C and the like end the command after this, when it is known what there is to undo."""
    caught: list[int] = []
    previous = [(number, signal.signal(number, lambda *_: caught.append(1))) for number in INTERRUPTS]
    try:
        yield
    finally:
        for number, handler in previous:
            signal.signal(number, handler)
    if caught:
        raise KeyboardInterrupt


def is_ours(mount: MountInfo) -> bool:
    """Whether attach has made it."""
    return os.path.dirname(mount.mountpoint) == DIRECTORY


def mount_with(store: str, image: str) -> str | None:
    """Where the store is mounted read-only so that this image (INSTANT/VOLUME.img) can be opened; None if nowhere.

    One that attach has made goes before one that somebody else has.
    """
    wanted = source_name(store)
    there = [mount for mount in mounts() if (mount.type, mount.source) == (FSTYPE, wanted)]
    for mount in sorted(there, key=is_ours, reverse=True):
        if not mount.read_only or not mount.whole:
            continue
        try:
            fd = os.open(f"{mount.mountpoint}/{image}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # dead, hidden by another mount, or of a store that lay there before
            continue
        device = os.fstat(fd).st_dev
        os.close(fd)
        if f"{os.major(device)}:{os.minor(device)}" == mount.device:
            return mount.mountpoint
    return None


def make_mount(store: str, group: str, scratch: Scratch | None) -> str:
    """Mounts the store at a place of its own. What a failure leaves is for `tidy`.

    Raises:
        PitfsError: the mount failed; what mount.pitfs said.
    """
    os.makedirs(DIRECTORY, 0o700, exist_ok=True)
    mountpoint = tempfile.mkdtemp(prefix=f"{group}.", dir=DIRECTORY)
    command = [sys.executable, "-P", "-m", "pitfs.cli.mount", store, mountpoint]
    if scratch is not None:
        directory = scratch.directory
        if directory is None:
            directory = _scratch_of(mountpoint)
            os.mkdir(directory, 0o700)
        command += ["-o", f"scratch={directory}" + (f",scratch_size={scratch.size}" if scratch.size else "")]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False,
        text=True, errors="surrogateescape", start_new_session=True,
    )  # fmt: skip
    said = done.stderr.strip().replace("mount.pitfs: ", "")
    if done.returncode:
        failure = PitfsError(said or f"{store}: mount.pitfs ended with {done.returncode}")
        failure.exit_code = done.returncode if done.returncode in (1, 2) else 1
        raise failure
    if said:
        print(f"pitfs: {said}", file=sys.stderr)
    return mountpoint


def tidy() -> list[str]:
    """Takes down the mounts that attach has made and no loop device is over, and their scratch.

    Returns:
        Those that stay because a process uses them.
    """
    used = {image.mount.mountpoint for image in image_loops() if image.mount is not None}
    stay = []
    with contextlib.suppress(FileNotFoundError):
        for name in sorted(os.listdir(DIRECTORY)):
            mountpoint = f"{DIRECTORY}/{name}"
            if mountpoint in used:
                continue
            if not _unmount(mountpoint):
                stay.append(mountpoint)
                continue
            with contextlib.suppress(OSError):  # somebody has put something in it, or it isn't ours at all
                os.rmdir(mountpoint)
            _remove_scratch(_scratch_of(mountpoint))
    return stay


def _unmount(mountpoint: str) -> bool:
    """Unmounts whatever is there and waits for its daemon's end; False if a process is in it."""
    daemons = _daemons(mountpoint)
    deadline = time.monotonic() + END_S
    while any(mount.mountpoint == mountpoint for mount in mounts()):
        lazily = ["--lazy"] if is_dead(mountpoint) else []
        done = subprocess.run(
            ["umount", "--internal-only", *lazily, "--", mountpoint],
            capture_output=True, text=True, check=False, start_new_session=True,
        )  # fmt: skip
        # A device that was detached a moment ago is let go of a little later.
        if done.returncode and (users_below(mountpoint) or time.monotonic() > deadline):
            return False
        if done.returncode:
            time.sleep(POLL_S)
    while set(daemons) & set(_daemons(mountpoint)) and time.monotonic() < deadline:
        time.sleep(POLL_S)  # it throws scratch away last
    return True


def _daemons(mountpoint: str) -> list[int]:
    """Processes that were started to serve a mount there: a place that attach has made is in no other command."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/cmdline", "rb") as file:
                if os.fsencode(mountpoint) in file.read().split(b"\0"):
                    found.append(int(name))
    return found


def _scratch_of(mountpoint: str) -> str:
    return SCRATCH + os.path.basename(mountpoint)


def _remove_scratch(directory: str) -> None:
    """Removes it and what is in it; the mount's daemon may just be doing so as well."""
    deadline = time.monotonic() + END_S
    while os.path.lexists(directory):
        shutil.rmtree(directory, ignore_errors=True)
        if not os.path.lexists(directory):
            return
        if time.monotonic() > deadline:
            print(f"pitfs: {directory}: can't be removed: remove it by hand", file=sys.stderr)
            return
        time.sleep(POLL_S)
