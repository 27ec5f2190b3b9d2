"""Contents that rows of JOURNAL share: their checksums are found where the rows say that the contents stand.

They go to a file beside the staged rows, in the order of these: the digest at the End covers them so, while the
index is made of several runs of rows at once.
"""

from __future__ import annotations

import os
from typing import Final

import numpy as np
from xxhash import xxh3_64_intdigest

from pitfs.model.blockmap import I64Array, U64Array
from pitfs.model.transfer import UNIT_BYTES, Section, Source
from pitfs.storage.files import read_exactly, write_all
from pitfs.store.objects.format import HEADER_BYTES, ObjectKind
from pitfs.store.objects.pool import ObjectPool
from pitfs.store.transfer.staging import StagedTransfer
from pitfs.store.transfer.validation import refuse

NAME: Final = "shared.checksums"
_CHECKSUM: Final = np.dtype("<u8")


class SharedContents:
    """Those of staged layers.

    Args:
        block_sizes: of the volumes, bytes.
        objects: of the store.
    """

    def __init__(self, staged: StagedTransfer, block_sizes: I64Array, objects: ObjectPool) -> None:
        self._staged, self._block_sizes, self._objects = staged, block_sizes, objects
        self._path = os.path.join(staged.directory, NAME)
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)

    def close(self) -> None:
        os.close(self._fd)

    def find(self) -> None:
        """Reads each of them, before anything leads to it.

        Raises:
            RemoteProtocolError: they aren't those that the splitter took in.
            OSError: the disk refuses.
        """
        at = 0
        for rows in self._staged.rows(Section.JOURNAL, verify=False):
            shared = rows[rows["source"] >= Source.SHARED_FOURTH]
            places = (shared["source"], shared["unit"] * UNIT_BYTES, self._block_sizes[shared["volume"]])
            found = map(self._checksum, *(column.tolist() for column in places))
            checksums = np.fromiter(found, _CHECKSUM, len(shared))
            self._staged.take_shared(Section.JOURNAL_BLOCKS, checksums)
            write_all(self._fd, checksums.data.cast("B"), at)
            at += checksums.nbytes
        self._staged.check_shared(Section.JOURNAL_BLOCKS)

    def _checksum(self, source: int, at: int, size: int) -> int:
        """Of the block at that byte of DIFF_BLOCKS, or of JOURNAL_BLOCKS."""
        snapshot, base_bytes = self._staged.snapshot, self._staged.manifest.base_bytes
        if source == Source.SHARED_FOURTH:
            data = os.pread(self._objects.fd_of(ObjectKind.SNAPSHOT_BLOCKS, snapshot), size, HEADER_BYTES + at)
        elif at + size <= base_bytes:
            data = os.pread(self._objects.fd_of(ObjectKind.JOURNAL_BLOCKS, snapshot), size, HEADER_BYTES + at)
        elif at >= base_bytes:
            data = os.pread(self._staged.fd(Section.JOURNAL_BLOCKS), size, HEADER_BYTES + at - base_bytes)
        else:
            data = b""
        if len(data) != size:
            raise refuse("journal", "a row shares a content that isn't there")
        return xxh3_64_intdigest(data)

    def checksums(self, first: int, count: int) -> U64Array:
        """After `find`: those of `count` rows that share one, from number `first` of them on."""
        data = read_exactly(self._fd, count * _CHECKSUM.itemsize, first * _CHECKSUM.itemsize, self._path)
        return np.frombuffer(data, _CHECKSUM)
