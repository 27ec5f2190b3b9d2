"""Where the contents of staged rows are, and their checksums: own ones come in order, shared ones are read.

A row with a content of its own says nothing about it: it is the next block of the section of contents. A row that
shares a content says where that is, but not its checksum. So the content is read, and its checksum taken, before
anything leads to it. The digest of the End covers the checksums of shared contents in the order of the rows, as the
splitter took them: a row that shares another content than was written there is found.

Rows of DIFF come in one run, so their shared contents are read while the block map is made. Rows of JOURNAL come in
several runs, which are merged. Then the order of the digest isn't that in which rows are used: all shared contents are
read first, and their checksums kept in a file, which each run reads from its own place on.
"""

from __future__ import annotations

import os
from typing import Final

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from pitfs.model.blockmap import U64Array
from pitfs.model.transfer import UNIT_BYTES, Source
from pitfs.store.objects.format import HEADER_BYTES, ObjectKind, ObjectName
from pitfs.store.transfer.sections import CHECKSUM, StagedArray, StagedContents
from pitfs.store.transfer.staging import StagedTransfer
from pitfs.store.transfer.validation import refuse
from pitfs.store.transfer.writable_store import WritableStore

NAME: Final = "shared.checksums"


class OwnContents:
    """Pointers and checksums of rows that have contents of their own: these come in the order of the rows.

    Args:
        first: pointer of the block that comes next; block: its number in the section.
    """

    def __init__(self, contents: StagedContents, store: WritableStore, first: int, block: int = 0) -> None:
        self._contents, self._units = contents, store.block_units
        self._next, self._block = first, block

    def of(self, volumes: npt.NDArray[np.uint16]) -> tuple[U64Array, U64Array]:
        """Of the next rows, which lie in these volumes."""
        sizes = self._units[volumes]
        ends = np.cumsum(sizes, dtype="<u8")
        pointers = np.uint64(self._next) + ends - sizes
        checksums = self._contents.checksums.part(self._block, len(sizes))
        self._next += int(ends[-1]) if len(ends) else 0
        self._block += len(sizes)
        return pointers, checksums


def read_checksums(fd: int, units: U64Array, block_size: int) -> U64Array:
    """xxh3_64 of the blocks at these units (of the wire) of an object of contents; of less than a block at its end."""
    reads = (os.pread(fd, block_size, HEADER_BYTES + unit * UNIT_BYTES) for unit in units.tolist())
    return np.fromiter(map(xxh3_64_intdigest, reads), CHECKSUM, len(units))


class SharedContents(StagedArray):
    """Checksums of the contents that rows of JOURNAL share, in staged layers, in the order of the rows."""

    def __init__(self, staged: StagedTransfer, store: WritableStore) -> None:
        super().__init__(os.path.join(staged.directory, NAME), CHECKSUM, 0)
        self._staged, self._store = staged, store

    def find(self) -> None:
        """Reads each of them, before anything leads to it.

        Raises:
            RemoteProtocolError: they aren't those that the splitter took in.
            OSError: the disk refuses.
        """
        block_sizes = self._store.block_sizes
        for rows in self._staged.journal.rows():
            shared = rows[rows["source"] >= Source.SHARED_SNAPSHOT]
            places = shared["source"], shared["unit"] * UNIT_BYTES, block_sizes[shared["volume"]]
            found = map(self._checksum, *(column.tolist() for column in places))
            checksums = np.fromiter(found, CHECKSUM, len(shared))
            self._staged.journal_blocks.take_shared(checksums)
            self.append(checksums.data.cast("B"))
        self._staged.journal_blocks.check_taken()

    def _checksum(self, source: int, at: int, size: int) -> int:
        """Of the block at that byte of DIFF_BLOCKS, or of JOURNAL_BLOCKS."""
        base_bytes, fd_of = self._staged.manifest.base_bytes, self._store.objects.fd_of
        if source == Source.SHARED_SNAPSHOT:
            fd: int = fd_of(ObjectName(ObjectKind.SNAPSHOT_BLOCKS, self._staged.snapshot_id))
        elif at + size <= base_bytes:
            fd = fd_of(ObjectName(ObjectKind.JOURNAL_BLOCKS, self._staged.snapshot_id))
        else:
            fd, at = self._staged.journal_blocks.fd, at - base_bytes
        data = os.pread(fd, size, HEADER_BYTES + at) if at >= 0 else b""  # else: half in what came, half before it
        if len(data) != size:
            raise refuse("journal", "a row shares a content that isn't there")
        return xxh3_64_intdigest(data)
