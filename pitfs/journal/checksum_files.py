"""The checksum of each block of each volume, in files: 8 bytes a block, 0 for one of zeros; sparse.

That is 0.2 % of a volume in blocks of 4 KiB. Memory holds some pages of them.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from pitfs.errors import PitfsError
from pitfs.model.digest import MASK, digest_of, zero_checksum
from pitfs.model.transfer import VolumeInfo
from pitfs.storage.files import write_all

PAGE_ROWS: Final = 512  # read and written whole, 4 KiB
BATCH_ROWS: Final = 4096  # set at once, in as many pages at most: 16 MiB


class ChecksumFiles:
    """The files of a group. Every method raises OSError, or PitfsError where a file isn't what was made.

    Attributes:
        sums: digests of the volumes as the files have them; None: not made yet.
        changes: how often they were changed.
    """

    def __init__(self, directory: str, volumes: Sequence[VolumeInfo]) -> None:
        self._directory, self._volumes = directory, volumes
        self._zeros = np.array([zero_checksum(volume.block_size) for volume in volumes], dtype=np.uint64)
        self._fds: list[int] = []
        self.sums: list[int] | None = None
        self.changes = 0

    def open(self, flags: int = 0) -> None:
        self.close()
        for volume in self._volumes:
            path = os.path.join(self._directory, f"{volume.name}.checksums")
            self._fds.append(os.open(path, os.O_RDWR | os.O_CLOEXEC | flags, 0o600))

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.pop())

    def clear(self) -> None:
        """Makes files that say that all is zeros."""
        self.changes += 1
        self.open(os.O_CREAT | os.O_TRUNC)
        for fd, volume in zip(self._fds, self._volumes, strict=True):
            os.ftruncate(fd, -(-volume.block_count // PAGE_ROWS) * PAGE_ROWS * 8)
        self.sums = [0] * len(self._volumes)

    def sync(self) -> None:
        for fd in self._fds:
            os.fdatasync(fd)

    def digests(self) -> list[int]:
        """Of each volume; the first time, all of the files are read."""
        if self.sums is None:
            self.sums = [self._sum_of(volume) for volume in range(len(self._volumes))]
        return self.sums

    def set_contents(
        self, volume: int, first: int, buffer: bytearray, picked: npt.NDArray[np.int64] | None
    ) -> None:
        """Sets the checksums of blocks in `buffer`, which begins with block `first`."""
        size, view = self._volumes[volume].block_size, memoryview(buffer)
        places = np.arange(len(buffer) // size) if picked is None else picked - first
        checksums = [xxh3_64_intdigest(view[at : at + size]) for at in (places * size).tolist()]
        self.set(volume, first + places, np.array(checksums, dtype=np.uint64))

    def set(self, volume: int, blocks: npt.NDArray[np.int64], checksums: npt.NDArray[np.uint64]) -> None:
        """Sets checksums of blocks that ascend."""
        self.changes += 1
        for start in range(0, len(blocks), BATCH_ROWS):
            block, checksum = blocks[start : start + BATCH_ROWS], checksums[start : start + BATCH_ROWS]
            checksum = np.where(checksum == self._zeros[volume], np.uint64(0), checksum)
            pages, of = np.unique(block // PAGE_ROWS, return_inverse=True)
            table = np.zeros((len(pages), PAGE_ROWS), dtype="<u8")
            begins = [0, *(np.flatnonzero(np.diff(pages) != 1) + 1).tolist(), len(pages)]
            view, page_bytes = table.data.cast("B"), PAGE_ROWS * 8
            spans = itertools.pairwise(begins)
            runs = [(pages.item(at) * page_bytes, view[at * page_bytes : end * page_bytes]) for at, end in spans]
            for offset, run in runs:
                if os.preadv(self._fds[volume], [run], offset) != run.nbytes:
                    raise PitfsError(f"{self._directory}: a file of checksums ends early")
            place = of, block % PAGE_ROWS
            before = table[place]
            table[place] = checksum
            for offset, run in runs:
                write_all(self._fds[volume], run, offset)
            if self.sums is not None:
                change = digest_of(block, checksum) - digest_of(block, before)
                self.sums[volume] = (self.sums[volume] + change) & MASK

    def _sum_of(self, volume: int) -> int:
        """The digest of a volume from its whole file."""
        total = 0
        for first in range(0, self._volumes[volume].block_count, PAGE_ROWS * BATCH_ROWS):
            data = os.pread(self._fds[volume], PAGE_ROWS * BATCH_ROWS * 8, first * 8)
            checksums = np.frombuffer(data, dtype="<u8")
            blocks = np.flatnonzero(checksums)
            for start in range(0, len(blocks), BATCH_ROWS):
                part = blocks[start : start + BATCH_ROWS]
                total += digest_of(first + part, checksums[part])
        return total & MASK
