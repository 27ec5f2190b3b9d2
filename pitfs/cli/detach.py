"""`pitfs detach`: undoes what `pitfs attach` has made for a device."""

from __future__ import annotations

import argparse
import os
from typing import Final

from pitfs.cli.common.output import warn
from pitfs.errors import PitfsError, UsageError
from pitfs.fuse.attach.attachments import attach_lock, signals_deferred, unmount_unused
from pitfs.fuse.attach.images import image_of
from pitfs.fuse.kernel.loop_devices import detach, device_named, loop_of
from pitfs.fuse.kernel.mountinfo import mounts
from pitfs.fuse.kernel.processes import processes_below

DESCRIPTION: Final = (
    "Detaches a loop device over an image. Unmounts the store if attach mounted it and nobody else uses the "
    "mount, and throws away what was written to a scratch image."
)
EXAMPLES: Final = "example:\n  pitfs detach /dev/loop1"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("device", metavar="DEVICE", help="the device that attach has printed, such as /dev/loop1")


def run(args: argparse.Namespace) -> int:
    device = device_named(args.device)
    with attach_lock():
        loop = loop_of(device)
        if loop is None:
            with signals_deferred():
                unmount_unused()  # after a bare `losetup --detach` the mount below is still there
            problem = "nothing is attached there (any more)" if os.path.exists(device) else "no such device"
            raise PitfsError(f"{args.device}: {problem}: pitfs attach --list shows what is attached")
        image = image_of(loop, mounts())
        if image is None:
            raise UsageError(
                f"{args.device}: not attached by pitfs: it is over {loop.backing}; "
                "if it is yours, losetup --detach does it"
            )
        detach(loop)
        with signals_deferred():
            busy = unmount_unused()
    if image.mount is not None and image.mount.mountpoint in busy:
        mountpoint = image.mount.mountpoint
        users = ", ".join(map(str, processes_below(mountpoint))) or "somebody"
        warn(f"{device} is detached; {mountpoint} stays mounted while {users} uses it")
    return 0
