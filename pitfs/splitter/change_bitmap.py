"""The change bitmap: which blocks may differ from the state at a position while the journal doesn't tell.

While writes pass the splitter marks here what they touch. When they are journalled again a copy of these blocks alone
leads on from that state: COPY_START says how long the bitmaps are, COPY_BLOCKS records behind it have them, so that
they are durable with it and go with it. While such a copy runs what is written is marked as well: were the copy given
up (writes pass once more), the one after it must have all of it.

A bitmap is compressed (Roaring): in each 65536 blocks it takes 2 bytes for each marked block, or 4 for each run, and
8 KiB at most, which is a bit for each block: 32 MiB for 1 TiB in blocks of 4 KiB at the worst. Beyond the limit of
`changes_limit_bytes` nothing is remembered any more, and a complete copy follows.

The file `changes` of a state directory has them while the splitter is down: msgpack of `_File`. It counts only if it
is what the progress, written behind it, names by its xxh3_64.
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
UNMEASURED: Final = 1 << 18  # marked blocks, at some 2 bytes each, between two looks at the size
MARK_WEIGHT: Final = 32  # and a mark counts for so many, as it may begin a container


def changes_limit_bytes(capacity_bytes: int) -> int:
    """What all bitmaps of a group may take: they must fit into the segment in which their copy begins.

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
        """Marks blocks [first, first + count); False where that takes too much: it is all to be forgotten then."""
        self.bitmaps[volume].add_range(first, first + count)
        self._unmeasured += count + MARK_WEIGHT
        return self._unmeasured < UNMEASURED or self.fits()

    def add(self, bitmaps: Sequence[BitMap64]) -> bool:
        """Marks all of these as well; as `mark`."""
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


def size_bytes(bitmaps: Sequence[BitMap64], volumes: Sequence[Volume]) -> int:
    """Bytes of the marked blocks."""
    return sum(len(bits) * volume.block_size for bits, volume in zip(bitmaps, volumes, strict=True))


# In the journal.


def pieces(bitmaps: Sequence[bytes]) -> Iterator[tuple[int, int, bytes]]:
    """Encoded bitmaps as (volume, offset, body) of COPY_BLOCKS records."""
    for volume, encoded in enumerate(bitmaps):
        for at in range(0, len(encoded), MAX_MESSAGE_BYTES):
            yield volume, at, encoded[at : at + MAX_MESSAGE_BYTES]


class Pieces:
    """Puts the bitmaps of a copy of changes together again, from the records behind its COPY_START."""

    def __init__(self, start: CopyStart) -> None:
        self._sizes = start.bitmap_bytes
        self._encoded = [bytearray() for _ in self._sizes]

    def take(self, record: Record) -> None:
        """The next record; those that are no COPY_BLOCKS are passed over."""
        if record.kind is RecordKind.COPY_BLOCKS and record.volume < len(self._encoded):
            self._encoded[record.volume] += record.covered

    def bitmaps(self, where: str) -> list[BitMap64]:
        """Of each volume. Raises CorruptionError (`where`: the journal) if a piece is missing."""
        if tuple(len(encoded) for encoded in self._encoded) != self._sizes:
            raise CorruptionError(where, 0, "the list of changed blocks behind a COPY_START isn't whole")
        return [BitMap64.deserialize(bytes(encoded)) for encoded in self._encoded]


# While the splitter is down.


class _File(msgspec.Struct, frozen=True):
    """`bitmaps`: of each volume, as Roaring writes it (its portable 64-bit format)."""

    format: int
    base: tuple[int, int]
    bitmaps: tuple[bytes, ...]


def keep_changes(state: str, changes: ChangeBitmap) -> int:
    """Makes them durable; what the progress is to name them by. Raises OSError."""
    encoded = tuple(bitmap.serialize() for bitmap in changes.bitmaps)
    content = msgspec.msgpack.encode(_File(FORMAT, changes.base, encoded))
    durable_replace(os.path.join(state, FILE), content)
    return xxh3_64_intdigest(content)


def kept_changes(state: str, checksum: int, volume_count: int, limit_bytes: int) -> ChangeBitmap | None:
    """Those that the progress names by `checksum`; None, for a complete copy, where the file isn't that one."""
    path = os.path.join(state, FILE)
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        log.warning("%s: %s: a complete copy follows", path, error.strerror)
        return None
    if xxh3_64_intdigest(content) != checksum:
        log.warning("%s: isn't what was written when the splitter stopped: a complete copy follows", path)
        return None
    found = msgspec.msgpack.decode(content, type=_File)
    if found.format != FORMAT or len(found.bitmaps) != volume_count:
        log.warning("%s: was written by another pitfs: a complete copy follows", path)
        return None
    return ChangeBitmap(found.base, [BitMap64.deserialize(encoded) for encoded in found.bitmaps], limit_bytes)


def forget_changes(state: str) -> None:
    """Removes what the progress names no more. Raises OSError."""
    with suppress(FileNotFoundError):
        os.unlink(os.path.join(state, FILE))
