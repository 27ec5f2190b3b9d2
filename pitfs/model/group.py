"""A group's identity: names, volumes and the limits that every room holds them to. Pure.

Names of groups, volumes and bookmarks become files and paths (INTERFACE), so one rule serves the configuration, the
command line, the wire and the store.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final, Protocol

from pitfs.errors import UsageError
from pitfs.model.position import reads_as_time

NAME_RULE: Final = "1 to 64 of A-Z a-z 0-9 . _ - (not '.' or '..')"
NAME_PATTERN: Final = r"\A(?!\.{1,2}\Z)[A-Za-z0-9._-]{1,64}\Z"
BLOCK_SIZES: Final = tuple(1 << bits for bits in range(9, 17))  # 512 B … 64 KiB
MAX_VOLUMES: Final = 256  # each costs a descriptor and a map of its own on both sides
MAX_VOLUME_BYTES: Final = 1 << 45  # 32 TiB: what a pointer of the store reaches in one object

_NAME: Final = re.compile(NAME_PATTERN)
_HISTORY: Final = re.compile(r"[0-9a-f]{32}")


class Volume(Protocol):
    """What `model.transfer.VolumeInfo` has; that module brings numpy, and commands start without it."""

    @property
    def name(self) -> str: ...
    @property
    def size_bytes(self) -> int: ...
    @property
    def block_size(self) -> int: ...


def is_name(text: str) -> bool:
    """Whether it can name a group, a volume or a bookmark."""
    return _NAME.match(text) is not None


def check_new_bookmark(name: str) -> None:
    """Raises UsageError for what can't name a bookmark, or says a time: there it would mean that time."""
    if not is_name(name):
        raise UsageError(f"bookmark {name[:80]!r}: not a name: must be {NAME_RULE}")
    if reads_as_time(name):
        raise UsageError(f"bookmark {name!r}: reads as a time: choose another name, as before-upgrade")


def identity_problem(group: str, history: str, volumes: Sequence[Volume]) -> str | None:
    """What is wrong with a group's description, which comes from a peer or a file and names a directory."""
    if not is_name(group):
        return f"group name {group[:80]!r}: must be {NAME_RULE}"
    if not _HISTORY.fullmatch(history):
        return f"history {history[:40]!r}: must be 32 lower-case hex digits"
    if not 1 <= len(volumes) <= MAX_VOLUMES:
        return f"{len(volumes)} volumes: must be 1 to {MAX_VOLUMES}"
    if len({volume.name for volume in volumes}) != len(volumes):
        return "two volumes of the same name"
    for volume in volumes:
        if not is_name(volume.name):
            return f"volume name {volume.name[:80]!r}: must be {NAME_RULE}"
        if volume.block_size not in BLOCK_SIZES:
            return (
                f"volume {volume.name}: block size {volume.block_size}: must be a power of two from "
                f"{BLOCK_SIZES[0]} to {BLOCK_SIZES[-1]}"
            )
        if not 0 < volume.size_bytes <= MAX_VOLUME_BYTES:
            return f"volume {volume.name}: size of {volume.size_bytes} bytes: must be 1 byte to 32 TiB"
    return None
