"""`pitfs detach`: undoes what `pitfs attach` has made for a device."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any, Final

from pitfs.errors import PitfsError, UsageError

NAME: Final = "detach"


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    parser = subparsers.add_parser(
        NAME,
        help="undo what attach did for a device",
        description="Detaches a loop device that is over an image, unmounts the store where attach had mounted it and "
        "nobody else needs that, and throws away what was written to a scratch image.",
        epilog="""\
examples:
  pitfs detach /dev/loop1""",
    )
    parser.add_argument("device", metavar="DEVICE", help="the device that attach has printed, such as /dev/loop1")


def run(args: argparse.Namespace) -> int:
    from pitfs.fuse.attach.attachments import attach_lock, is_made_by_attach, signals_deferred, unmount_unused
    from pitfs.fuse.attach.images import image_of
    from pitfs.fuse.kernel.loop_devices import detach, device_named, loop_of
    from pitfs.fuse.kernel.mountinfo import mounts
    from pitfs.fuse.kernel.processes import processes_below

    device = device_named(args.device)
    with attach_lock():
        loop = loop_of(device)
        if loop is None:
            with signals_deferred():
                unmount_unused()  # after a bare `losetup --detach` the mount below is still there
            if not os.path.exists(device):
                raise PitfsError(f"{args.device}: no such device: pitfs attach --list shows what is attached")
            raise PitfsError(f"{args.device}: nothing is attached there (any more): see pitfs attach --list")
        image = image_of(loop, mounts())
        if image is None:
            raise UsageError(
                f"{args.device}: not attached by pitfs: it is over {loop.backing}; "
                "if it is yours, losetup --detach does it"
            )
        detach(loop)
        with signals_deferred():
            busy = unmount_unused()
    if image.mount is not None and is_made_by_attach(image.mount) and image.mount.mountpoint in busy:
        place = image.mount.mountpoint
        who = ", ".join(map(str, processes_below(place))) or "somebody"
        print(f"pitfs: {device} is detached; {place} stays mounted while {who} uses it", file=sys.stderr)
    return 0
