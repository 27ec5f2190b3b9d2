"""Which loop devices are over images of pitfs mounts.

A loop device belongs to pitfs if its backing file is an image in a mount of a store, whoever attached it. The
file is recognised by its path, which /sys gives even where the mount's daemon is dead or hangs; asking the
device for its file's inode would ask the daemon. A mount that was taken down lazily has no mountpoint any
more: the path then begins at the root of the mount, /INSTANT/VOLUME.img.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

from pitfs.fuse.kernel.loop_devices import LoopDevice, loop_devices
from pitfs.fuse.kernel.mountinfo import MountInfo, mounts
from pitfs.fuse.mount.request import FSTYPE
from pitfs.model.position import parse_instant


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


def image_loops() -> list[ImageLoop]:
    """All loop devices over images of pitfs mounts."""
    mounted = list(mounts())
    return [image for loop in loop_devices() if (image := image_of(loop, mounted)) is not None]


def image_of(loop: LoopDevice, mounted: Iterable[MountInfo]) -> ImageLoop | None:
    """The image that the device is over; None if it is over something else. `mounted`: topmost last."""
    around = [each for each in mounted if loop.backing.startswith(each.mountpoint.rstrip("/") + "/")]
    mount = max(reversed(around), key=lambda each: len(each.mountpoint), default=None)
    if mount is None or mount.type != FSTYPE:
        mount = None
    elif not mount.whole:
        return None
    match loop.backing[len(mount.mountpoint) if mount is not None else 0 :].split("/"):
        case "", instant, name if parse_instant(instant) is not None and name.endswith(".img"):
            # Only a file with such a name is asked for, since another dead mount's could hang.
            if mount is not None or not os.path.lexists(loop.backing):
                return ImageLoop(loop, mount, instant, name.removesuffix(".img"))
    return None
