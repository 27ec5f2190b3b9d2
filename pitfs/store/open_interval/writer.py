"""The open interval takes writes: they go to its WAL as they come, and from there into sorted runs, to be read."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Final

import numpy as np

from pitfs.errors import CorruptionError
from pitfs.storage.files import closed_on_error, read_exactly, write_all
from pitfs.store.catalog.database import REMEDY
from pitfs.store.catalog.records import OpenInterval, add_seconds
from pitfs.store.index.merge import Rows
from pitfs.store.index.reader import chunk_cache
from pitfs.store.objects.format import HEADER_BYTES, ObjectHeader, ObjectKind
from pitfs.store.open_interval.sorted_runs import add_run, open_run
from pitfs.store.open_interval.wal import Batch, WalReader, WriteAheadLog
from pitfs.store.open_interval.writes import positions, spread
from pitfs.store.transfer.writable_store import WritableStore

log = logging.getLogger(__name__)

MAX_PENDING_ROWS: Final = 1 << 16  # that wait in memory to be readable: 3 MiB; a batch may come on top
_COPY_BYTES: Final = 1 << 20


class OpenIntervalWriter:
    """An open interval that takes writes.

    Args:
        record: as the catalog has it.
        wal: its WAL, closed with this.

    Attributes:
        end: position of the last write; durable_end: of the last that survives power loss.
        pending_rows: rows that can't be read yet.
    """

    def __init__(self, record: OpenInterval, wal: WriteAheadLog, store: WritableStore) -> None:
        self.record, self.wal = record, wal
        self._layout, self._block_sizes, self._block_units = store.layout, store.block_sizes, store.block_units
        self._rows: list[Rows] = []
        self._positions: list[Rows] = []
        self._minutes: dict[int, int] = {}  # of runs that the catalog hasn't yet
        self._open_run = partial(open_run, store.objects, chunks=chunk_cache(1))
        self.end = self.durable_end = record.to_seq, record.to_time_ns
        self.pending_rows = 0

    def append(self, batch: Batch, body: memoryview) -> None:
        """Writes a batch to the WAL. Raises OSError, CapacityError: then nothing more may be appended."""
        self._add(batch, self.wal.append_writes(batch, body))

    def _add(self, batch: Batch, start: int) -> None:
        """Notes a batch whose contents begin at byte `start` of the WAL."""
        first_pointer = self._layout.pointer(self.record.wal, (start - HEADER_BYTES) // self._layout.unit_bytes)
        self._rows.append(spread(batch, self._block_units, first_pointer))
        self._positions.append(positions(batch))
        self.pending_rows += len(batch.checksums)
        self.end = batch.end

    def make_readable(self) -> Mapping[int, int]:
        """Puts all that came into sorted runs, makes it durable, and `record` what the catalog is to have then.

        Returns:
            seconds of minutes since the epoch that have an instant in it, as bits.

        Raises:
            OSError, CapacityError, CorruptionError: then nothing more may be appended.
        """
        if self._rows:
            self._add_run()
        self.sync()
        self.record = replace(self.record, to_seq=self.end[0], to_time_ns=self.end[1], wal_end=self.wal.end)
        minutes, self._minutes = self._minutes, {}
        return minutes

    def sync(self) -> None:
        """Makes all that came durable. Raises OSError: then nothing more may be appended."""
        self.wal.sync()
        self.durable_end = self.end

    @property
    def has_news(self) -> bool:
        """Whether anything came that the catalog hasn't."""
        return bool(self._rows or self._minutes)

    def _add_run(self) -> None:
        """Puts what waits in memory into sorted runs."""
        runs = add_run(self.wal, self.record.runs, self._rows, self._positions, self._open_run)
        times_ns = np.concatenate([each["time_ns"] for each in self._positions])
        add_seconds(self._minutes, times_ns)
        first_ns = self.record.first_time_ns
        first_ns = int(times_ns[0]) if first_ns is None else first_ns
        self.record = replace(self.record, runs=runs, first_time_ns=first_ns)
        self._rows, self._positions, self.pending_rows = [], [], 0

    def close(self) -> None:
        self.wal.close()

    @classmethod
    def recover(cls, record: OpenInterval, store: WritableStore) -> OpenIntervalWriter | None:
        """The open interval as its WAL has it, all of it durable; None if there is no write in it.

        What the catalog doesn't have yet is written once more in its place: where a sync failed before, the page
        cache may have what the disk hasn't, and only what is written anew is written at all.

        Raises:
            CorruptionError: what was acknowledged isn't there.
            OSError: the disk refuses.
        """
        path = store.objects.path_of(record.wal)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            if record.runs:
                raise CorruptionError(
                    path, 0, "the log of the open interval is missing: the catalog is older than the objects, or "
                    f"damaged: {REMEDY}"
                ) from None  # fmt: skip
            return None
        wal = WriteAheadLog(path, record.id, fd, record.wal_end, record.wal_end, store.layout)
        recovered = cls(record, wal, store)
        with closed_on_error(fd):
            header = ObjectHeader.decode(read_exactly(fd, HEADER_BYTES, 0, path), path)
            if (header.kind, header.snapshot_id) != (ObjectKind.JOURNAL_BLOCKS, record.id):
                raise CorruptionError(path, 0, "it is another object than its name says")
            recovered._read_again()
        if recovered.end[0] == record.from_seq:
            recovered.close()
            return None
        return recovered

    def _read_again(self) -> None:
        wal, end = self.wal, self.end
        path, fd, start = wal.path, wal.fd, wal.end
        reader = WalReader(path, fd, wal.open_interval_id, self._layout.unit_bytes)
        for head in reader.heads(start, self._block_sizes):
            rows = head.batch.rows
            if head.batch.first_seq != end[0] + 1 or not len(rows) or rows["time_ns"][0] <= end[1]:
                raise CorruptionError(path, head.offset, "writes that don't follow those before them")
            end = head.batch.end
        if os.fstat(fd).st_size > reader.end:
            log.info("%s: cut at byte %d: what was behind it isn't whole", path, reader.end)
            os.ftruncate(fd, reader.end)
        for at in range(start, reader.end, _COPY_BYTES):
            part = read_exactly(fd, min(_COPY_BYTES, reader.end - at), at, path)
            write_all(fd, part, at)
        os.fdatasync(fd)
        wal.end = wal.durable = reader.end
        # Once more: it may be all of a long interval, and becomes runs behind it before the next of it is taken.
        again = WalReader(path, fd, wal.open_interval_id, self._layout.unit_bytes)
        for head in again.heads(start, self._block_sizes):
            self._add(head.batch, head.body)
            if self.pending_rows >= MAX_PENDING_ROWS:
                self._add_run()
