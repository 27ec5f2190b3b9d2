"""The change bitmap: which blocks may differ from the state at a position, where the journal doesn't say.

While writes bypass the journal, the splitter marks here the blocks that they touch. When writes are journalled again,
a copy of these blocks alone leads on from that state. COPY_START has the size of the encoded bitmaps, and COPY_BLOCKS
records behind it have the bitmaps: so they become durable with it, and are removed with it. While such a copy runs,
writes are marked as well: if it is given up for another bypass, the next copy must have all of these blocks.

A bitmap is compressed (Roaring): for each 65536 blocks it takes 2 bytes for each marked block, or 4 for each run, and
8 KiB at most, which is a bit for each block: 32 MiB for 1 TiB in blocks of 4 KiB at the worst. Beyond
`bitmap_limit_bytes` it is dropped, and a complete copy follows.

While the splitter is down, the file `changes` of the state directory has the bitmaps: msgpack of `_File`. It is valid
only if the checkpoint, written behind it, has its xxh3_64.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Final

import msgspec
from pyroaring import BitMap64
from xxhash import xxh3_64_intdigest

from pitfs.errors import CorruptionError
from pitfs.journal.writer import segment_bytes_for
from pitfs.model.bitmap import bitmap_bytes
from pitfs.model.record import MAX_MESSAGE_BYTES, CopyStart, Record, RecordKind
from pitfs.splitter.volume import Volume
from pitfs.storage.files import durable_replace

log = logging.getLogger(__name__)

FORMAT: Final = 1
FILE: Final = "changes"
UNMEASURED: Final = 1 << 18  # marked blocks, at some 2 bytes each, between two measurements of the size
MARK_WEIGHT: Final = 32  # blocks that a mark counts for besides its own, as it may begin a container


def bitmap_limit_bytes(capacity_bytes: int) -> int:
    """Limit of all bitmaps of a group: they must fit into the segment in which their copy begins.

    A quarter of one: 16 MiB (500 GiB of volumes in blocks of 4 KiB, however strewn) with 1 GiB of journal and more.
    """
    return segment_bytes_for(capacity_bytes) // 4


class ChangeBitmap:
    """Blocks that may differ from the state at `base`.

    Args:
        base: (seq, time_ns).
        bitmaps: of each volume, in blocks.
        limit_bytes: of all bitmaps together.
    """

    def __init__(self, base: tuple[int, int], bitmaps: list[BitMap64], limit_bytes: int) -> None:
        self.base = base
        self.bitmaps = bitmaps
        self._limit_bytes = limit_bytes
        self._unmeasured = 0

    def mark(self, volume: int, first: int, count: int) -> bool:
        """Marks blocks [first, first + count); False where the bitmap is beyond its limit and must be dropped."""
        self.bitmaps[volume].add_range(first, first + count)
        self._unmeasured += count + MARK_WEIGHT
        return self._unmeasured < UNMEASURED or self.fits()

    def add(self, bitmaps: Sequence[BitMap64]) -> bool:
        """Marks all of these blocks as well; as `mark`."""
        for mine, others in zip(self.bitmaps, bitmaps, strict=True):
            mine |= others
        return self.fits()

    def fits(self) -> bool:
        """Whether the bitmaps are within the limit."""
        self._unmeasured = 0
        if bitmap_bytes(self.bitmaps) <= self._limit_bytes:
            return True
        for bitmap in self.bitmaps:
            bitmap.run_optimize()
        return bitmap_bytes(self.bitmaps) <= self._limit_bytes


def marked_bytes(bitmaps: Sequence[BitMap64], volumes: Sequence[Volume]) -> int:
    """Bytes of the marked blocks."""
    return sum(len(bits) * volume.block_size for bits, volume in zip(bitmaps, volumes, strict=True))


def split_bitmaps(bitmaps: Sequence[bytes]) -> Iterator[tuple[int, int, bytes]]:
    """Encoded bitmaps as (volume, offset, body) of COPY_BLOCKS records."""
    for volume, encoded in enumerate(bitmaps):
        for at in range(0, len(encoded), MAX_MESSAGE_BYTES):
            yield volume, at, encoded[at : at + MAX_MESSAGE_BYTES]


class BitmapAssembler:
    """Joins the bitmaps of a copy of changes again, from the COPY_BLOCKS records behind its COPY_START."""

    def __init__(self, start: CopyStart) -> None:
        self._sizes = start.bitmap_bytes
        self._encoded = [bytearray() for _ in self._sizes]

    def add(self, record: Record) -> None:
        """Takes the next record; only a COPY_BLOCKS counts."""
        if record.kind is RecordKind.COPY_BLOCKS and record.volume < len(self._encoded):
            self._encoded[record.volume] += record.covered

    def bitmaps(self, where: str) -> list[BitMap64]:
        """The bitmap of each volume. Raises CorruptionError, of the journal `where`, if a part is missing."""
        if tuple(len(encoded) for encoded in self._encoded) != self._sizes:
            raise CorruptionError(where, 0, "the list of changed blocks behind a COPY_START isn't whole")
        return [BitMap64.deserialize(bytes(encoded)) for encoded in self._encoded]


class _File(msgspec.Struct, frozen=True):
    """`bitmaps`: of each volume, as Roaring writes it (its portable 64-bit format)."""

    format: int
    base: tuple[int, int]
    bitmaps: tuple[bytes, ...]


def save_bitmap(state: str, changes: ChangeBitmap) -> int:
    """Writes the file durably, and returns its xxh3_64 for the checkpoint. Raises OSError."""
    encoded = tuple(bitmap.serialize() for bitmap in changes.bitmaps)
    content = msgspec.msgpack.encode(_File(FORMAT, changes.base, encoded))
    durable_replace(os.path.join(state, FILE), content)
    return xxh3_64_intdigest(content)


def load_bitmap(state: str, checksum: int, volume_count: int, limit_bytes: int) -> ChangeBitmap | None:
    """The bitmap of the file that a checkpoint has the xxh3_64 of; None, for a complete copy, where it isn't there."""
    path = os.path.join(state, FILE)
    try:
        with open(path, "rb") as file:
            content = file.read()
        if xxh3_64_intdigest(content) == checksum:
            found = msgspec.msgpack.decode(content, type=_File)
            if found.format == FORMAT and len(found.bitmaps) == volume_count:
                bitmaps = [BitMap64.deserialize(encoded) for encoded in found.bitmaps]
                return ChangeBitmap(found.base, bitmaps, limit_bytes)
            problem = "was written by another pitfs"
        else:
            problem = "isn't what was written when the splitter stopped"
    except OSError as error:
        problem = str(error.strerror)
    log.warning("%s: %s: a full sync follows", path, problem)
    return None


def remove_bitmap(state: str) -> None:
    """Removes the file, which no checkpoint has the xxh3_64 of any more. Raises OSError."""
    with suppress(FileNotFoundError):
        os.unlink(os.path.join(state, FILE))
