"""What stands in the file of a holder (see `store.holders`): the instants that it holds.

A holder's file is 33 pages of 4096 bytes, little-endian, each ending in the xxh3_64 of what stands before it:

    page 0: offset size
              0     8   magic      "PITFSHLD"
              8     4   version    1
             12     4   pid
             16     8   since_ns   UTC
             24     8   unlisted   pins that found no room in the pages below
             32    16   seq, time_ns of the least of them since there were none
             48    16   the same of the greatest
             64     2   bytes of what
             66         what it is, UTF-8: "mount /mnt/db1"
    page 1 to 32: 170 × (seq, time_ns, count), int64 each; a count of 0 is room. A page of zeros is empty.

An instant stands in the page that its seq hashes to, so a pin reads and writes one page, and the file has a fixed
size: 5,440 instants. Where there are unlisted ones, everything between the least and the greatest is held; so is
everything where a page can't be read. Pages are written whole, under the lock.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from pitfs.errors import CorruptionError
from pitfs.model.position import Position
from pitfs.storage.files import read_exactly
from pitfs.store.objects.format import MAX_SEQ

MAGIC: Final = b"PITFSHLD"
VERSION: Final = 1
PAGE_BYTES: Final = 4096  # written in one go: a page of the kernel's cache
BODY_BYTES: Final = PAGE_BYTES - 8
PAGES: Final = 32
ENTRIES: Final = 170
MAX_LISTED: Final = PAGES * ENTRIES
FILE_BYTES: Final = PAGE_BYTES * (1 + PAGES)
HEADER: Final = struct.Struct("<8sIIqqqqqqH")
_CHECKSUM: Final = struct.Struct("<Q")
MAX_WHAT_BYTES: Final = BODY_BYTES - HEADER.size
_NO_PINS: Final = bytes(PAGE_BYTES)
assert HEADER.size == 66 and ENTRIES * 24 <= BODY_BYTES

Entries = npt.NDArray[np.int64]  # [170, 3]: seq, time_ns, count


@dataclass(frozen=True, slots=True)
class Unlisted:
    """Instants that a holder holds without listing them: everything from `least` through `greatest` is held."""

    count: int  # pins, not instants
    least: Position
    greatest: Position


@dataclass(frozen=True, slots=True)
class PinnedInstants:
    """A living holder and what it holds."""

    pid: int
    what: str
    since_ns: int
    instants: tuple[Position, ...]  # by seq, each once, at most MAX_LISTED
    unlisted: Unlisted | None = None


EVERYTHING: Final = Unlisted(0, Position(0, 0), Position(MAX_SEQ, (1 << 63) - 1))


def read(fd: int, name: str) -> PinnedInstants:
    """What a holder's file says; what can't be read of it is taken to hold everything."""
    unlisted = None
    try:
        body = read_page(fd, 0, name)
        magic, version, pid, since_ns, count, *bounds, what_bytes = HEADER.unpack_from(body)
        if magic != MAGIC or version != VERSION:
            raise CorruptionError(name, 0, "no holder's file of this version")
        what = body[HEADER.size : HEADER.size + what_bytes].decode("utf-8", "replace")
        if count:
            unlisted = Unlisted(count, Position(*bounds[:2]), Position(*bounds[2:]))
    except (OSError, CorruptionError):
        number = name.partition("-")[0]
        return PinnedInstants(int(number) if number.isdecimal() else 0, f"unreadable: {name}", 0, (), EVERYTHING)
    instants = []
    for page in range(1, 1 + PAGES):
        try:
            entries = entries_in(read_page(fd, page, name))
        except (OSError, CorruptionError):
            unlisted = EVERYTHING
            continue
        instants += [Position(seq, time_ns) for seq, time_ns, count in entries.tolist() if count]
    return PinnedInstants(pid, what, since_ns, tuple(sorted(instants)), unlisted)


def sealed(body: bytes) -> bytes:
    """A page: the body, zeros, the checksum of both."""
    body = body.ljust(BODY_BYTES, b"\0")
    return body + _CHECKSUM.pack(xxh3_64_intdigest(body))


def read_page(fd: int, page: int, what: str) -> bytes:
    """The body of a page. Raises CorruptionError where it isn't what was written."""
    data = read_exactly(fd, PAGE_BYTES, page * PAGE_BYTES, what)
    body = data[:BODY_BYTES]
    if data != _NO_PINS and _CHECKSUM.unpack_from(data, BODY_BYTES)[0] != xxh3_64_intdigest(body):
        raise CorruptionError(what, page * PAGE_BYTES, "a page doesn't match its checksum")
    return body


def entries_in(body: bytes) -> Entries:
    return np.frombuffer(bytearray(body[: ENTRIES * 24]), "<i8").astype(np.int64, copy=False).reshape(ENTRIES, 3)
