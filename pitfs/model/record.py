"""The record of the local journal: its format, encoding, decoding and verification. Pure.

The local journal (580 of figure 5) is a chain of segments; in each, records stand one behind the other.
A record is a header of 64 bytes and a body, little-endian:

    offset size
     0      4   magic         "PJR1"
     4      1   kind          Kind
     5      1   flags         0
     6      2   volume        index of the volume in the group
     8      4   block_count   blocks in the body, 0 where the body is a message
    12      4   body_size     bytes after the header
    16      8   block         first block
    24      8   seq           the write's seq; else seq of the last write before the record
    32      8   time_ns       UTC; strictly increasing over WRITE, MARK and COPY_START records
    40      8   lsn           number of the record, 1, 2, 3, … without gaps over all kinds
    48      8   durable_lsn   every record up to this lsn was on disk when this one was made
    56      8   checksum      xxh3_64 of bytes 0..56 and of the body without its contents,
                              seeded with the segment's own seed

Body of WRITE and BEFORE_IMAGE: one xxh3_64 (8 bytes) for each block, then the blocks' contents, whole. A
BEFORE_IMAGE without contents: all of its blocks are zeros.
Body of the other kinds: a message (msgpack), all of it under the checksum; of COPY_BLOCKS a piece of the bitmap of
`volume`, in order, `block` being its offset in bytes.

The seed makes records that a recycled segment still holds from its former life fail verification, so the
tail needs no erasing. durable_lsn tells a tear from damage without another write: a record that can't be
verified, followed by a good one that says it had been durable, is damage; else it is where power was lost.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Final

import msgspec
from xxhash import xxh3_64_intdigest

from pitfs.errors import CorruptionError

HEADER: Final = struct.Struct("<4sBBHIIQQqQQ")  # all but the checksum
CHECKSUM: Final = struct.Struct("<Q")
HEADER_BYTES: Final = HEADER.size + CHECKSUM.size
MAGIC: Final = b"PJR1"
MAX_WRITE_BYTES: Final = 1 << 20  # the kernel's largest FUSE write
MAX_MESSAGE_BYTES: Final = 1 << 16
# A write of the greatest size that touches two more blocks at its edges, of the smallest or largest size.
MAX_BODY_BYTES: Final = MAX_WRITE_BYTES + 2 * 65536 + 8 * (MAX_WRITE_BYTES // 512 + 2)
assert HEADER_BYTES == 64


class RecordKind(enum.IntEnum):
    WRITE = 1
    BEFORE_IMAGE = 2  # content of blocks as the running copy must still see them (copy before write)
    MARK = 3  # the interval closes here
    COPY_START = 4  # a copy of the state at this position begins
    COPY_PROGRESS = 5  # the replica has it durably up to here
    SEAL = 6  # the segment ends; the next one goes on
    COPY_BLOCKS = 7  # behind a COPY_START: which blocks it is a copy of


_KINDS: Final = frozenset(RecordKind)
_WITH_BLOCKS: Final = frozenset({RecordKind.WRITE, RecordKind.BEFORE_IMAGE})


@dataclass(frozen=True, slots=True)
class Record:
    """A record without its contents.

    Attributes:
        covered: what the record's checksum covers of the body: xxh3_64 of each block (WRITE, BEFORE_IMAGE),
            or the message (other kinds).
        contents_offset: bytes from the record's beginning to its contents.
        size_bytes: of the whole record.
    """

    kind: RecordKind
    volume: int
    block: int
    block_count: int
    seq: int
    time_ns: int
    lsn: int
    durable_lsn: int
    covered: bytes
    contents_offset: int
    size_bytes: int

    @property
    def checksums(self) -> tuple[int, ...]:
        """xxh3_64 of each block."""
        return struct.unpack(f"<{self.block_count}Q", self.covered)


class Mark(msgspec.Struct, frozen=True):
    """Message of MARK: the interval that ends at position (seq of the record, position_time_ns).

    bookmark: the name that was given to the position, if any.
    """

    mark: int
    position_time_ns: int
    bookmark: str | None = None


class CopyStart(msgspec.Struct, frozen=True):
    """Message of COPY_START: mark `mark` is the state at (seq, time_ns) of the record.

    cause: why what lies between (from_seq, from_time_ns) and it can't be given; empty for the first copy.
    bitmap_bytes: the copy has the blocks alone that may differ from the state at (from_seq, from_time_ns), and leads
        on from that: what their bitmap takes, of each volume, in COPY_BLOCKS. Empty: a complete copy.
    """

    mark: int
    from_seq: int
    from_time_ns: int
    cause: str = ""
    bitmap_bytes: tuple[int, ...] = ()

    @property
    def is_complete(self) -> bool:
        return not self.bitmap_bytes


class CopyProgress(msgspec.Struct, frozen=True):
    """Message of COPY_PROGRESS: volumes before `volume`, and its blocks before `block`, are on the replica.

    volume equal to the number of volumes: the copy is complete.
    """

    mark: int
    volume: int
    block: int


def encode_head(
    kind: int,
    volume: int,
    block: int,
    block_count: int,
    seq: int,
    time_ns: int,
    lsn: int,
    durable_lsn: int,
    covered: bytes,
    contents_size: int,
    seed: int,
) -> bytes:
    """Header and the covered part of the body (checksums or message) of a record; contents follow as they are."""
    head = HEADER.pack(
        MAGIC,
        kind,
        0,
        volume,
        block_count,
        len(covered) + contents_size,
        block,
        seq,
        time_ns,
        lsn,
        durable_lsn,
    )
    return head + CHECKSUM.pack(xxh3_64_intdigest(head + covered, seed)) + covered


def decode_head(data: bytes | memoryview, offset: int, seed: int, what: str, position: int) -> Record:
    """Decodes and verifies the record at `offset` of `data`; its contents needn't be there.

    Args:
        what, position: file and byte of data[0] in it, for the error.

    Raises:
        CorruptionError: these bytes aren't a record of the segment with that seed.
        IndexError: data ends before the covered part does.
    """
    if len(data) - offset < HEADER_BYTES:
        raise IndexError("header beyond the data")
    magic, kind, flags, volume, block_count, body_size, block, seq, time_ns, lsn, durable_lsn = (
        HEADER.unpack_from(data, offset)
    )
    if magic != MAGIC or kind not in _KINDS or flags or body_size > MAX_BODY_BYTES:
        raise CorruptionError(what, position + offset, "no journal record")
    covered_size = 8 * block_count if kind in _WITH_BLOCKS else body_size
    start = offset + HEADER_BYTES
    if covered_size > body_size or (kind not in _WITH_BLOCKS and covered_size > MAX_MESSAGE_BYTES):
        raise CorruptionError(what, position + offset, "journal record with impossible sizes")
    if len(data) < start + covered_size:
        raise IndexError("checksums beyond the data")
    covered = bytes(data[start : start + covered_size])
    (checksum,) = CHECKSUM.unpack_from(data, offset + HEADER.size)
    found = xxh3_64_intdigest(bytes(data[offset : offset + HEADER.size]) + covered, seed)
    if checksum != found:
        raise CorruptionError(
            what, position + offset, f"journal record's checksum {checksum:016x}, found {found:016x}"
        )
    return Record(
        RecordKind(kind),
        volume,
        block,
        block_count,
        seq,
        time_ns,
        lsn,
        durable_lsn,
        covered,
        HEADER_BYTES + covered_size,
        HEADER_BYTES + body_size,
    )


def block_checksums(contents: bytes | bytearray | memoryview, block_size: int) -> list[int]:
    """xxh3_64 of each block of `contents`, whole blocks."""
    if len(contents) == block_size:
        return [xxh3_64_intdigest(contents)]
    view = memoryview(contents)
    return [xxh3_64_intdigest(view[at : at + block_size]) for at in range(0, len(view), block_size)]
