"""Which loop devices are over images of pitfs mounts.

A loop device belongs to pitfs if its backing file is an image in a mount of a store, whoever attached it. The
file is recognised by its path, which /sys gives even where the mount's daemon is dead or hangs; asking the
device for its file's inode would ask the daemon. A mount that was taken down lazily has no mountpoint any
more: the path then begins at the root of the mount, /INSTANT/VOLUME.img.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from pitfs.fuse.kernel.loop_devices import LoopDevice, loop_devices
from pitfs.fuse.kernel.mountinfo import MountInfo, mounts
from pitfs.fuse.mount.request import FSTYPE

_DETACHED: Final = re.compile(r"/([0-9]{4}(?:-[0-9]{2}){2}T(?:[0-9]{2}-){2}[0-9]{2}\.[0-9]{9}Z)/([^/]+)\.img")


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
    if mount is not None and mount.type == FSTYPE:
        parts = loop.backing[len(mount.mountpoint) :].strip("/").split("/")
        if mount.whole and len(parts) == 2:
            return ImageLoop(loop, mount, parts[0], parts[1].removesuffix(".img"))
        return None
    match = _DETACHED.fullmatch(loop.backing)
    if match is None or os.path.lexists(loop.backing):
        return None
    return ImageLoop(loop, None, match[1], match[2])
