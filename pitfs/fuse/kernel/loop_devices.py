"""Loop devices: which there are and over what, made and let go of. All from the kernel's own tables.

A loop device belongs to pitfs if its backing file is an image in a mount of a store, whoever made it. That file
is told by its path, which /sys gives even where the mount's daemon is dead or hangs; asking the device for its
file's inode would ask the daemon. A mount that was taken down lazily has no place any more: the path then begins
at the root of the tree, /INSTANT/VOLUME.img.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from pitfs.errors import PitfsError, UsageError
from pitfs.fuse.kernel.mountinfo import MountInfo, mounts
from pitfs.fuse.kernel.users import openers
from pitfs.fuse.mount import FSTYPE

LOOP_CLR_FD: Final = 0x4C01  # linux/loop.h
SECTOR_BYTES: Final = 512  # the kernel's unit of sizes, whatever the device's sectors are
MAX_SECTOR_BYTES: Final = 4096
NODES_S: Final = 3.0  # for the nodes of partitions to appear; whoever makes them (devtmpfs, udev) is asynchronous
RELEASE_S: Final = 3.0  # for whoever looks at a new device for a moment (udev, blkid) to be done with it
POLL_S: Final = 0.02

_DETACHED = re.compile(r"/([^/]+)/([^/]+)\.img")
_DELETED: Final = " (deleted)"  # the kernel has dropped the name; the file is there all the same


@dataclass(frozen=True, slots=True)
class LoopDevice:
    """A loop device that has a backing file.

    Attributes:
        device: /dev/loopN.
        backing: the file's path as the kernel knows it, without its mark of a dropped name.
    """

    device: str
    backing: str
    read_only: bool

    @property
    def name(self) -> str:
        return os.path.basename(self.device)


@dataclass(frozen=True, slots=True)
class ImageLoop:
    """A loop device over an image.

    Attributes:
        mount: the store's mount, None where it was taken down lazily, as a dead one is.
        instant: name of the directory in the mount.
    """

    loop: LoopDevice
    mount: MountInfo | None
    instant: str
    volume: str


def loops() -> list[LoopDevice]:
    """All loop devices in use, in the order of their numbers."""
    numbers = [int(name[4:]) for name in os.listdir("/sys/block") if re.fullmatch(r"loop[0-9]+", name)]
    found = (loop_of(f"/dev/loop{number}") for number in sorted(numbers))
    return [loop for loop in found if loop is not None]


def loop_of(device: str) -> LoopDevice | None:
    """The loop device /dev/loopN; None if it isn't in use."""
    directory = f"/sys/block/{os.path.basename(device)}"
    try:
        backing = _read(f"{directory}/loop/backing_file").removesuffix(_DELETED)
        return LoopDevice(device, backing, _read(f"{directory}/ro") == "1")
    except OSError:  # detached meanwhile
        return None


def image_loops() -> list[ImageLoop]:
    """All loop devices over images of pitfs mounts."""
    mounted = list(mounts())
    return [image for loop in loops() if (image := image_of(loop, mounted)) is not None]


def image_of(loop: LoopDevice, mounted: Iterable[MountInfo]) -> ImageLoop | None:
    """The image that the device is over; None if that isn't one."""
    best: MountInfo | None = None
    for mount in mounted:
        within = loop.backing.startswith(mount.mountpoint.rstrip("/") + "/")
        if within and (best is None or len(mount.mountpoint) >= len(best.mountpoint)):
            best = mount
    if best is not None and best.type == FSTYPE:
        parts = loop.backing[len(best.mountpoint) :].strip("/").split("/")
        if best.whole and len(parts) == 2:
            return ImageLoop(loop, best, parts[0], parts[1].removesuffix(".img"))
        return None
    match = _DETACHED.fullmatch(loop.backing)
    if match is None or not _is_instant(match[1]) or os.path.lexists(loop.backing):
        return None
    return ImageLoop(loop, None, match[1], match[2])


def _is_instant(text: str) -> bool:
    return re.fullmatch(r"[0-9]{4}(-[0-9]{2}){2}T([0-9]{2}-){2}[0-9]{2}\.[0-9]{9}Z", text) is not None


def sector_size_for(head: bytes) -> int:
    """The sector size, in bytes, with which an image that begins so must be seen.

    The structures of a GPT lie in sectors of the disk that it was written on; nothing else found on disks
    needs more than 512.
    """
    for size in (SECTOR_BYTES, MAX_SECTOR_BYTES):
        if head[size : size + 8] == b"EFI PART":
            return size
    return SECTOR_BYTES


# ------------------------------------------------------------------ making one


def attach(path: str, *, read_only: bool, sector_size: int) -> str:
    """A new loop device over the file, with direct I/O; returns /dev/loopN. Its partitions: `wait_for_partitions`.

    Raises:
        PitfsError: there is no free one, or the kernel refuses.
    """
    command = ["losetup", "--find", "--show", "--direct-io=on", "--partscan", f"--sector-size={sector_size}"]
    done = _run([*command, *(["--read-only"] if read_only else []), "--", path])
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] or [f"losetup ended with {done.returncode}"]
        hint = ": see what holds the others: losetup --list" if "unused" in said[0] else ""
        raise PitfsError(f"{path}: {said[0].removeprefix('losetup: ').removeprefix(f'{path}: ')}{hint}")
    return done.stdout.strip()


def partitions(device: str) -> list[str]:
    """Paths of the device's partitions, in their order; their nodes may not be there yet."""
    name = os.path.basename(device)
    numbers = []
    with contextlib.suppress(FileNotFoundError):
        for entry in os.listdir(f"/sys/block/{name}"):
            if match := re.fullmatch(rf"{name}p([0-9]+)", entry):
                numbers.append(int(match[1]))
    return [f"{device}p{number}" for number in sorted(numbers)]


def wait_for_partitions(device: str) -> list[str]:
    """Waits for the nodes of a new device's partitions; returns those that don't appear."""
    if not partitions(device):
        # A kernel may have no parser for this kind of table. Fails where there is none: that is as it should be.
        _run(["partx", "--add", "--", device])
    deadline = time.monotonic() + NODES_S
    while True:
        missing = [path for path in partitions(device) if not os.path.exists(path)]
        if not missing or time.monotonic() > deadline:
            return missing
        time.sleep(POLL_S)


def has_direct_io(device: str) -> bool:
    return _read(f"/sys/block/{os.path.basename(device)}/loop/dio") == "1"


def filesystem_on(device: str) -> str:
    """The type of the filesystem on a device or partition as blkid says it, empty if there is none."""
    done = _run(["blkid", "--probe", "--usages", "filesystem", "--output", "value", "--match-tag", "TYPE", device])
    return done.stdout.strip()


# ------------------------------------------------------------------ who uses one


def mountpoints_of(loop: LoopDevice, mounted: Iterable[MountInfo] | None = None) -> list[str]:
    """Where the device's filesystem or those of its partitions are mounted (in this namespace)."""
    devices = set()
    for path in (loop.device, *partitions(loop.device)):
        with contextlib.suppress(OSError):
            devices.add(_read(f"/sys/class/block/{os.path.basename(path)}/dev"))
    sources = {loop.device, *partitions(loop.device)}  # btrfs has device numbers of its own
    return [
        mount.mountpoint
        for mount in (mounts() if mounted is None else mounted)
        if mount.device in devices or mount.source in sources
    ]


def kernel_holders(device: str) -> list[str]:
    """Devices made over it or its partitions (device-mapper, md), and swap on it."""
    found = []
    with open("/proc/swaps", encoding="utf-8", errors="surrogateescape") as file:
        swaps = {line.split()[0] for line in file}
    for path in (device, *partitions(device)):
        with contextlib.suppress(OSError):
            found += [f"/dev/{name}" for name in os.listdir(f"/sys/class/block/{os.path.basename(path)}/holders")]
        if path in swaps:
            found.append(f"swap on {path}")
    return found


# ------------------------------------------------------------------ letting go of one


def detach(loop: LoopDevice) -> None:
    """Detaches a device that nobody uses; returns when it is free.

    Raises:
        PitfsError: somebody uses it; names who, and what to do.
    """
    deadline = time.monotonic() + RELEASE_S
    while not _clear(loop.device):
        said = _in_use(loop)
        if said or time.monotonic() > deadline:
            raise PitfsError(f"{loop.device}: {said or 'in use, perhaps mounted in another mount namespace: lsns'}")
        time.sleep(POLL_S)
    # The last who has it open takes it down; that was us, unless somebody came at this very moment.
    deadline = time.monotonic() + RELEASE_S
    while loop_of(loop.device) == loop:
        if time.monotonic() > deadline:
            who = _joined(str(user) for user in openers([loop.device, *partitions(loop.device)]))
            raise PitfsError(f"{loop.device}: goes when it is closed by {who or 'whoever has it open'}")
        time.sleep(POLL_S)


def _clear(device: str) -> bool:
    """Asks the kernel to let go of the backing file; False if somebody else has the device open."""
    try:
        # Exclusive: fails while it or a partition is mounted, swapped to or under another device, anywhere.
        fd = os.open(device, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.EBUSY:
            return False
        raise
    try:
        if openers([device, *partitions(device)]):
            return False
        fcntl.ioctl(fd, LOOP_CLR_FD)
    except OSError as error:
        if error.errno != errno.ENXIO:  # somebody else has done it
            raise
    finally:
        os.close(fd)
    return True


def _in_use(loop: LoopDevice) -> str:
    """Who uses it for more than a moment, and what to do; empty if nobody is found."""
    places = mountpoints_of(loop)
    if places:
        return f"mounted on {_joined(places)}: unmount first: umount {' '.join(places)}"
    above = kernel_holders(loop.device)
    if above:
        return f"in use by {_joined(above)}: take that down first"
    who = openers([loop.device, *partitions(loop.device)])
    return f"opened by {_joined(map(str, who))}: end that first" if who else ""


def device_named(text: str) -> str:
    """/dev/loopN for what a user calls it.

    Raises:
        UsageError: it is no loop device.
    """
    device = os.path.realpath(text if "/" in text else f"/dev/{text}")
    if match := re.fullmatch(r"(/dev/loop[0-9]+)p[0-9]+", device):
        raise UsageError(f"{text}: a partition of {match[1]}: give that")
    if not re.fullmatch(r"/dev/loop[0-9]+", device):
        raise UsageError(f"{text}: not a loop device: pitfs attach --list shows what is attached")
    return device


def _joined(parts: Iterable[str]) -> str:
    return ", ".join(parts)


def _read(path: str) -> str:
    with open(path, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        return file.read().removesuffix("\n")


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """In a session of its own: Ctrl-C is the caller's, who then knows what was done and undoes it."""
    try:
        return subprocess.run(
            command, capture_output=True, text=True, errors="surrogateescape", check=False, start_new_session=True,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except FileNotFoundError:
        raise PitfsError(f"{command[0]}: not found: install util-linux and mount") from None
