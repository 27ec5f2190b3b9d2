"""The open interval's tail: writes go to its log as they come, and from there into pieces that can be read."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Final

import numpy as np
import numpy.typing as npt

from pitfs.errors import CorruptionError
from pitfs.storage.files import read_exactly, write_all
from pitfs.store.catalog.records import OpenInterval
from pitfs.store.index.reader import chunk_cache
from pitfs.store.objects.format import HEADER_BYTES, ObjectHeader, ObjectKind, object_file
from pitfs.store.objects.pool import ObjectPool
from pitfs.store.open_interval.sorted_runs import Rows, add_piece, open_piece
from pitfs.store.open_interval.wal import WalReader, WriteAheadLog
from pitfs.store.open_interval.writes import Batch, positions, spread
from pitfs.store.transfer.build import second_bit

log = logging.getLogger(__name__)

MAX_PENDING_ROWS: Final = 1 << 16  # that wait in memory to be readable: 3 MiB; a batch may come on top
_COPY_BYTES: Final = 1 << 20
_SECOND_NS: Final = 1_000_000_000


def log_file(tail: int) -> str:
    """Name of a tail's log in objects/."""
    return object_file(ObjectKind.JOURNAL_BLOCKS, tail)


class OpenIntervalWriter:
    """A tail that takes writes.

    Args:
        facts: as the catalog has it.
        tail_log: its log, closed with this.
        objects: of the store.
        block_sizes: int64, by volume.

    Attributes:
        end: position of the last write. pending_rows: rows that can't be read yet.
    """

    def __init__(
        self, facts: OpenInterval, tail_log: WriteAheadLog, objects: ObjectPool, block_sizes: npt.NDArray[np.int64]
    ) -> None:
        self.facts, self.log = facts, tail_log
        self._block_sizes = block_sizes
        self._rows: list[Rows] = []
        self._positions: list[Rows] = []
        self._minutes: dict[int, int] = {}  # of pieces that the catalog hasn't yet
        self._open_piece = partial(open_piece, objects, chunks=chunk_cache(1))
        self.end = facts.to_seq, facts.to_time_ns
        self.pending_rows = 0

    def append(self, batch: Batch) -> None:
        """Writes a batch to the log. Raises OSError, CapacityError: then nothing more may be appended."""
        start = self.log.append_writes(batch.first_seq, batch.rows, batch.checksums, batch.zeros, batch.body)
        self._add(batch.first_seq, batch.rows, batch.checksums, batch.zeros, start)

    def _add(
        self, first_seq: int, rows: Rows, checksums: npt.NDArray[np.uint64], zeros: npt.NDArray[np.bool_], start: int
    ) -> None:
        self._rows.append(spread(first_seq, rows, checksums, zeros, self._block_sizes, self.log.tail, start))
        self._positions.append(positions(first_seq, rows))
        self.pending_rows += len(checksums)
        self.end = first_seq + len(rows) - 1, int(rows["time_ns"][-1])

    def make_readable(self) -> Mapping[int, int]:
        """Puts all that came into pieces, makes it durable, and `facts` what the catalog is to have then.

        Returns:
            seconds of minutes since the epoch that have an instant in it, as bits.

        Raises:
            OSError, CapacityError, CorruptionError: then nothing more may be appended.
        """
        if self._rows:
            self._add_piece()
        self.log.sync()
        self.facts = replace(self.facts, to_seq=self.end[0], to_time_ns=self.end[1], wal_end=self.log.end)
        minutes, self._minutes = self._minutes, {}
        return minutes

    @property
    def has_news(self) -> bool:
        """Whether anything came that the catalog hasn't."""
        return bool(self._rows or self._minutes)

    def _add_piece(self) -> None:
        """Puts what waits in memory into pieces."""
        pieces = add_piece(self.log, self.facts.runs, self._rows, self._positions, self._open_piece)
        times_ns = np.concatenate([each["time_ns"] for each in self._positions])
        for second in np.unique(times_ns // _SECOND_NS).tolist():
            self._minutes[second // 60] = self._minutes.get(second // 60, 0) | second_bit(second * _SECOND_NS)
        first_ns = self.facts.first_time_ns
        first_ns = int(times_ns[0]) if first_ns is None else first_ns
        self.facts = replace(self.facts, runs=pieces, first_time_ns=first_ns)
        self._rows, self._positions, self.pending_rows = [], [], 0

    def close(self) -> None:
        self.log.close()

    @classmethod
    def recover(
        cls, facts: OpenInterval, directory: str, objects: ObjectPool, block_sizes: npt.NDArray[np.int64]
    ) -> OpenIntervalWriter | None:
        """The tail as the log has it, all of it durable; None if there is no write in it.

        What the catalog doesn't have yet is written once more in its place: where a sync failed before, the page
        cache may have what the disk hasn't, and only what is written anew is written at all.

        Raises:
            CorruptionError: what was acknowledged isn't there.
            OSError: the disk refuses.
        """
        path = os.path.join(directory, log_file(facts.id))
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            if facts.runs:
                raise CorruptionError(
                    path, 0, "the log of the open interval is missing: the catalog is older than the objects, or "
                    "damaged: put the newest copy of it back, or move the store away for a new full copy"
                ) from None  # fmt: skip
            return None
        tail_log = WriteAheadLog(path, facts.id, fd, facts.wal_end, facts.wal_end)
        try:
            tail = cls(facts, tail_log, objects, block_sizes)
            header = ObjectHeader.decode(read_exactly(fd, HEADER_BYTES, 0, path), path)
            if (header.kind, header.snapshot_id) != (ObjectKind.JOURNAL_BLOCKS, facts.id):
                raise CorruptionError(path, 0, "it is another object than its name says")
            tail._read_again()
        except BaseException:
            os.close(fd)
            raise
        if tail.end[0] == facts.from_seq:
            tail.close()
            return None
        return tail

    def _read_again(self) -> None:
        path, fd, start, end = self.log.path, self.log.fd, self.log.end, self.end
        reader = WalReader(path, fd, self.log.tail)
        for head in reader.heads(start, self._block_sizes):
            if head.first_seq != end[0] + 1 or not len(head.rows) or head.rows["time_ns"][0] <= end[1]:
                raise CorruptionError(path, head.offset, "writes that don't follow those before them")
            end = head.first_seq + len(head.rows) - 1, int(head.rows["time_ns"][-1])
        size = os.fstat(fd).st_size
        if size > reader.end:
            log.info("%s: cut at byte %d: what was behind it isn't whole", path, reader.end)
            os.ftruncate(fd, reader.end)
        for at in range(start, reader.end, _COPY_BYTES):
            part = read_exactly(fd, min(_COPY_BYTES, reader.end - at), at, path)
            write_all(fd, part, at)
        os.fdatasync(fd)
        self.log.end = self.log.durable = reader.end
        # Once more: it may be all of a long interval, which becomes pieces behind it before the next of it is taken.
        for head in WalReader(path, fd, self.log.tail).heads(start, self._block_sizes):
            self._add(head.first_seq, head.rows, head.checksums, head.zeros, head.body)
            if self.pending_rows >= MAX_PENDING_ROWS:
                self._add_piece()
