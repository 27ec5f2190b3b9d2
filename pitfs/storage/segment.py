"""Segments of the local journal: files of one size that hold records back to back.

A segment begins with a header of 4096 bytes, little-endian:

    offset size
     0      8   magic        "PITFSJNL"
     8      4   version      1
    12      4   reserved     0
    16      8   number       1, 2, 3, … without gaps; the file's name is it in hex
    24      8   seed         seeds the checksums of its records, drawn anew for each use of the file
    32      8   first_lsn    lsn of its first record
    40      8   size_bytes   of the whole file
    48     16   history      which group's history it belongs to
    64      8   checksum     xxh3_64 of bytes 0..64
    72   4024   zeros

Segments are recycled: a released one is renamed and gets a new header. Its blocks are allocated and written
already, so fdatasync has no metadata of the file system to write (measured: half the time of a file that grows).
"""

from __future__ import annotations

import errno
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from xxhash import xxh3_64_intdigest

from pitfs.errors import CorruptionError, PitfsError, StoreVersionError
from pitfs.model import record as records
from pitfs.model.record import HEADER_BYTES, Record, RecordKind, decode_head, packed_checksums
from pitfs.storage.files import closed_on_error, read_exactly, storage_error

HEADER: Final = struct.Struct("<8sIIQQQQ16s")
MAGIC: Final = b"PITFSJNL"
VERSION: Final = 1
DATA_OFFSET: Final = 4096
_CHECKSUM: Final = struct.Struct("<Q")
_NAME: Final = re.compile(r"segment-([0-9a-f]{16})\.journal")
_SCAN_BYTES: Final = 256 << 10  # heads are read in pieces of this size
_MAX_HEAD_BYTES: Final = HEADER_BYTES + records.MAX_MESSAGE_BYTES
_OF_THE_PROCESS: Final = frozenset({errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EPERM})
assert HEADER.size == 64


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    number: int
    seed: int
    first_lsn: int
    size_bytes: int
    history: bytes  # 16 bytes

    def encode(self) -> bytes:
        """The 4096 bytes at the beginning of the file."""
        numbers = self.number, self.seed, self.first_lsn, self.size_bytes
        head = HEADER.pack(MAGIC, VERSION, 0, *numbers, self.history)
        return (head + _CHECKSUM.pack(xxh3_64_intdigest(head))).ljust(DATA_OFFSET, b"\0")

    @classmethod
    def decode(cls, data: bytes, what: str) -> SegmentHeader:
        """Raises CorruptionError, or StoreVersionError where a newer pitfs wrote it."""
        magic, version, _, number, seed, first_lsn, size_bytes, history = HEADER.unpack_from(data)
        (checksum,) = _CHECKSUM.unpack_from(data, HEADER.size)
        if magic != MAGIC or checksum != xxh3_64_intdigest(data[: HEADER.size]):
            raise CorruptionError(what, 0, "no header of a journal segment")
        if version != VERSION:
            problem = f"journal of format {version}, this pitfs knows {VERSION}: use a newer pitfs"
            raise StoreVersionError(f"{what}: {problem}")
        return cls(number, seed, first_lsn, size_bytes, history)


def segment_name(number: int) -> str:
    return f"segment-{number:016x}.journal"


def segment_path(directory: str, number: int) -> str:
    return os.path.join(directory, segment_name(number))


def segment_number(name: str) -> int | None:
    """The number in a segment's file name, None for other files."""
    match = _NAME.fullmatch(name)
    return None if match is None else int(match[1], 16)


def list_segments(directory: str) -> list[int]:
    """Numbers of the segments in `directory`, ascending."""
    return sorted(number for name in os.listdir(directory) if (number := segment_number(name)) is not None)


class SegmentReader:
    """Reads one segment's records, while another process may append to it.

    Args:
        path: the segment's file.

    Raises:
        CorruptionError, StoreVersionError: the header isn't one.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        with closed_on_error(os.open(path, os.O_RDONLY | os.O_CLOEXEC)) as self.fd:
            self.header = SegmentHeader.decode(read_exactly(self.fd, DATA_OFFSET, 0, path), path)

    def close(self) -> None:
        os.close(self.fd)

    def heads(self, offset: int = DATA_OFFSET, end: int | None = None) -> Iterator[tuple[int, Record]]:
        """Yields (offset, record) from `offset` on until `end` or SEAL; contents are neither read nor verified.

        Raises:
            CorruptionError: there is no record of this segment at an offset. That is the journal's end, if this is
                the last segment and `end` isn't given; else it is damage.
        """
        limit = self.header.size_bytes if end is None else end
        base, piece = offset, b""
        while offset < limit:
            if offset - base + _MAX_HEAD_BYTES > len(piece):
                base, piece = offset, os.pread(self.fd, _SCAN_BYTES, offset)
            try:
                record = decode_head(piece, offset - base, self.header.seed, self.path, base)
            except IndexError:
                raise CorruptionError(self.path, offset, "the file ends inside a record") from None
            yield offset, record
            if record.kind is RecordKind.SEAL:
                return
            offset += record.size_bytes

    def verified_contents(self, offset: int, record: Record) -> bytes:
        """The record's contents. Raises CorruptionError if a block isn't what was written, or the file is too short."""
        size = record.size_bytes - record.contents_offset
        data = read_exactly(self.fd, size, offset + record.contents_offset, self.path)
        if not record.block_count or len(data) % record.block_count:
            raise CorruptionError(self.path, offset, "contents that aren't whole blocks")
        if packed_checksums(data, len(data) // record.block_count) != record.covered:
            raise CorruptionError(self.path, offset, "a block doesn't match its checksum")
        return data

    def records_after(self, offset: int) -> Iterator[Record]:
        """Every good record behind a bad one at `offset`, wherever it stands: to tell a torn end from damage."""
        step, overlap = 4 << 20, HEADER_BYTES + records.MAX_BODY_BYTES
        position = offset + 1
        while position < self.header.size_bytes:
            piece = os.pread(self.fd, step + overlap, position)
            at = piece.find(records.MAGIC)
            while 0 <= at < step:
                try:
                    record = decode_head(piece, at, self.header.seed, self.path, position)
                except (CorruptionError, IndexError):
                    at = piece.find(records.MAGIC, at + 1)
                else:
                    yield record
                    at = piece.find(records.MAGIC, at + record.size_bytes)
            position += max(step, at)


def segment_error(error: OSError, path: str, offset: int) -> PitfsError:
    """What to raise where a segment is unreadable: it is damaged, so what it held must come from elsewhere.

    Not so where this process lacks memory, descriptors or rights: the segment is whole then.
    """
    if error.errno in _OF_THE_PROCESS:
        return storage_error(error, path, "reading the journal")
    return CorruptionError(path, offset, f"it can't be read: {os.strerror(error.errno or errno.EIO)}")


def is_blank(path: str) -> bool:
    """Whether no header was ever written to the file."""
    with open(path, "rb") as file:
        return not any(file.read(DATA_OFFSET))
