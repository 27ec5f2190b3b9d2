"""What a mount of a store is: the request for one, and the names under which the kernel's tables have it."""

from __future__ import annotations

import dataclasses
import datetime
import os
from typing import Final

SUBTYPE: Final = "pitfs"
FSTYPE: Final = f"fuse.{SUBTYPE}"
MAX_WORKERS: Final = 16
DEFAULT_WORKERS: Final = 2  # at most, and not more than there are cores: each has caches of its own


@dataclasses.dataclass(frozen=True, slots=True)
class MountRequest:
    """What to mount, where and how.

    Attributes:
        mode: of images; a directory can be entered by those who may read it.
        kernel_options: of mount(8), passed on as they are.
        scratch: the directory of the overlays that make images writable; None: they are read-only.
        scratch_size_bytes: how much may be written to all images together; None: what the disk has.
        scratch_keep: whether overlays stay after the mount.
        workers: processes that serve the mount.
    """

    store: str
    mountpoint: str
    uid: int = 0
    gid: int = 0
    mode: int = 0o400
    zone: datetime.tzinfo = datetime.UTC
    strict: bool = False
    allow_other: bool = False
    kernel_options: tuple[str, ...] = ()
    scratch: str | None = None
    scratch_size_bytes: int | None = None
    scratch_keep: bool = False
    workers: int = dataclasses.field(
        default_factory=lambda: min(len(os.sched_getaffinity(0)), DEFAULT_WORKERS)
    )
    foreground: bool = False
    verbose: bool = False


def source_name(store: str) -> str:
    """The store's path as the mount's source: in ASCII, which is what pyfuse3 passes on."""
    return os.fsencode(store).decode("ascii", "backslashreplace")
