"""A complete copy of the state at a position, read from the backing volumes while writes go on.

Copy before write: the splitter journals the before-image of a block before it overwrites one that the
replica doesn't durably have. So, after reading a stretch of the backing volume, whatever before-images the
journal holds by then replace what was read: if a block has none, its write hadn't begun when it was read.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from typing import Final

import msgspec
import numpy as np
from xxhash import xxh3_64_intdigest

from pitfs.errors import CorruptionError, PositionMismatchError
from pitfs.model.record import CopyProgress, Kind, Record
from pitfs.model.transfer import (
    DIFF_ENTRY,
    MAX_PAYLOAD_BYTES,
    UNIT_BYTES,
    Checkpoint,
    Data,
    End,
    ResumePoint,
    Section,
    Source,
    TransferFrame,
    VolumeInfo,
)
from pitfs.production.journal import Location, journal_path
from pitfs.production.reader import JournalReader

# What is read before the replica is asked to make it durable: until then its before-images are kept.
CHECKPOINT_BYTES: Final = 8 << 20
CHECKPOINT_SKIPPED_BYTES: Final = 1 << 30  # of holes: no content to send, but progress worth keeping
_PRESERVED: Final = np.dtype(
    [
        ("volume", "<u4"),
        ("block_size", "<u4"),
        ("block", "<i8"),
        ("segment", "<i8"),
        ("offset", "<i8"),
        ("checksum", "<u8"),
    ]
)


class _BeforeImages:
    """Where the before-images of blocks not yet copied stand in the journal; 40 bytes for each."""

    def __init__(self, directory: str, volumes: tuple[VolumeInfo, ...], start: Location, mark: int) -> None:
        self._reader = JournalReader(directory, [volume.block_size for volume in volumes])
        self._reader.seek(start, (0, 0))
        self._directory = directory
        self._volumes = volumes
        self._mark = mark
        self._rows = np.empty(0, dtype=_PRESERVED)
        self.progress = CopyProgress(mark, 0, 0)

    def close(self) -> None:
        self._reader.close()

    def follow(self, until: Location) -> None:
        """Takes in what the splitter preserved until then. Raises CorruptionError."""
        fresh: list[tuple[int, int, int, int, int, int]] = []

        def visit(location: Location, record: Record) -> bool:
            if record.kind is Kind.BEFORE_IMAGE:
                size = self._volumes[record.volume].block_size
                begin = location.offset + record.contents_offset
                for index, checksum in enumerate(record.checksums):
                    offset = begin + index * size
                    fresh.append(
                        (record.volume, size, record.block + index, location.segment, offset, checksum)
                    )
            elif record.kind is Kind.COPY_PROGRESS:
                progress = msgspec.msgpack.decode(record.covered, type=CopyProgress)
                if progress.mark == self._mark:
                    self.progress = progress
            return False

        self._reader.follow(until, visit)
        if fresh:
            self._rows = np.concatenate((self._rows, np.array(fresh, dtype=_PRESERVED)))

    def forget_before(self, volume: int, block: int) -> None:
        """Blocks before that are copied."""
        rows = self._rows
        self._rows = rows[(rows["volume"] > volume) | ((rows["volume"] == volume) & (rows["block"] >= block))]

    def next_block(self, volume: int, block: int) -> int | None:
        """The first preserved block of a volume from `block` on."""
        blocks = self._rows["block"][(self._rows["volume"] == volume) & (self._rows["block"] >= block)]
        return int(blocks.min()) if len(blocks) else None

    def apply(self, volume: int, first: int, buffer: bytearray) -> None:
        """Puts the before-images of blocks in `buffer`, which begins with block `first`, over what was read."""
        block_size = self._volumes[volume].block_size
        rows = self._rows
        end = first + len(buffer) // block_size
        for row in rows[(rows["volume"] == volume) & (rows["block"] >= first) & (rows["block"] < end)]:
            path = journal_path(self._directory, int(row["segment"]))
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                image = os.pread(fd, block_size, int(row["offset"]))
            finally:
                os.close(fd)
            if xxh3_64_intdigest(image) != int(row["checksum"]):
                raise CorruptionError(path, int(row["offset"]), "a before-image doesn't match its checksum")
            at = (int(row["block"]) - first) * block_size
            buffer[at : at + block_size] = image


def frames(
    directory: str,
    volumes: tuple[VolumeInfo, ...],
    backing_fds: list[int],
    start: Location,
    mark: int,
    resume: ResumePoint,
    tail: Callable[[], Location],
) -> Iterator[TransferFrame]:
    """The frames of a complete copy behind what the replica durably has.

    Args:
        directory: of the journal; start: of the COPY_START number `mark` in it.
        backing_fds: of the backing volumes, for reading.
        tail: where the journal's tail is now; blocks.

    Raises:
        CorruptionError: the journal is damaged, or a backing volume ends early.
        PositionMismatchError: the replica has less of the copy than it had acknowledged.
        OSError: a backing volume can't be read.
    """
    images = _BeforeImages(directory, volumes, start, mark)
    try:
        images.follow(tail())
        at_volume, at_block = (resume.cursor[0], resume.cursor[1]) if len(resume.cursor) == 2 else (0, 0)
        if (images.progress.volume, images.progress.block) > (at_volume, at_block):
            raise PositionMismatchError("the replica lost a part of the full copy that it had acknowledged")
        rows_bytes, contents_bytes = resume.lengths[0], resume.lengths[1]
        sent = skipped = 0
        for volume in range(at_volume, len(volumes)):
            block = at_block if volume == at_volume else 0
            while (
                chunk := _next_chunk(volumes[volume], volume, block, backing_fds[volume], images)
            ) is not None:
                first, end = chunk
                buffer = _read(volumes[volume], first, end, backing_fds[volume])
                images.follow(tail())
                images.apply(volume, first, buffer)
                entries, payload = _rows_of(volumes[volume], volume, first, buffer, contents_bytes)
                if len(entries):
                    yield Data(Section.DIFF, rows_bytes, entries.tobytes())
                    yield Data(Section.DIFF_BLOCKS, contents_bytes, payload)
                    rows_bytes, contents_bytes = rows_bytes + entries.nbytes, contents_bytes + len(payload)
                skipped += (first - block) * volumes[volume].block_size
                sent += len(buffer)
                block = end
                if sent >= CHECKPOINT_BYTES or skipped >= CHECKPOINT_SKIPPED_BYTES:
                    sent = skipped = 0
                    images.forget_before(volume, block)
                    yield Checkpoint((volume, block))
        yield End((rows_bytes, contents_bytes, 0, 0, 0))
    finally:
        images.close()


def _next_chunk(
    volume: VolumeInfo, index: int, block: int, fd: int, images: _BeforeImages
) -> tuple[int, int] | None:
    """The next stretch that may hold anything but zeros: blocks [first, end), None at the volume's end."""
    if block >= volume.block_count:
        return None
    first = block
    try:
        first = os.lseek(fd, block * volume.block_size, os.SEEK_DATA) // volume.block_size
    except OSError as error:
        if error.errno == errno.ENXIO:
            first = volume.block_count  # only a hole is left
        elif error.errno != errno.EINVAL:  # a block device: everything is data
            raise
    preserved = images.next_block(index, block)
    if preserved is not None:
        first = min(first, preserved)
    if first >= volume.block_count:
        return None
    return first, min(volume.block_count, first + MAX_PAYLOAD_BYTES // volume.block_size)


def _read(volume: VolumeInfo, first: int, end: int, fd: int) -> bytearray:
    """Blocks [first, end), the last one of the volume padded with zeros."""
    buffer = bytearray((end - first) * volume.block_size)
    offset = first * volume.block_size
    wanted = min(len(buffer), volume.size_bytes - offset)
    if os.preadv(fd, [memoryview(buffer)[:wanted]], offset) != wanted:
        raise CorruptionError(f"backing of volume {volume.name}", offset, "it ends before its size")
    return buffer


def _rows_of(
    volume: VolumeInfo, index: int, first: int, buffer: bytearray, contents_bytes: int
) -> tuple[np.ndarray[tuple[int], np.dtype[np.void]], bytes | bytearray]:
    """Rows and contents of the blocks in `buffer` that aren't zero."""
    size = volume.block_size
    blocks = np.frombuffer(buffer, dtype=np.uint64).reshape(-1, size // 8)
    present = np.flatnonzero(blocks.any(axis=1))
    payload = buffer if len(present) == len(blocks) else blocks[present].tobytes()
    view = memoryview(payload)
    entries = np.zeros(len(present), dtype=DIFF_ENTRY)
    entries["block"], entries["volume"], entries["source"] = first + present, index, int(Source.FOURTH)
    entries["unit"] = (contents_bytes + np.arange(len(present)) * size) // UNIT_BYTES
    entries["checksum"] = [xxh3_64_intdigest(view[at : at + size]) for at in range(0, len(view), size)]
    return entries, payload
