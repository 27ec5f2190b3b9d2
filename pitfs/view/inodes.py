"""Inode numbers of a mount's tree. Nothing is counted or stored: a number says all there is to know about its entry.

    bits 60..63  0
    bits 56..59  kind
    bits 46..55  volume of an image; directories between a link and the root
    bits  0..45  seq; day or minute since 1970; which of the fixed entries
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

from pitfs.model import group
from pitfs.model.position import DAY_NS, MINUTE_NS, format_instant

SEQ_BITS: Final = 46  # 70,000,000,000,000 writes: 22 years of 100,000 a second
MAX_SEQ: Final = (1 << SEQ_BITS) - 1
MAX_VOLUMES: Final = 1 << 10
assert group.MAX_VOLUMES <= MAX_VOLUMES
KIND_SHIFT: Final = 56
INSTANT_BYTES: Final = len(format_instant(0))  # of the name of an instant


class NoEntryError(Exception):
    """There is nothing of that name or number (any more)."""


class InodeKind(enum.IntEnum):
    FIXED = 0
    INSTANT = 1
    IMAGE = 2
    LINK = 3
    DAY = 4
    MINUTE = 5


ROOT_INODE: Final = 1
LATEST_INODE: Final = 2
BOOKMARKS_INODE: Final = 3
TIMES_INODE: Final = 4


class EntryType(enum.Enum):
    DIRECTORY = 1
    FILE = 2
    LINK = 3


@dataclass(frozen=True, slots=True)
class TreeEntry:
    """An entry's attributes, as for stat(2).

    Attributes:
        mtime_ns: the instant, for what belongs to one; else the newest instant.
        permanent: it will never be anything else under this name.
    """

    inode: int
    type: EntryType
    mtime_ns: int
    size: int = 0
    nlink: int = 1
    permanent: bool = False


def pack_inode(kind: InodeKind, minor: int, major: int) -> int:
    return kind << KIND_SHIFT | minor << SEQ_BITS | major


def unpack_inode(inode: int) -> tuple[InodeKind, int, int]:
    """(kind, volume or depth, seq or number).

    Raises:
        NoEntryError: no entry has such a number.
    """
    try:
        kind = InodeKind(inode >> KIND_SHIFT)
    except ValueError:
        raise NoEntryError from None
    return kind, inode >> SEQ_BITS & (MAX_VOLUMES - 1), inode & MAX_SEQ


def instant_entry(seq: int, time_ns: int) -> TreeEntry:
    return TreeEntry(pack_inode(InodeKind.INSTANT, 0, seq), EntryType.DIRECTORY, time_ns, nlink=2, permanent=True)


def link_entry(seq: int, time_ns: int, depth: int) -> TreeEntry:
    """A link to an instant from `depth` directories below the root."""
    size = len("../") * depth + INSTANT_BYTES
    return TreeEntry(pack_inode(InodeKind.LINK, depth, seq), EntryType.LINK, time_ns, size)


def image_entry(seq: int, time_ns: int, volume: int, size_bytes: int) -> TreeEntry:
    inode = pack_inode(InodeKind.IMAGE, volume, seq)
    return TreeEntry(inode, EntryType.FILE, time_ns, size_bytes, permanent=True)


def day_entry(day: int) -> TreeEntry:
    return TreeEntry(pack_inode(InodeKind.DAY, 0, day), EntryType.DIRECTORY, day * DAY_NS)


def minute_entry(minute: int) -> TreeEntry:
    return TreeEntry(pack_inode(InodeKind.MINUTE, 0, minute), EntryType.DIRECTORY, minute * MINUTE_NS)
