"""The file of a process that pins instants (see `store.pins.pins`).

It has 33 pages of 4096 bytes, little-endian, each ending in the xxh3_64 of what is before it:

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

An instant is in the page that its seq hashes to, so a pin reads and writes one page, and the file has a fixed
size: 5,440 instants. Where there are unlisted pins, everything between the least and the greatest is pinned; so is
everything where a page is unreadable. Pages are written whole, under the lock of the directory.
"""

from __future__ import annotations

import struct
import time
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from pitfs.errors import CorruptionError
from pitfs.model.position import Position
from pitfs.storage.files import read_exactly, write_all
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

_Entries = npt.NDArray[np.int64]  # [170, 3]: seq, time_ns, count


@dataclass(frozen=True, slots=True)
class Unlisted:
    """Pins that aren't listed one by one: everything from `least` through `greatest` is pinned."""

    count: int  # pins, not instants
    least: Position
    greatest: Position


@dataclass(frozen=True, slots=True)
class PinnedInstants:
    """A living process that reads, and what it has pinned."""

    pid: int
    what: str
    since_ns: int
    instants: tuple[Position, ...] = ()  # by seq, each once, at most MAX_LISTED
    unlisted: Unlisted | None = None


EVERYTHING: Final = Unlisted(0, Position(0, 0), Position(MAX_SEQ, (1 << 63) - 1))


class PinFile:
    """The file of one process; every call but `pinned_instants` of an own file needs the lock.

    Args:
        fd: open for reading, and for writing where it is to change; closed by the caller.
        name: for messages; that of a file begins with its pid.

    Raises:
        OSError: the disk refuses.
        CorruptionError: a page isn't what was written. `pinned_instants` raises neither.
    """

    def __init__(self, fd: int, name: str) -> None:
        self._fd, self._name = fd, name

    def make(self, pid: int, what: str) -> None:
        """Writes a file without pins, of its final size: a pin never needs new room on the disk."""
        write_all(self._fd, _sealed(_encode(PinnedInstants(pid, what, time.time_ns()))) + bytes(PAGES * PAGE_BYTES), 0)

    def pin(self, position: Position) -> None:
        page, entries = self._page_of(position.seq)
        found = np.flatnonzero((entries[:, 0] == position.seq) & (entries[:, 2] != 0))
        room = found if len(found) else np.flatnonzero(entries[:, 2] == 0)
        if len(room):
            entries[room[0]] = position.seq, position.time_ns, int(entries[room[0], 2]) + 1
            self._write(page, entries.tobytes())
            return
        header = self._header()
        before = header.unlisted or Unlisted(0, position, position)
        unlisted = Unlisted(before.count + 1, min(before.least, position), max(before.greatest, position))
        self._write(0, _encode(replace(header, unlisted=unlisted)))

    def unpin(self, seq: int) -> None:
        """Takes one pin of that seq back; nothing where there is none."""
        page, entries = self._page_of(seq)
        found = np.flatnonzero((entries[:, 0] == seq) & (entries[:, 2] != 0))
        if len(found):
            entries[found[0], 2] -= 1
            self._write(page, entries.tobytes())
            return
        header = self._header()
        before = header.unlisted
        if before is not None and before.least.seq <= seq <= before.greatest.seq:
            unlisted = replace(before, count=before.count - 1) if before.count > 1 else None
            self._write(0, _encode(replace(header, unlisted=unlisted)))

    def pinned_instants(self) -> PinnedInstants:
        """What the file says. Where a page is unreadable everything counts as pinned."""
        try:
            header = self._header()
        except (OSError, CorruptionError):
            number = self._name.partition("-")[0]
            pid = int(number) if number.isdecimal() else 0
            return PinnedInstants(pid, f"unreadable: {self._name}", 0, (), EVERYTHING)
        instants, unlisted = [], header.unlisted
        for page in range(1, 1 + PAGES):
            try:
                entries = _entries_in(self._read(page))
            except (OSError, CorruptionError):
                unlisted = EVERYTHING
                continue
            instants += [Position(seq, time_ns) for seq, time_ns, count in entries.tolist() if count]
        return replace(header, instants=tuple(sorted(instants)), unlisted=unlisted)

    def _header(self) -> PinnedInstants:
        """Page 0: all but the instants."""
        body = self._read(0)
        magic, version, pid, since_ns, count, *bounds, what_bytes = HEADER.unpack_from(body)
        if magic != MAGIC or version != VERSION:
            raise CorruptionError(self._name, 0, "no file of pins of this version")
        what = body[HEADER.size : HEADER.size + what_bytes].decode("utf-8", "replace")
        unlisted = Unlisted(count, Position(*bounds[:2]), Position(*bounds[2:])) if count else None
        return PinnedInstants(pid, what, since_ns, (), unlisted)

    def _page_of(self, seq: int) -> tuple[int, _Entries]:
        page = 1 + ((seq * 0x9E3779B97F4A7C15 & (1 << 64) - 1) >> 40) % PAGES
        return page, _entries_in(self._read(page))

    def _read(self, page: int) -> bytes:
        """The body of a page."""
        data = read_exactly(self._fd, PAGE_BYTES, page * PAGE_BYTES, self._name)
        body = data[:BODY_BYTES]
        if data != _NO_PINS and _CHECKSUM.unpack_from(data, BODY_BYTES)[0] != xxh3_64_intdigest(body):
            raise CorruptionError(self._name, page * PAGE_BYTES, "a page doesn't match its checksum")
        return body

    def _write(self, page: int, body: bytes) -> None:
        write_all(self._fd, _sealed(body), page * PAGE_BYTES)


def _encode(header: PinnedInstants) -> bytes:
    what = header.what.encode("utf-8", "replace")[:MAX_WHAT_BYTES]
    none = Unlisted(0, Position(0, 0), Position(0, 0))
    unlisted = header.unlisted or none
    return HEADER.pack(
        MAGIC, VERSION, header.pid, header.since_ns, unlisted.count, unlisted.least.seq, unlisted.least.time_ns,
        unlisted.greatest.seq, unlisted.greatest.time_ns, len(what),
    ) + what  # fmt: skip


def _sealed(body: bytes) -> bytes:
    """A page: the body, zeros, the checksum of both."""
    body = body.ljust(BODY_BYTES, b"\0")
    return body + _CHECKSUM.pack(xxh3_64_intdigest(body))


def _entries_in(body: bytes) -> _Entries:
    return np.frombuffer(bytearray(body[: ENTRIES * 24]), "<i8").astype(np.int64, copy=False).reshape(ENTRIES, 3)
