"""Mounting the splitter's file system: the mountpoint before it, loop devices over its files behind it."""

from __future__ import annotations

import os
from typing import Final

import pyfuse3

from pitfs.errors import UsageError
from pitfs.fuse.kernel.loop_devices import LoopDevice, loop_devices
from pitfs.fuse.kernel.mountinfo import clear_dead_mount, is_dead, mounted_at

FILE_SYSTEM: Final = "pitfs-splitter"


def prepare_mountpoint(mountpoint: str, group: str) -> None:
    """Makes the mountpoint if it is missing, and clears the dead mount of a killed splitter of this group.

    Raises:
        UsageError: it isn't a directory, or something else is mounted on it.
    """
    clear_dead_mount(mountpoint, f"fuse.{FILE_SYSTEM}", _source(group))
    if is_dead(mountpoint):
        dead = mounted_at(mountpoint)
        what = f"a dead mount of {dead.source} is there" if dead else "lies on a mount whose program is gone"
        raise UsageError(f"{mountpoint}: mountpoint: {what}: clear it with 'umount -l {mountpoint}'")
    try:
        os.makedirs(mountpoint, exist_ok=True)
    except FileExistsError:
        problem = "not a directory: give one, or a path to make one at"
        raise UsageError(f"{mountpoint}: mountpoint: {problem}") from None
    except OSError as error:
        raise UsageError(f"{mountpoint}: mountpoint: can't be made: {os.strerror(error.errno or 0)}") from error
    present = mounted_at(mountpoint)
    if present is not None:
        raise UsageError(
            f"{mountpoint}: mountpoint: busy: {present.source} is mounted there: unmount it first (umount {mountpoint})"
        )


def mount_splitter(operations: pyfuse3.Operations, mountpoint: str, group: str) -> None:
    """Mounts; requests are answered once `pyfuse3.main` runs.

    Raises:
        UsageError: the kernel refuses.
    """
    try:
        pyfuse3.init(operations, mountpoint, {f"fsname={_source(group)}", f"subtype={FILE_SYSTEM}"})
    except (RuntimeError, OSError) as error:
        problem = f"can't be mounted: {error}: is /dev/fuse there, and are you root?"
        raise UsageError(f"{mountpoint}: {problem}") from error


def _source(group: str) -> str:
    return f"{FILE_SYSTEM}:{group}"


def attached_loops(mountpoint: str) -> list[LoopDevice]:
    """The loop devices over files of the mount."""
    return [loop for loop in loop_devices() if os.path.dirname(loop.backing) == mountpoint]
