"""A transfer's sections in staging/: files that grow as frames come, and are cut to a checkpoint to go on from it.

Rows are staged as they came. Contents are staged where they will be read from, in a file that becomes an object, and
beside them the checksum of each block. Each section has a digest of its rows, or of its checksums, as they came: what
changed on disk since, and could make another state, is noticed (contents can't: each block is read against its
checksum).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import xxhash

from pitfs.errors import CorruptionError
from pitfs.model.blockmap import I64Array, U64Array
from pitfs.model.record import block_checksums
from pitfs.model.transfer import ROWS, UNIT_BYTES, Section
from pitfs.storage.files import closed_on_error, read_exactly, write_all
from pitfs.store.objects.format import HEADER_BYTES, ObjectName
from pitfs.store.transfer.validation import BlockCheck, RowCheck, refuse
from pitfs.store.transfer.writable_store import WritableStore

BATCH_ROWS: Final = 1 << 15  # rows in memory at a time when they are read again: about 1 MiB
CHECKSUM: Final = np.dtype("<u8")


class StagedFile:
    """A file whose data begin at byte `start`; `length` of them count, what is behind is cut. Made if it isn't there.

    Raises:
        CorruptionError: it is shorter than that.
    """

    def __init__(self, path: str, length: int, start: int = 0) -> None:
        self.path, self.length, self._start, self._synced = path, length, start, length
        with closed_on_error(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)) as self.fd:
            if length and os.fstat(self.fd).st_size < start + length:
                raise CorruptionError(path, start + length, "the staged file is shorter than was acknowledged")
            os.ftruncate(self.fd, start + length)

    def append(self, data: memoryview) -> None:
        write_all(self.fd, data, self._start + self.length)
        self.length += len(data)

    def read(self, size: int, offset: int) -> bytes:
        """Raises CorruptionError where the file ends before that."""
        return read_exactly(self.fd, size, self._start + offset, self.path)

    def sync(self) -> None:
        """Makes durable what was appended."""
        if self.length != self._synced:
            os.fdatasync(self.fd)
            self._synced = self.length

    def close(self) -> None:
        os.close(self.fd)


class StagedArray(StagedFile):
    """Rows, or checksums, one behind the other; `digest` is that of all that came."""

    def __init__(self, path: str, dtype: npt.DTypeLike, length: int) -> None:
        super().__init__(path, length)
        self._dtype: np.dtype[Any] = np.dtype(dtype)
        self.digest = xxhash.xxh3_64()

    @property
    def count(self) -> int:
        return self.length // self._dtype.itemsize

    def append(self, data: memoryview) -> None:
        super().append(data)
        self.digest.update(data)

    def rows(self, first: int = 0, end: int | None = None, batch_rows: int | None = None) -> Iterator[npt.NDArray[Any]]:
        """Those from number `first` on, before `end`, in bounded batches. Raises CorruptionError."""
        size, stop, batch = self._dtype.itemsize, self.count if end is None else end, batch_rows or BATCH_ROWS
        for row in range(first, stop, batch):
            yield np.frombuffer(self.read(min(batch, stop - row) * size, row * size), self._dtype)

    def part(self, first: int, count: int) -> npt.NDArray[Any]:
        """`count` of them from number `first` on."""
        return np.concatenate([np.zeros(0, self._dtype), *self.rows(first, first + count)])

    def verified(self) -> Iterator[npt.NDArray[Any]]:
        """All of them; raises CorruptionError behind the last where they aren't what came."""
        digest = xxhash.xxh3_64()
        for rows in self.rows():
            digest.update(rows.view(np.uint8).data)
            yield rows
        if digest.intdigest() != self.digest.intdigest():
            raise CorruptionError(self.path, 0, "what is staged isn't what came")

    def verify(self) -> None:
        """Raises CorruptionError where they aren't what came."""
        for _ in self.verified():
            pass

    def replay(self) -> None:
        for rows in self.rows():
            self.digest.update(rows.view(np.uint8).data)


class StagedRows(StagedArray):
    """A section of rows.

    Args:
        directory: where it is staged.
        length: bytes to go on from; `replay` checks the rows in them again.
        check: what the rows must fulfil.
    """

    def __init__(self, directory: str, section: Section, length: int, check: RowCheck) -> None:
        super().__init__(os.path.join(directory, f"{section.name.lower()}.rows"), ROWS[section], length)
        self.section, self._check = section, check

    def replay(self) -> None:
        for rows in self.rows():
            self.digest.update(rows.view(np.uint8).data)
            self._check.take(rows)

    def take(self, payload: memoryview) -> None:
        """Checks whole rows and appends them. Raises RemoteProtocolError, OSError."""
        if len(payload) % self._dtype.itemsize:
            raise refuse(self.section.name, "a frame that isn't whole rows")
        self._check.take(np.frombuffer(payload, self._dtype))
        self.append(payload)

    def finish(self, announced: int | None) -> None:
        """Raises RemoteProtocolError where not as many rows came as were announced."""
        if announced is not None and self._check.count != announced:
            raise refuse(self.section.name.lower(), f"{self._check.count} rows, {announced} announced")


class StagedContents(StagedFile):
    """A section of contents: whole blocks, in the order of the rows that bring one of their own.

    Args:
        name: of the object that it becomes.
        length, count: bytes and blocks to go on from.
        rows: the section that names the contents; check: its check.

    Attributes:
        checksums: of the blocks that have come.
    """

    def __init__(
        self, name: ObjectName, length: int, count: int, rows: StagedRows, check: BlockCheck, store: WritableStore
    ) -> None:
        self._rows, self._check, self._block_sizes = rows, check, store.block_sizes
        self._name, directory = f"{rows.section.name}_BLOCKS", os.path.dirname(rows.path)
        path = os.path.join(directory, f"{rows.section.name.lower()}.checksums")
        self.checksums = StagedArray(path, CHECKSUM, count * CHECKSUM.itemsize)
        with closed_on_error(self.checksums.fd):
            super().__init__(os.path.join(directory, name.file), length, HEADER_BYTES)
        self._row = 0  # the first whose content has no place in `_sizes` yet
        self._sizes = np.zeros(0, "<i8")  # of the blocks that come next, as far as rows were looked at
        self._found, self._taken = self.checksums.digest, 0  # digests of checksums: as found, as the splitter took them

    def replay(self) -> None:
        """Raises CorruptionError where the contents aren't as long as their rows say."""
        self.checksums.replay()
        left, size = self.checksums.count, 0
        while left and (len(self._sizes) or self._look_ahead()):
            size += int(self._sizes[:left].sum())
            left, self._sizes = left - min(left, len(self._sizes)), self._sizes[left:]
        if left or size != self.length:
            raise CorruptionError(self.path, 0, "the staged contents aren't those of the staged rows")

    def take(self, payload: memoryview) -> None:
        """Appends whole blocks of the next rows that have any; their checksums are taken here.

        Raises:
            RemoteProtocolError: they aren't that.
        """
        while (missing := len(payload) - int(self._sizes.sum())) > 0 and self._look_ahead():
            pass
        ends = np.cumsum(self._sizes)
        count = int(np.searchsorted(ends, len(payload))) + 1
        if missing > 0 or ends[count - 1] != len(payload):
            problem = f"contents at byte {self.length} that no row named, or that aren't whole blocks"
            raise refuse(self._name, problem)
        sizes, self._sizes = self._sizes[:count], self._sizes[count:]
        self.append(payload)
        self.checksums.append(checksums_of(payload, sizes).data.cast("B"))

    def _look_ahead(self) -> bool:
        """Looks at the next rows for blocks that they bring; False if no more rows have come."""
        rows = next(self._rows.rows(self._row), None)
        if rows is None:
            return False
        self._row += len(rows)
        volumes = rows["volume"][rows["source"] == self._check.own]
        self._sizes = np.concatenate([self._sizes, self._block_sizes[volumes]])
        return True

    def finish(self, taken: int | None) -> None:
        """Checks that the contents are complete and, where no row shares one, that the splitter took them in.

        Args:
            taken: digest of the checksums taken at the splitter, None where blocks were read from the backing volume.

        Raises:
            RemoteProtocolError: they aren't.
        """
        if self.length != self._check.units * UNIT_BYTES:
            raise refuse(self._name, "contents that rows name are missing")
        if taken is None and self._check.shared:
            raise refuse(self._name, "rows that share contents, without the checksums taken at the splitter")
        self._found = self.checksums.digest.copy()
        self._taken = self._found.intdigest() if taken is None else taken
        if not self._check.shared:
            self.check_taken()  # before anything is made of it

    def take_shared(self, checksums: U64Array) -> None:
        """After `finish`: checksums, as found, of the contents that the next rows share."""
        self._found.update(checksums.data.cast("B"))

    def check_taken(self) -> None:
        """Compares the checksums of all contents, and behind them of all shared ones, with the splitter's.

        Raises:
            RemoteProtocolError: they aren't the same.
        """
        if self._found.intdigest() != self._taken:
            raise refuse("contents", "they aren't those whose checksums were taken at the splitter")

    def sync(self) -> None:
        super().sync()
        self.checksums.sync()

    def close(self) -> None:
        super().close()
        self.checksums.close()


def checksums_of(contents: memoryview, sizes: I64Array) -> U64Array:
    """xxh3_64 of each block of `contents`, which have these sizes."""
    if len(sizes) and (sizes == sizes[0]).all():
        return np.array(block_checksums(contents, int(sizes[0])), CHECKSUM)
    ends = np.cumsum(sizes).tolist()
    blocks = (contents[end - size : end] for size, end in zip(sizes.tolist(), ends, strict=True))
    return np.array([xxhash.xxh3_64_intdigest(block) for block in blocks], CHECKSUM)
