"""What is mounted where, by /proc/self/mountinfo: a mount itself would hang with its daemon."""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from pitfs.errors import PitfsError
from pitfs.fuse.kernel.processes import run

DEAD_ERRNOS: Final = (errno.ENOTCONN, errno.ECONNABORTED)  # of a FUSE mount whose daemon is gone

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MountInfo:
    """One line of mountinfo.

    Attributes:
        device: of what is mounted, like 0:52 or 7:1.
        type: like fuse.pitfs.
        whole: all of the filesystem is mounted, not a directory in it (a bind mount).
    """

    mountpoint: str
    device: str
    type: str
    source: str
    read_only: bool
    whole: bool


def _unescape(field: str) -> str:
    """Octal escapes of white space and backslashes, proc(5)."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def escaped(field: str) -> str:
    """The field with white space and backslashes escaped, as the kernel and libmount write it."""
    return "".join(f"\\{ord(char):03o}" if char in " \t\n\\" else char for char in field)


def mounts() -> Iterator[MountInfo]:
    """All mounts of this namespace; of several at one place the topmost comes last."""
    # A carriage return ends no line: the kernel escapes spaces, tabs, line feeds and backslashes, nothing else.
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        yield from parse(file)


def parse(lines: Iterable[str]) -> Iterator[MountInfo]:
    """The mounts in lines of mountinfo."""
    for line in lines:
        before, _, after = line.partition(" - ")
        _, _, device, root, mountpoint, options, *_ = before.split(" ")
        type_, source, *_ = after.split(" ")
        read_only = "ro" in options.split(",")
        yield MountInfo(_unescape(mountpoint), device, type_, _unescape(source), read_only, root == "/")


def in_real_directory(path: str) -> str:
    """`path` without links in its parent's path: the last part may be a dead mount, which mustn't be asked."""
    parent, name = os.path.split(os.path.abspath(path))
    return os.path.join(os.path.realpath(parent), name)


def mounted_at(path: str) -> MountInfo | None:
    """The topmost mount exactly at `path`, None if there is none."""
    wanted = in_real_directory(path)
    return next((mount for mount in reversed(list(mounts())) if mount.mountpoint == wanted), None)


def is_dead(path: str) -> bool:
    """Whether a FUSE mount's daemon is gone. Opened, not stat'ed: attributes may still be in the kernel's cache."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    except OSError as error:
        return error.errno in DEAD_ERRNOS
    return False


def clear_dead_mount(path: str, type_: str, source: str) -> bool:
    """Unmounts what killed daemons of the same type and source left at `path`; returns whether there was any.

    Raises:
        PitfsError: umount refuses.
    """
    cleared = False
    while (mount := mounted_at(path)) and (mount.type, mount.source) == (type_, source) and is_dead(path):
        done = run(["umount", "-l", "--", path])
        if done.returncode:
            raise PitfsError(f"{path}: {done.stderr.strip()}: clear the dead mount with: umount -l {path}")
        log.info("%s: cleared the mount that a killed pitfs left there", path)
        cleared = True
    return cleared
