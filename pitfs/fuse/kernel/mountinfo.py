"""What is mounted where, from /proc/self/mountinfo: asking the mount itself would hang on a dead one."""

from __future__ import annotations

import errno
import logging
import os
import re
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MountInfo:
    """One line of mountinfo.

    Attributes:
        device: of what is mounted, like 0:52 or 7:1.
        type: like fuse.pitfs.
        whole: it is all of that, not a directory in it (a bind mount).
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
    """The inverse, as the kernel and libmount write it."""
    return "".join(f"\\{ord(char):03o}" if char in " \t\n\\" else char for char in field)


def mounts() -> Iterator[MountInfo]:
    """All mounts of this namespace; of several at one place the topmost comes last."""
    # A carriage return ends no line: the kernel escapes spaces, tabs, line feeds and backslashes, nothing else.
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape", newline="\n") as file:
        yield from parse(file)


def parse(lines: Iterable[str]) -> Iterator[MountInfo]:
    """The mounts that lines of mountinfo tell of."""
    for line in lines:
        before, _, after = line.partition(" - ")
        fields, kind = before.split(" "), after.split(" ")
        read_only = "ro" in fields[5].split(",")
        mountpoint, source = _unescape(fields[4]), _unescape(kind[1])
        yield MountInfo(mountpoint, fields[2], kind[0], source, read_only, fields[3] == "/")


def mounted_at(path: str) -> MountInfo | None:
    """The topmost mount exactly at `path`, None if there is none."""
    wanted = os.path.realpath(os.path.dirname(os.path.abspath(path)))
    wanted = os.path.join(wanted, os.path.basename(os.path.abspath(path)))
    found = None
    for mount in mounts():
        if mount.mountpoint == wanted:
            found = mount
    return found


def is_dead(path: str) -> bool:
    """Whether a FUSE mount's daemon is gone. Opened, not stat'ed: attributes may still be in the kernel's cache."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    except OSError as error:
        return error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    return False


def clear_dead_mount(path: str, type_: str, source: str) -> bool:
    """Unmounts what a killed daemon of the same type and source left at `path`; whether there was one."""
    cleared = False
    while (
        (mount := mounted_at(path)) is not None
        and (mount.type, mount.source) == (type_, source)
        and is_dead(path)
    ):
        subprocess.run(["umount", "-l", path], check=True, capture_output=True)
        log.info("%s: cleared the mount that a killed pitfs left there", path)
        cleared = True
    return cleared
