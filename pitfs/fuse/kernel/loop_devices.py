"""Loop devices, by the kernel's tables: which there are over what, attaching, detaching, who uses one."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from pitfs.errors import PitfsError, UsageError
from pitfs.fuse.kernel.mountinfo import mounts
from pitfs.fuse.kernel.processes import processes_opening, run

LOOP_CLR_FD: Final = 0x4C01  # linux/loop.h
SECTOR_BYTES: Final = 512  # the kernel's unit of sizes, whatever the device's sectors are
MAX_SECTOR_BYTES: Final = 4096
NODES_S: Final = 3.0  # for the nodes of partitions, which devtmpfs or udev make a little later
RELEASE_S: Final = 3.0  # for a program that opens each new device for a moment (udev, blkid) to close it
POLL_S: Final = 0.02

_HEAD_BYTES: Final = 8192  # in which partition tables tell their sector size
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


def loop_devices() -> list[LoopDevice]:
    """All loop devices in use, in the order of their numbers."""
    return [loop for name in _numbered("/sys/block", "loop") if (loop := loop_of(f"/dev/{name}")) is not None]


def _numbered(directory: str, prefix: str) -> list[str]:
    """Names in the directory that are the prefix and a number, by number."""
    names = [name for name in os.listdir(directory) if re.fullmatch(rf"{prefix}[0-9]+", name)]
    return sorted(names, key=lambda name: (len(name), name))


def loop_of(device: str) -> LoopDevice | None:
    """The loop device /dev/loopN; None if it isn't in use."""
    try:
        backing = _attribute(device, "loop/backing_file").removesuffix(_DELETED)
        return LoopDevice(device, backing, _attribute(device, "ro") == "1")
    except OSError:  # detached meanwhile
        return None


def sector_size_for(head: bytes) -> int:
    """The sector size, in bytes, that a device over an image with these first bytes needs.

    A GPT counts in sectors of the disk that it was written on; nothing else needs more than 512 bytes.
    """
    sizes = (SECTOR_BYTES, MAX_SECTOR_BYTES)
    return next((size for size in sizes if head[size : size + 8] == b"EFI PART"), SECTOR_BYTES)


def sector_size_of(image: str) -> int:
    """What a device over the image needs; that of most where its head can't be read: the rest may still be needed."""
    try:
        with open(image, "rb", buffering=0) as file:
            return sector_size_for(file.read(_HEAD_BYTES))
    except OSError:
        return SECTOR_BYTES


# ------------------------------------------------------------------ attaching


def attach(path: str, *, read_only: bool, sector_size: int) -> str:
    """Makes a loop device over the file, with direct I/O; returns /dev/loopN (then `wait_for_partitions`).

    Raises:
        PitfsError: there is no free one, or the kernel refuses.
    """
    command = ["losetup", "--find", "--show", "--direct-io=on", "--partscan", f"--sector-size={sector_size}"]
    done = run([*command, *(["--read-only"] if read_only else []), "--", path])
    if done.returncode:
        lines = done.stderr.strip().splitlines()[-1:] or [f"losetup ended with {done.returncode}"]
        hint = ": see what holds the others: losetup --list" if "unused" in lines[0] else ""
        raise PitfsError(f"{path}: {lines[0].removeprefix('losetup: ').removeprefix(f'{path}: ')}{hint}")
    device = done.stdout.strip()
    # The kernel thinks that an image can be punched. Tried in vain, mkfs would say that discarding failed.
    path = f"/sys/block/{os.path.basename(device)}/queue/discard_max_bytes"
    with contextlib.suppress(OSError), open(path, "w", encoding="ascii") as file:
        file.write("0")
    return device


def partitions(device: str) -> list[str]:
    """Paths of the device's partitions, in their order; their nodes may not be there yet."""
    name = os.path.basename(device)
    with contextlib.suppress(FileNotFoundError):
        return [f"/dev/{entry}" for entry in _numbered(f"/sys/block/{name}", f"{name}p")]
    return []


def wait_for_partitions(device: str) -> list[str]:
    """Waits for the nodes of a new device's partitions; returns those that don't appear."""
    if not partitions(device):
        # The kernel may have no parser for this kind of partition table. It fails if there is no table.
        run(["partx", "--add", "--", device])
    missing: list[str] = []
    for _ in polls(NODES_S):
        missing = [path for path in partitions(device) if not os.path.exists(path)]
        if not missing:
            break
    return missing


def has_direct_io(device: str) -> bool:
    return _attribute(device, "loop/dio") == "1"


def filesystems(device: str) -> list[tuple[str, str]]:
    """(device, type as blkid says it) of the filesystem on the device, or of those on its partitions."""
    probe = ["blkid", "--probe", "--usages", "filesystem", "--output", "value", "--match-tag", "TYPE"]
    found = ((path, run([*probe, path]).stdout.strip()) for path in partitions(device) or [device])
    return [(path, kind) for path, kind in found if kind]


# ------------------------------------------------------------------ who uses one


def mountpoints_of(loop: LoopDevice) -> list[str]:
    """Where the device's filesystem or those of its partitions are mounted (in this namespace)."""
    paths = [loop.device, *partitions(loop.device)]  # compared too: btrfs has device numbers of its own
    devices = set()
    for path in paths:
        with contextlib.suppress(OSError):
            devices.add(_attribute(path, "dev"))
    return [mount.mountpoint for mount in mounts() if mount.device in devices or mount.source in paths]


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


def _openers(device: str) -> list[str]:
    """Other processes that have the device or one of its partitions open."""
    return list(map(str, processes_opening([device, *partitions(device)])))


# ------------------------------------------------------------------ detaching


def detach(loop: LoopDevice) -> None:
    """Detaches a device that nobody uses; returns when it is free.

    Raises:
        PitfsError: the device is in use; names by whom, and what to do.
    """
    for _ in polls(RELEASE_S):
        if _clear_backing(loop.device):
            break
        if reason := _why_busy(loop):
            raise PitfsError(f"{loop.device}: {reason}")
    else:
        raise PitfsError(f"{loop.device}: in use, perhaps mounted in another mount namespace: lsns")
    # The kernel frees it at the last close: that was ours, unless another process opened it just now.
    for _ in polls(RELEASE_S):
        if loop_of(loop.device) != loop:
            return
    openers = ", ".join(_openers(loop.device)) or "the process that has it open"
    raise PitfsError(f"{loop.device}: goes when it is closed by {openers}")


def _clear_backing(device: str) -> bool:
    """Has the kernel drop the backing file; False if another process has the device open."""
    try:
        # Exclusive: fails while it or a partition is mounted, swapped to or under another device, anywhere.
        fd = os.open(device, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.EBUSY:
            return False
        raise
    try:
        if _openers(device):
            return False
        fcntl.ioctl(fd, LOOP_CLR_FD)
    except OSError as error:
        if error.errno != errno.ENXIO:  # another process has done it
            raise
    finally:
        os.close(fd)
    return True


def _why_busy(loop: LoopDevice) -> str:
    """Who uses the device for more than a moment, and what to do; empty if nobody is found."""
    if places := mountpoints_of(loop):
        return f"mounted on {', '.join(places)}: unmount first: umount {' '.join(places)}"
    if holders := kernel_holders(loop.device):
        return f"in use by {', '.join(holders)}: remove that first"
    if openers := _openers(loop.device):
        return f"opened by {', '.join(openers)}: end that first"
    return ""


def device_named(text: str) -> str:
    """/dev/loopN for a device as the user writes it.

    Raises:
        UsageError: it is no loop device.
    """
    device = os.path.realpath(text if "/" in text else f"/dev/{text}")
    if match := re.fullmatch(r"(/dev/loop[0-9]+)p[0-9]+", device):
        raise UsageError(f"{text}: a partition of {match[1]}: give that")
    if not re.fullmatch(r"/dev/loop[0-9]+", device):
        raise UsageError(f"{text}: not a loop device: pitfs attach --list shows what is attached")
    return device


def polls(timeout_s: float) -> Iterator[None]:
    """Yields until the time is over, with pauses: at least once."""
    deadline = time.monotonic() + timeout_s
    yield
    while time.monotonic() <= deadline:
        time.sleep(POLL_S)
        yield


def _attribute(device: str, name: str) -> str:
    """What sysfs says of a block device or partition."""
    path = f"/sys/class/block/{os.path.basename(device)}/{name}"
    with open(path, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        return file.read().removesuffix("\n")
