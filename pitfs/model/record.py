"""The record of the local journal: its format, encoding, decoding and verification. Pure.

The local journal (580 of figure 5) is a chain of segments, which hold records back to back.
A record is a header of 64 bytes and a body, little-endian:

    offset size
     0      4   magic         "PJR1"
     4      1   kind          RecordKind
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
Body of MARK, COPY_START and COPY_PROGRESS: a message (msgpack), all of it under the checksum.
Body of COPY_BLOCKS: a part of the encoded bitmap of `volume`; `block` is its offset in bytes. SEAL has no body.

A recycled segment still holds records of its former use. They fail verification, since each use has a seed of its
own, so nothing needs to be erased. durable_lsn tells a torn end from damage without another write: if a record
fails verification, and a good one behind it says that it was durable, it was damaged; else power was lost there.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import ClassVar, Final

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


class Mark(msgspec.Struct, frozen=True):
    """Message of MARK: number `mark`, at position (seq of the record, position_time_ns).

    bookmark: the position's name, if it was given one.
    """

    kind: ClassVar = RecordKind.MARK
    mark: int
    position_time_ns: int
    bookmark: str | None = None


class CopyStart(msgspec.Struct, frozen=True):
    """Message of COPY_START: mark `mark` is the state at (seq, time_ns) of the record.

    cause: why there is a gap between (from_seq, from_time_ns) and it; empty for the first copy.
    bitmap_bytes: empty for a full sync. Else the copy has only the blocks that may differ from the state at
        (from_seq, from_time_ns), and these are the sizes of the volumes' encoded bitmaps in COPY_BLOCKS.
    """

    kind: ClassVar = RecordKind.COPY_START
    mark: int
    from_seq: int
    from_time_ns: int
    cause: str = ""
    bitmap_bytes: tuple[int, ...] = ()

    @property
    def is_complete(self) -> bool:
        return not self.bitmap_bytes


class CopyProgress(msgspec.Struct, frozen=True):
    """Message of COPY_PROGRESS: the replica has all volumes before `volume`, and its blocks before `block`.

    The copy is complete when `volume` is the number of volumes.
    """

    kind: ClassVar = RecordKind.COPY_PROGRESS
    mark: int
    volume: int
    block: int


Message = Mark | CopyStart | CopyProgress
_MESSAGES: Final = {each.kind: msgspec.msgpack.Decoder[Message](each) for each in (Mark, CopyStart, CopyProgress)}


@dataclass(frozen=True, slots=True)
class Record:
    """A record without its contents.

    Attributes:
        covered: what the record's checksum covers of the body: xxh3_64 of each block (WRITE, BEFORE_IMAGE),
            or all of it (other kinds).
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

    @property
    def message(self) -> Message | None:
        """The body of MARK, COPY_START and COPY_PROGRESS; None for the other kinds."""
        decoder = _MESSAGES.get(self.kind)
        return None if decoder is None else decoder.decode(self.covered)


def encode_head(
    kind: int, volume: int, block: int, block_count: int, seq: int, time_ns: int, lsn: int, durable_lsn: int,
    covered: bytes, contents_size: int, seed: int,
) -> bytes:  # fmt: skip
    """Header of a record and the covered part of its body (checksums or message). Contents follow unencoded."""
    body_size = len(covered) + contents_size
    head = HEADER.pack(MAGIC, kind, 0, volume, block_count, body_size, block, seq, time_ns, lsn, durable_lsn)
    return head + CHECKSUM.pack(xxh3_64_intdigest(head + covered, seed)) + covered


def decode_head(data: bytes | memoryview, offset: int, seed: int, what: str, position: int) -> Record:
    """Decodes and verifies the record at `offset` of `data`, which needn't have its contents.

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
    sizes = HEADER_BYTES + covered_size, HEADER_BYTES + body_size
    return Record(RecordKind(kind), volume, block, block_count, seq, time_ns, lsn, durable_lsn, covered, *sizes)


def packed_checksums(contents: bytes | bytearray | memoryview, block_size: int) -> bytes:
    """xxh3_64 of each block of `contents`, as a record's body has them."""
    if len(contents) == block_size:
        return CHECKSUM.pack(xxh3_64_intdigest(contents))
    checksums = block_checksums(contents, block_size)
    return struct.pack(f"<{len(checksums)}Q", *checksums)


def block_checksums(contents: bytes | bytearray | memoryview, block_size: int) -> list[int]:
    """xxh3_64 of each block of `contents`, whole blocks."""
    if len(contents) == block_size:
        return [xxh3_64_intdigest(contents)]
    view = memoryview(contents)
    return [xxh3_64_intdigest(view[at : at + block_size]) for at in range(0, len(view), block_size)]
