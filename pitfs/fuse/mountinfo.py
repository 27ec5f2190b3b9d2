"""What is mounted where, from /proc/self/mountinfo: asking the mount itself would hang on a dead one."""

from __future__ import annotations

import errno
import logging
import os
import re
import subprocess
from dataclasses import dataclass

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MountInfo:
    """One line of mountinfo. `type` is like fuse.pitfs; `device` like 0:52."""

    mountpoint: str
    device: str
    type: str
    source: str


def _unescape(field: str) -> str:
    """Octal escapes of white space and backslashes, proc(5)."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def mounted_at(path: str) -> MountInfo | None:
    """The topmost mount exactly at `path`, None if there is none."""
    wanted = os.path.realpath(os.path.dirname(os.path.abspath(path)))
    wanted = os.path.join(wanted, os.path.basename(os.path.abspath(path)))
    found = None
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            before, _, after = line.partition(" - ")
            fields, kind = before.split(), after.split()
            if _unescape(fields[4]) == wanted:
                found = MountInfo(wanted, fields[2], kind[0], _unescape(kind[1]))
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
