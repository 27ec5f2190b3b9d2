"""A copy of the state at a position, read from the backing volumes while writes go on: complete, or of changes.

A complete one has every block that isn't zero. Of a copy of changes the journal says which blocks it has, behind its
COPY_START; these all go, zeros among them, for the replica has something else there.

Copy before write: the splitter journals the before-image of a block before it overwrites one that the
replica doesn't durably have. So, after reading a stretch of the backing volume, whatever before-images the
journal holds by then replace what was read: if a block has none, its write hadn't begun when it was read.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import operator
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import trio
from pyroaring import BitMap64
from xxhash import xxh3_64_intdigest

from pitfs.errors import CorruptionError, LinkError, PositionMismatchError
from pitfs.journal.digests import VolumeDigests
from pitfs.journal.reader import Copy, JournalReader
from pitfs.journal.writer import Location
from pitfs.model import transfer
from pitfs.model.record import CopyProgress, Record, RecordKind
from pitfs.model.transfer import ResumePoint, Section, VolumeInfo
from pitfs.replication.cursor import JournalCursor
from pitfs.replication.manifests import copy_manifest
from pitfs.replication.phases import Phase
from pitfs.replication.ports import Session, ShipperSettings
from pitfs.replication.sending import Sender
from pitfs.splitter.change_bitmap import BitmapAssembler
from pitfs.splitter.messages import Backings, SplitterClient
from pitfs.storage.files import open_fd
from pitfs.storage.segment import segment_path

log = logging.getLogger(__name__)

STRETCH_BYTES: Final = 16 << 20  # of a backing volume, read at a time
CHECKPOINT_BYTES: Final = 8 << 20  # sent before the replica is asked to make it durable
CHECKPOINT_READ_BYTES: Final = 256 << 20  # read or skipped: zeros send nothing, but their before-images are kept
# The most that is known at once of where before-images are; 64 MiB. A stretch has no more than 32768.
MAX_HELD_IMAGES: Final = 1 << 21
_PRESERVED: Final = np.dtype([("block", "<i8"), ("segment", "<i8"), ("offset", "<i8"), ("checksum", "<u8")])
_PACK_PRESERVED: Final = struct.Struct("<qqqQ").pack
_NO_STRETCH: Final = (1 << 62, 0)  # behind all of them


class FullSync:
    """Sends copies, each from its COPY_START in the journal, and tells the splitter how far the replica has them."""

    def __init__(
        self,
        settings: ShipperSettings,
        splitter: SplitterClient,
        cursor: JournalCursor,
        sender: Sender,
        backings: Backings,
        digests: VolumeDigests,
    ) -> None:
        self._settings, self._splitter, self._cursor, self._sender = settings, splitter, cursor, sender
        self._backings, self._digests = backings, digests

    async def ship(self, session: Session, copy: Copy) -> None:
        """Sends a copy, or the rest of it.

        Raises:
            LinkError: the copy can't be used, or was given up meanwhile; another one was begun.
            PitfsError: of the session.
            OSError: a backing volume can't be read.
        """
        status, mark, before = self._sender.status, copy.start.mark, session.welcome.mark
        status.enter(Phase.FULL_SYNC)
        # A copy of changes builds on one state alone.
        builds_on = copy.start.from_seq, copy.start.from_time_ns
        if not (copy.start.is_complete or (before > 0 and session.welcome.end == builds_on)):
            await self._cursor.abandon("the replica hasn't the state that the changed blocks build on")
        resume = await self._sender.begin(session, copy_manifest(copy, self._settings.hello.history, session.welcome))
        # Now, not when the commit is acknowledged: that may be lost, and the marks before are so in any case.
        status.lost_marks, status.lost_cause = range(before + 1, mark), copy.start.cause
        behind = f" behind {resume.lengths[1]} bytes" if resume.cursor else ""
        log.info("%s begins, mark %d%s", copy.what, mark, behind)

        await trio.to_thread.run_sync(self._digests.begin_copy, copy, resume.cursor)

        def tail() -> Location:
            splitter = trio.from_thread.run(self._splitter.status)
            if splitter.copy is None or splitter.copy.mark != mark:
                raise LinkError("the copy under way was given up: writes bypassed the journal meanwhile")
            return splitter.tail

        async def on_durable(point: ResumePoint) -> None:
            if len(point.cursor) == 2:
                await self._splitter.copied(CopyProgress(mark, *point.cursor))

        try:
            with contextlib.ExitStack() as stack:
                fds = await self._backings.open(stack)
                directory, volumes = self._settings.journal_directory, self._settings.hello.volumes
                frames = copy_frames(directory, volumes, fds, copy, resume, tail, self._digests)
                await self._sender.send(session, frames, on_durable=on_durable)
        except (CorruptionError, PositionMismatchError) as error:
            # Only what is seen here has everything copied again: damage, or a replica that resumes before what it
            # had acknowledged. After an error that the replica reports, the next session's resume point suffices.
            if error is session.failure:
                raise
            await self._cursor.abandon(str(error))
        await self._splitter.copied(CopyProgress(mark, len(self._settings.hello.volumes), 0))
        status.acknowledged(session.welcome, copy.location)
        status.enter(Phase.WAITING)
        log.info("%s committed, mark %d", copy.what, mark)


class _BeforeImages:
    """Where the journal has the before-images of blocks not yet copied; 32 bytes for each.

    Kept by stretch of the volume, so that each stretch finds its own at once; offset 0 means zeros. Where there are too
    many, those of the last stretches are dropped. When the copy gets there, the journal is read from the copy's start
    again: so memory is bounded, and a copy that is overwritten faster than it goes costs more reading.
    """

    def __init__(self, directory: str, volumes: tuple[VolumeInfo, ...], copy: Copy) -> None:
        self._reader = JournalReader(directory, [volume.block_size for volume in volumes])
        self._reader.seek(copy.location, (0, 0))
        self._directory, self._volumes, self._location = directory, volumes, copy.location
        self._stretches: dict[tuple[int, int], bytearray] = {}
        self._held_count = 0
        self._under_way = (0, 0)  # stretches before this one are copied
        self._dropped_from = _NO_STRETCH  # nothing is held of this one and those behind it
        self._copy_blocks = None if copy.start.is_complete else BitmapAssembler(copy.start)
        self.progress = CopyProgress(copy.start.mark, 0, 0)

    def close(self) -> None:
        self._reader.close()

    def follow(self, until: Location, under_way: tuple[int, int] = (0, 0)) -> None:
        """Takes in what the splitter preserved until then. Raises CorruptionError.

        Args:
            under_way: (volume, stretch) that is being copied: all of its before-images are held afterwards.
        """
        self._under_way = under_way
        if under_way >= self._dropped_from:
            self._stretches.clear()
            self._held_count, self._dropped_from = 0, _NO_STRETCH
            self._reader.seek(self._location, (0, 0))
        for location, record in self._reader.records(until):
            message = record.message
            if record.kind is RecordKind.BEFORE_IMAGE:
                self._add(location, record)
            elif isinstance(message, CopyProgress) and message.mark == self.progress.mark:
                self.progress = message
            elif self._copy_blocks is not None:
                self._copy_blocks.add(record)

    def wanted(self) -> Sequence[BitMap64 | None]:
        """Of each volume the blocks that are copied, None for all; call it once. Raises CorruptionError."""
        if self._copy_blocks is None:
            return [None] * len(self._volumes)
        wanted, self._copy_blocks = self._copy_blocks.bitmaps(self._directory), None
        return wanted

    def _add(self, location: Location, record: Record) -> None:
        size = self._volumes[record.volume].block_size
        zeros = record.size_bytes == record.contents_offset
        for index, checksum in enumerate(record.checksums):
            block = record.block + index
            key = record.volume, block * size // STRETCH_BYTES
            if self._under_way <= key < self._dropped_from:
                offset = 0 if zeros else location.offset + record.contents_offset + index * size
                rows = self._stretches.setdefault(key, bytearray())
                rows += _PACK_PRESERVED(block, location.segment, offset, checksum)
                self._held_count += 1
        if self._held_count > MAX_HELD_IMAGES:
            self._drop_last()

    def _drop_last(self) -> None:
        """Drops a quarter of what is held, but not what is under way."""
        for key in sorted(self._stretches, reverse=True):
            if self._held_count <= MAX_HELD_IMAGES * 3 // 4 or key == self._under_way:
                break
            self._drop(key)
            self._dropped_from = key

    def _drop(self, key: tuple[int, int]) -> None:
        self._held_count -= len(self._stretches.pop(key)) // _PRESERVED.itemsize

    def done(self, volume: int, stretch: int) -> None:
        """This stretch is copied, and all before it."""
        self._under_way = volume, stretch + 1
        for key in [key for key in self._stretches if key < self._under_way]:
            self._drop(key)

    def apply(self, volume: int, stretch: int, first: int, buffer: bytearray) -> None:
        """Puts the before-images of a stretch over what was read; `buffer` begins with block `first`.

        Raises CorruptionError where one of them isn't what was preserved.
        """
        found = self._stretches.get((volume, stretch))
        if found is None:
            return
        block_size = self._volumes[volume].block_size
        rows = np.frombuffer(bytes(found), dtype=_PRESERVED)
        rows = rows[rows["block"] >= first]
        blocks = np.frombuffer(buffer, dtype=np.uint64).reshape(-1, block_size // 8)
        blocks[rows["block"][rows["offset"] == 0] - first] = 0
        filled = rows[rows["offset"] != 0].tolist()
        for segment, group in itertools.groupby(filled, operator.itemgetter(1)):  # in the order of the journal
            path = segment_path(self._directory, segment)
            with open_fd(path, os.O_RDONLY) as fd:
                for block, _, offset, checksum in group:
                    image = os.pread(fd, block_size, offset)
                    if len(image) != block_size or xxh3_64_intdigest(image) != checksum:
                        raise CorruptionError(path, offset, "a before-image doesn't match its checksum")
                    at = (block - first) * block_size
                    buffer[at : at + block_size] = image


def copy_frames(
    directory: str,
    volumes: tuple[VolumeInfo, ...],
    backing_fds: list[int],
    copy: Copy,
    resume: ResumePoint,
    tail: Callable[[], Location],
    digests: VolumeDigests | None = None,
) -> Iterator[transfer.TransferFrame]:
    """The frames of a copy behind what the replica durably has.

    Args:
        directory: of the journal.
        backing_fds: of the backing volumes, for reading.
        tail: where the journal's tail is now; blocks.
        digests: gets what is copied.

    Raises:
        CorruptionError: the journal is damaged, or a backing volume ends early.
        PositionMismatchError: the replica has less of the copy than it had acknowledged.
        OSError: a backing volume can't be read.
    """
    with contextlib.closing(_BeforeImages(directory, volumes, copy)) as images:
        at_volume, at_block = (resume.cursor[0], resume.cursor[1]) if len(resume.cursor) == 2 else (0, 0)
        images.follow(tail(), (at_volume, 0))
        if (images.progress.volume, images.progress.block) > (at_volume, at_block):
            raise PositionMismatchError("the replica lost a part of the copy that it had acknowledged")
        rows_bytes, contents_bytes = resume.lengths[0], resume.lengths[1]
        sent = read = 0
        wanted = images.wanted()  # all of COPY_BLOCKS has been followed: it was journalled with COPY_START
        for index in range(at_volume, len(volumes)):
            volume, fd, blocks = volumes[index], backing_fds[index], wanted[index]
            block = at_block if index == at_volume else 0
            while (first := _next_block(volume, block, fd, blocks)) is not None:
                stretch = first * volume.block_size // STRETCH_BYTES
                end = min(volume.block_count, (stretch + 1) * STRETCH_BYTES // volume.block_size)
                picked = None
                if blocks is not None:
                    picked = np.array((blocks & BitMap64(range(first, end))).to_array(), dtype=np.int64)
                buffer = _read(volume, first, end, fd) if picked is None else _read_picked(volume, picked, fd)
                # After reading: a write that began meanwhile has left its before-image.
                images.follow(tail(), (index, stretch))
                images.apply(index, stretch, first, buffer)
                if digests is not None:
                    digests.copied(index, first, buffer, picked)
                for entries, payload in _portions(volume, index, first, buffer, picked):
                    yield transfer.Data(Section.DIFF, rows_bytes, entries.tobytes())
                    if payload:
                        yield transfer.Data(Section.DIFF_BLOCKS, contents_bytes, payload)
                    rows_bytes, contents_bytes = rows_bytes + entries.nbytes, contents_bytes + len(payload)
                    sent += entries.nbytes + len(payload)
                images.done(index, stretch)
                read += (end - block) * volume.block_size
                block = end
                if sent >= CHECKPOINT_BYTES or read >= CHECKPOINT_READ_BYTES:
                    sent = read = 0
                    yield transfer.Checkpoint((index, block))
        if digests is not None:  # before the replica's answer, which may be lost
            digests.end_copy()
        yield transfer.End((rows_bytes, contents_bytes, 0, 0, 0))


def read_stretch(
    volumes: Sequence[VolumeInfo], fds: Sequence[int], volume: int, block: int, limit_bytes: int
) -> tuple[int, bytearray] | None:
    """The first block of a volume, from that one on, that isn't in a hole, and the blocks from there on; else None."""
    info, first = volumes[volume], _next_block(volumes[volume], block, fds[volume], None)
    if first is None:
        return None
    return first, _read(info, first, min(info.block_count, first + limit_bytes // info.block_size), fds[volume])


def _seek(fd: int, offset: int, whence: int) -> int | None:
    """Where the next data (SEEK_DATA) or hole (SEEK_HOLE) of a backing is, None where there is none.

    On a block device everything is data. What is a hole now was one at the copy's position: the splitter fills holes,
    and nobody makes them.
    """
    try:
        return os.lseek(fd, offset, whence)
    except OSError as error:
        if error.errno not in (errno.ENXIO, errno.EINVAL):
            raise
        return offset if error.errno == errno.EINVAL and whence == os.SEEK_DATA else None


def _next_block(volume: VolumeInfo, block: int, fd: int, wanted: BitMap64 | None) -> int | None:
    """The next block that is wanted; where all are, the next one that isn't in a hole."""
    if block >= volume.block_count:
        return None
    if wanted is not None:
        return wanted.next_set_bit(block) if len(wanted) and block <= wanted.max() else None
    start = block * volume.block_size
    offset = _seek(fd, start, os.SEEK_DATA)
    return None if offset is None else offset // volume.block_size


def _read_picked(volume: VolumeInfo, picked: npt.NDArray[np.int64], fd: int) -> bytearray:
    """From the first of the blocks to the last; what isn't among them isn't read, and zero."""
    size, first = volume.block_size, int(picked[0])
    buffer = bytearray((int(picked[-1]) + 1 - first) * size)
    for run in np.split(picked, np.flatnonzero(np.diff(picked) != 1) + 1):
        start, end = int(run[0]), int(run[-1]) + 1
        buffer[(start - first) * size : (end - first) * size] = _read(volume, start, end, fd)
    return buffer


def _read(volume: VolumeInfo, first: int, end: int, fd: int) -> bytearray:
    """Blocks [first, end), holes not read, the last block of the volume padded with zeros."""
    buffer = bytearray((end - first) * volume.block_size)
    view = memoryview(buffer)
    start = first * volume.block_size
    stop = min(end * volume.block_size, volume.size_bytes)
    offset = _seek(fd, start, os.SEEK_DATA)
    while offset is not None and offset < stop:
        hole = min(stop, _seek(fd, offset, os.SEEK_HOLE) or stop)
        if os.preadv(fd, [view[offset - start : hole - start]], offset) != hole - offset:
            raise CorruptionError(f"backing of volume {volume.name}", offset, "it ends before its size")
        offset = _seek(fd, hole, os.SEEK_DATA) if hole < stop else None
    return buffer


def _portions(
    volume: VolumeInfo, index: int, first: int, buffer: bytearray, picked: npt.NDArray[np.int64] | None
) -> Iterator[tuple[npt.NDArray[np.void], bytes]]:
    """Rows and contents of the picked blocks (None: of all that aren't zero), a payload's worth at a time.

    Args:
        buffer: of blocks from `first` on.
    """
    size = volume.block_size
    blocks = np.frombuffer(buffer, dtype=np.uint64).reshape(-1, size // 8)
    places = np.flatnonzero(blocks.any(axis=1)) if picked is None else picked - first
    step = transfer.MAX_PAYLOAD_BYTES // size
    for start in range(0, len(places), step):
        contents = blocks[places[start : start + step]]
        filled = contents.any(axis=1)
        entries = np.zeros(len(contents), dtype=transfer.DIFF_ENTRY)
        entries["block"], entries["volume"] = first + places[start : start + step], index
        entries["source"] = np.where(filled, int(transfer.Source.SNAPSHOT), int(transfer.Source.ZERO))
        yield entries, contents[filled].tobytes()
