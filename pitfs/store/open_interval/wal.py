"""The write-ahead log (WAL) of an open interval: its writes as they stream in, and the sorted runs to read them by.

journal-<i>.blocks, where i is the open interval's id, with the header of an object; then records at bytes that are
multiples of 512, one behind the other. Contents begin at a unit of the store (`store.objects.format`):

    offset size
     0      8   magic         "PITFSTLB"
     8      4   kind          1 writes, 2 sorted run
    12      4   write_count   of writes: rows; of a run 0
    16      4   block_count   of writes: blocks of all rows; of a run 0
    20      4   reserved
    24      8   offset        byte of the file where this begins
    32      8   body_bytes    of the body
    40      8   first_seq     of the first row; of a run 0
    48      8   durable       all before this byte had been made durable when this was written
    56      8   checksum      xxh3_64, seeded with i, of bytes 0..56 and of what follows up to the body
    64          writes: WRITE rows (24 bytes each), xxh3_64 of each block (8 bytes), a bit for each block that is
                all zeros (first block the lowest bit; bytes filled up with zeros)
                then zeros up to a multiple of 512, of writes up to a unit, and the body
    body        writes: the blocks that aren't all zeros, in order: pointers of the open interval lead there
                sorted run: chunks and sparse index as in `store.index.format`, with their places in this file; then
                zeros up to a multiple of 512

A sorted run has the rows of its writes, or of runs before it, in the order of blocks; the catalog names those that
readers use. So one fdatasync makes writes durable together with all that a reader needs for them, and the catalog's
commit behind it needs none of its own: whatever it names has been on the disk before.

After a crash the records that the catalog doesn't have yet are read again, from `wal_end` of the open interval on. A
torn end is cut: a record that isn't whole was never acknowledged, nor was any behind it. It was acknowledged if a head
behind it says so by `durable`: then it is damage, which is reported.
"""

from __future__ import annotations

import enum
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from pitfs.errors import CapacityError, CorruptionError
from pitfs.model.blockmap import I64Array, U64Array
from pitfs.model.transfer import MAX_BATCH_ROWS, WRITE
from pitfs.storage.files import closed_on_error, read_exactly, write_all
from pitfs.store.index.merge import Rows
from pitfs.store.objects.format import HEADER_BYTES, Layout, ObjectHeader, ObjectKind
from pitfs.store.transfer.sections import checksums_of

MAGIC: Final = b"PITFSTLB"
HEAD: Final = struct.Struct("<8sIIIIQQQQ")
_CHECKSUM: Final = struct.Struct("<Q")
HEAD_BYTES: Final = HEAD.size + _CHECKSUM.size
assert HEAD.size == 56
_SEARCH_BYTES: Final = 4 << 20


class RecordKind(enum.IntEnum):
    WRITES = 1
    SORTED_RUN = 2


ALIGNMENT: Final = 512  # of heads, and of sorted runs


def align(offset: int, unit_bytes: int = ALIGNMENT) -> int:
    """The next byte at which a record can begin, or a unit of the data area."""
    return HEADER_BYTES - (HEADER_BYTES - offset) // unit_bytes * unit_bytes


@dataclass(frozen=True, slots=True)
class Batch:
    """Writes as they are logged.

    Attributes:
        rows: WRITE[n], the first of them write `first_seq`.
        checksums: uint64, of each block of all rows, 0 of zeros; zeros: which blocks are all zeros.
    """

    first_seq: int
    rows: Rows
    checksums: U64Array
    zeros: npt.NDArray[np.bool_]

    @property
    def end(self) -> tuple[int, int]:
        """Position of the last write."""
        return self.first_seq + len(self.rows) - 1, int(self.rows["time_ns"][-1])


_NO_WRITES: Final = Batch(0, np.zeros(0, WRITE), np.zeros(0, "<u8"), np.zeros(0, np.bool_))


@dataclass(frozen=True, slots=True)
class Head:
    """The head of a record whose body begins at byte `body` of the file; `batch`: the writes, none of a sorted run."""

    kind: RecordKind
    offset: int
    body: int
    body_bytes: int
    durable: int
    batch: Batch

    @property
    def end(self) -> int:
        """Where the next one begins."""
        return align(self.body + self.body_bytes)


def encode_head(
    open_interval_id: int, kind: RecordKind, offset: int, body_bytes: int, durable: int, batch: Batch = _NO_WRITES,
    unit_bytes: int = ALIGNMENT,
) -> bytes:  # fmt: skip
    """A head filled up to its body, which begins at a multiple of `unit_bytes` in the data area."""
    rows, checksums = batch.rows, batch.checksums
    columns = rows.tobytes() + checksums.tobytes() + np.packbits(batch.zeros, bitorder="little").tobytes()
    head = HEAD.pack(MAGIC, kind, len(rows), len(checksums), 0, offset, body_bytes, batch.first_seq, durable)
    data = head + _CHECKSUM.pack(xxh3_64_intdigest(head + columns, open_interval_id)) + columns
    return data.ljust(align(offset + len(data), unit_bytes) - offset, b"\0")


class WriteAheadLog:
    """The WAL of an open interval, open for appending.

    Args:
        path: of the file. fd: of the file, closed with this.
        end: byte where the next record comes; all before `durable` survives power loss.
        layout: of the store.
    """

    def __init__(self, path: str, open_interval_id: int, fd: int, end: int, durable: int, layout: Layout) -> None:
        self.path, self.open_interval_id, self.fd, self._layout = path, open_interval_id, fd, layout
        self.end, self.durable = end, durable

    @classmethod
    def create(cls, path: str, open_interval_id: int, history: bytes, layout: Layout) -> WriteAheadLog:
        """A new one with nothing in it, durable but for its directory entry. Raises OSError."""
        with closed_on_error(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)) as fd:
            write_all(fd, ObjectHeader(ObjectKind.JOURNAL_BLOCKS, history, open_interval_id).encode(), 0)
            os.fsync(fd)
        return cls(path, open_interval_id, fd, HEADER_BYTES, HEADER_BYTES, layout)

    def append_writes(self, batch: Batch, body: memoryview) -> int:
        """Appends writes; returns the byte where their contents begin. Raises OSError, CapacityError."""
        kind, unit_bytes = RecordKind.WRITES, self._layout.unit_bytes
        head = encode_head(self.open_interval_id, kind, self.end, len(body), self.durable, batch, unit_bytes)
        start = self.end + len(head)
        self._check_room(start + len(body))
        write_all(self.fd, head, self.end)
        write_all(self.fd, body, start)
        self.end = align(start + len(body))
        return start

    def run_start(self) -> int:
        """Where the body of a sorted run comes that is written next; `append_run` puts its head before it."""
        return align(self.end + HEAD_BYTES)

    def append_run(self, body_bytes: int) -> None:
        """The head of a sorted run whose body was written from `run_start` on. Raises OSError, CapacityError."""
        start = self.run_start()
        self._check_room(start + body_bytes)
        head = encode_head(self.open_interval_id, RecordKind.SORTED_RUN, self.end, body_bytes, self.durable)
        write_all(self.fd, head, self.end)
        end = align(start + body_bytes)
        write_all(self.fd, bytes(end - start - body_bytes), start + body_bytes)  # the file ends where the WAL does
        self.end = end

    def sync(self) -> None:
        """Makes all that was appended durable. Raises OSError; then nothing more may be appended."""
        if self.durable != self.end:
            os.fdatasync(self.fd)
            self.durable = self.end

    def close(self) -> None:
        os.close(self.fd)

    def _check_room(self, end: int) -> None:
        most_bytes = self._layout.max_units * self._layout.unit_bytes
        if end > most_bytes:
            problem = f"an open interval of more than {most_bytes >> 30} GiB: close it with a mark"
            raise CapacityError(f"{self.path}: {problem}")


class WalReader:
    """Reads the heads of a WAL's records.

    Attributes:
        end: where what is whole ends, when `heads` has been exhausted.
    """

    def __init__(self, path: str, fd: int, open_interval_id: int, unit_bytes: int) -> None:
        self._path, self._fd, self._open_interval_id, self._unit_bytes = path, fd, open_interval_id, unit_bytes
        self._size = os.fstat(fd).st_size
        self.end = 0

    def heads(self, start: int, block_sizes: I64Array) -> Iterator[Head]:
        """Each head of writes that are whole, from byte `start` on; sorted runs are passed over.

        Args:
            block_sizes: by volume.

        Raises:
            CorruptionError: what was acknowledged isn't whole.
            OSError: the disk refuses.
        """
        self.end = start
        if self._size < start:
            raise CorruptionError(self._path, self._size, "the log is shorter than what was acknowledged")
        while (head := self._head(self.end)) is not None and head.end <= self._size:
            if head.kind is RecordKind.WRITES:
                if not self._is_whole(head, block_sizes):
                    break
                yield head
            self.end = head.end
        self._check_torn_end()

    def _head(self, offset: int) -> Head | None:
        """The head at that byte, None if it isn't whole."""
        data = os.pread(self._fd, HEAD_BYTES, offset)
        if len(data) < HEAD_BYTES:
            return None
        magic, kind, write_count, block_count, _, place, body_bytes, first_seq, durable = HEAD.unpack_from(data)
        columns_bytes = write_count * WRITE.itemsize + block_count * 8 + -(-block_count // 8)
        unit_bytes = self._unit_bytes if kind == RecordKind.WRITES else ALIGNMENT
        body = align(offset + HEAD_BYTES + columns_bytes, unit_bytes)
        if (
            magic != MAGIC or place != offset or kind not in tuple(RecordKind)
            or write_count > MAX_BATCH_ROWS or body > self._size
        ):  # fmt: skip
            return None
        columns = os.pread(self._fd, columns_bytes, offset + HEAD_BYTES)
        (checksum,) = _CHECKSUM.unpack_from(data, HEAD.size)
        if checksum != xxh3_64_intdigest(data[: HEAD.size] + columns, self._open_interval_id):
            return None
        rows = np.frombuffer(columns, WRITE, write_count)
        checksums = np.frombuffer(columns, "<u8", block_count, rows.nbytes)
        bits = np.frombuffer(columns, np.uint8, -1, rows.nbytes + checksums.nbytes)
        zeros = np.unpackbits(bits, count=block_count, bitorder="little").astype(np.bool_)
        return Head(RecordKind(kind), offset, body, body_bytes, durable, Batch(first_seq, rows, checksums, zeros))

    def _is_whole(self, head: Head, block_sizes: I64Array) -> bool:
        """Whether its contents are what was written."""
        batch = head.batch
        sizes = np.repeat(block_sizes[batch.rows["volume"]], batch.rows["block_count"])[~batch.zeros]
        if int(sizes.sum()) != head.body_bytes:
            return False
        body = memoryview(read_exactly(self._fd, head.body_bytes, head.body, self._path))
        return np.array_equal(checksums_of(body, sizes), batch.checksums[~batch.zeros])

    def _check_torn_end(self) -> None:
        """Raises CorruptionError if something behind what isn't whole says that it was acknowledged."""
        for base in range(self.end, self._size, _SEARCH_BYTES):
            data = os.pread(self._fd, _SEARCH_BYTES, base)
            at = data.find(MAGIC)
            while at >= 0:
                head = self._head(base + at) if at % ALIGNMENT == 0 else None
                if head is not None and head.durable > self.end:
                    raise CorruptionError(
                        self._path, self.end, "writes that were acknowledged: move the store away for a new full sync "
                        "(what it has stays readable)"
                    )  # fmt: skip
                at = data.find(MAGIC, at + 1)
