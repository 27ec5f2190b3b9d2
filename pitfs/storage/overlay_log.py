"""The log of a kept overlay's blocks as a file: read at its opening, cut where it is torn, appended to durably."""

from __future__ import annotations

import contextlib
import logging
import os
from typing import Final

from pyroaring import BitMap64

from pitfs.errors import CapacityError, CorruptionError
from pitfs.model import overlay
from pitfs.model.overlay import MAX_RECORD_BYTES, OverlayHeader, decode_record
from pitfs.storage.files import FULL_ERRNOS, closed_on_error, reserve, write_all

# Reserved ahead: if the blocks have filled the disk, there is still room to log 4,000 runs of them.
RESERVE_BYTES: Final = 64 << 10

log = logging.getLogger(__name__)


class OverlayLog:
    """The log of a kept overlay, open at its end.

    Args:
        path: the log's file, which exists.
        header: what it must begin with.

    Raises:
        CorruptionError: it is damaged, or another overlay's.
        StoreVersionError: a newer pitfs wrote it.
        OSError: the disk refuses.
    """

    def __init__(self, path: str, header: OverlayHeader) -> None:
        self.path = path
        self.blocks = BitMap64()
        self._seed = header.seed
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        with closed_on_error(self._fd):
            if OverlayHeader.decode(os.pread(self._fd, overlay.HEADER_BYTES, 0), path) != header:
                raise CorruptionError(path, 0, "the log of another image, or of another store's")
            self._end = self._replay(header.volume.block_count)
            reserve(self._fd, self._end, RESERVE_BYTES)

    def append(self, blocks: BitMap64) -> None:
        """Makes durable that these blocks are in the overlay.

        Raises:
            CapacityError: the disk is full; a retry may succeed.
            OSError: the disk refuses.
        """
        for record in overlay.encode_records(overlay.runs_of(blocks), self._seed, self._end):
            try:
                write_all(self._fd, record, self._end)
            except OSError as error:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._fd, self._end)
                if error.errno in FULL_ERRNOS:
                    raise CapacityError(f"{self.path}: {error.strerror}") from error
                raise
            os.fdatasync(self._fd)
            self._end += len(record)
        reserve(self._fd, self._end, RESERVE_BYTES)

    def close(self) -> None:
        os.close(self._fd)

    def _replay(self, block_count: int) -> int:
        """Fills `blocks` and cuts a torn record at the end; returns where the next record goes."""
        offset, size = overlay.HEADER_BYTES, os.fstat(self._fd).st_size
        base, piece = offset, b""
        while offset < size:
            if offset - base + MAX_RECORD_BYTES > len(piece) and base + len(piece) < size:
                base, piece = offset, os.pread(self._fd, 4 * MAX_RECORD_BYTES, offset)
            found = decode_record(memoryview(piece)[offset - base :], self._seed, offset, block_count)
            if found is None:
                self._cut(offset, size, block_count)
                break
            for first, count in found[0].tolist():
                self.blocks.add_range(first, first + count)
            offset += found[1]
        return offset

    def _cut(self, offset: int, size: int, block_count: int) -> None:
        """Cuts the record that a power cut tore. Raises CorruptionError if a good one follows: then it is damage."""
        position = offset + 1
        while position < size:
            piece = os.pread(self._fd, 2 * MAX_RECORD_BYTES, position)
            at = piece.find(overlay.RECORD_MAGIC)
            while 0 <= at < MAX_RECORD_BYTES:
                if decode_record(memoryview(piece)[at:], self._seed, position + at, block_count) is not None:
                    raise CorruptionError(self.path, offset, "a bad record with a good one behind it")
                at = piece.find(overlay.RECORD_MAGIC, at + 1)
            position += MAX_RECORD_BYTES
        log.warning("%s: cut the record of an fsync that was never answered (%d bytes)", self.path, size - offset)
        os.ftruncate(self._fd, offset)
