"""The overlay of a writable image: which blocks were written, and the log of them on disk.

An overlay lies over an image. A block that was written is in the overlay, whole; every other block is in the image
below. A block never leaves the overlay, so its index is a log of the runs of blocks that came to it, each once. The log
needs no compaction; an fsync adds one record with what is new since the last one.

The log is a file of a header of 128 bytes and records, little-endian:

    offset size
     0      8   magic        "PITFSOVL"
     8      4   version      1
    12      4   block_size   bytes
    16      8   size_bytes   of the volume
    24      8   seq          of the image below
    32     16   history      of the store
    48     64   volume       its name, padded with zeros
   112      8   checksum     xxh3_64 of bytes 0..112
   120      8   zeros

    record
     0      4   magic        "OVLR"
     4      4   run_count    1 to 65536
     8      8   checksum     xxh3_64 of run_count (u32) and runs, seeded with the header's checksum plus the offset
    16      16n runs         first block (u64), block count (u64); ascending, not touching each other

A record is durable before the next one is written, and after the blocks that it names. So a power cut tears only the
last record, of an fsync that was not answered: it is cut. A bad record with a good one behind it is damage.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from pyroaring import BitMap64
from xxhash import xxh3_64_intdigest

from pitfs.errors import CorruptionError, StoreVersionError
from pitfs.model.transfer import VolumeInfo

MAGIC: Final = b"PITFSOVL"
VERSION: Final = 1
HEADER: Final = struct.Struct("<8sIIQQ16s64s")
CHECKSUM: Final = struct.Struct("<Q")
HEADER_BYTES: Final = 128
assert HEADER.size == 112

RECORD_MAGIC: Final = b"OVLR"
RECORD: Final = struct.Struct("<4sIQ")
RUN_BYTES: Final = 16
MAX_RUNS: Final = 1 << 16
MAX_RECORD_BYTES: Final = RECORD.size + MAX_RUNS * RUN_BYTES
assert RECORD.size == 16

Runs = npt.NDArray[np.uint64]  # shape (n, 2): first block, block count


@dataclass(frozen=True, slots=True)
class OverlayHeader:
    """The image below an overlay. `history` is 16 bytes."""

    history: bytes
    seq: int
    volume: VolumeInfo

    def encode(self) -> bytes:
        """The 128 bytes at the beginning of the log."""
        of_volume = self.volume.block_size, self.volume.size_bytes
        head = HEADER.pack(MAGIC, VERSION, *of_volume, self.seq, self.history, self.volume.name.encode())
        return (head + CHECKSUM.pack(xxh3_64_intdigest(head))).ljust(HEADER_BYTES, b"\0")

    @classmethod
    def decode(cls, data: bytes, what: str) -> OverlayHeader:
        """Raises CorruptionError, or StoreVersionError where a newer pitfs wrote it."""
        head = data[: HEADER.size]
        is_whole = len(data) >= HEADER_BYTES and data.startswith(MAGIC)
        if not is_whole or CHECKSUM.unpack_from(data, HEADER.size) != (xxh3_64_intdigest(head),):
            raise CorruptionError(what, 0, "no header of an overlay")
        _, version, block_size, size_bytes, seq, history, volume = HEADER.unpack(head)
        if version != VERSION:
            raise StoreVersionError(
                f"{what}: overlay of format {version}, this pitfs knows {VERSION}: use a newer pitfs"
            )
        name = volume.rstrip(b"\0").decode("ascii", "replace")
        return cls(history, seq, VolumeInfo(name, size_bytes, block_size))

    @property
    def seed(self) -> int:
        """Seeds the checksums of the records, so that those of another overlay are not accepted."""
        return xxh3_64_intdigest(self.encode()[: HEADER.size])


def runs_of(blocks: BitMap64) -> Runs:
    """The blocks as runs, ascending, coalesced; shape (n, 2)."""
    numbers = np.array(blocks.to_array(), np.uint64)
    begins = np.flatnonzero(np.diff(numbers, prepend=numbers[:1]) != 1)  # the first one too: 0 isn't 1
    lengths = np.diff(begins, append=len(numbers)).astype(np.uint64)
    return np.column_stack((numbers[begins], lengths))


def runs_within(blocks: BitMap64, first: int, last: int) -> list[tuple[int, int]]:
    """Runs [start, end) of those blocks that are within [first, last), ascending, coalesced."""
    return [
        (start, start + count) for start, count in runs_of(blocks & BitMap64(range(first, last))).tolist()
    ]


def encode_records(runs: Runs, seed: int, offset: int) -> Iterator[bytes]:
    """Records with all of the runs, one behind the other from `offset` of the log on."""
    for start in range(0, len(runs), MAX_RUNS):
        part = runs[start : start + MAX_RUNS]
        body = part.astype("<u8").tobytes()
        checksum = _checksum(len(part), body, seed, offset)
        record = RECORD.pack(RECORD_MAGIC, len(part), checksum) + body
        yield record
        offset += len(record)


def decode_record(
    data: bytes | memoryview, seed: int, offset: int, block_count: int
) -> tuple[Runs, int] | None:
    """The record at the beginning of `data`, which stands at `offset` of the log: its runs and its size in bytes.

    None if no whole record of this log begins there.
    """
    if len(data) < RECORD.size:
        return None
    magic, count, checksum = RECORD.unpack_from(data)
    size = RECORD.size + count * RUN_BYTES
    if magic != RECORD_MAGIC or not 0 < count <= MAX_RUNS or len(data) < size:
        return None
    body = bytes(data[RECORD.size : size])
    if checksum != _checksum(count, body, seed, offset):
        return None
    runs = np.frombuffer(body, "<u8").reshape(count, 2)
    first, length = runs[:, 0], runs[:, 1]
    total = np.uint64(block_count)
    if (length == 0).any() or (first >= total).any() or (length > total - first).any():
        return None
    return runs, size


def _checksum(count: int, body: bytes, seed: int, offset: int) -> int:
    return xxh3_64_intdigest(count.to_bytes(4, "little") + body, (seed + offset) % 2**64)
