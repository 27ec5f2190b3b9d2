"""The stream into a store: writes of the open interval as they come, and its closing while the next one fills.

    none ──first write──► open ──mark──► closing ──committed──► a snapshot, with the interval before it
                           │ ▲
            write → WAL (durable at the next flush) → sorted runs (readable at a commit, a few times a second)

    open → closing    the mark is in the catalog, durably; from then on a start finishes the closing
    closing → closed  a thread makes the objects and commits them; then the WAL is removed

There are at most two open intervals: one that is being closed, and one that takes writes. The next mark waits for the
first. Whatever fails while the disk is written ends the stream: what the WAL has is found when the store is opened
anew.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Final

import msgspec

from pitfs.errors import PitfsError, RemoteProtocolError
from pitfs.model.digest import Digests, are_digests
from pitfs.model.group import NAME_RULE, is_name
from pitfs.model.transfer import Durable, Hello, StreamMark, Writes
from pitfs.storage.files import closed_on_error, fsync_directory
from pitfs.store.catalog.records import Commit, OpenInterval
from pitfs.store.objects.format import ObjectKind, ObjectName
from pitfs.store.open_interval.closing import Closing, streamed_manifest
from pitfs.store.open_interval.wal import WriteAheadLog
from pitfs.store.open_interval.writer import MAX_PENDING_ROWS, OpenIntervalWriter
from pitfs.store.open_interval.writes import WriteCheck
from pitfs.store.transfer.position import mismatch, no_more_ids
from pitfs.store.transfer.recovery import StagingArea
from pitfs.store.transfer.writable_store import WritableStore

log = logging.getLogger(__name__)

# What came becomes readable so often, or when MAX_PENDING_ROWS wait for it: it costs a commit and a sorted run.
READABLE_S: Final = 0.25


class Stream:
    """Takes writes, flushes and marks; its methods are called one at a time.

    Args:
        area: staging/ of the store.
        hello: whose writes will come.
        clock: seconds that only go forward.
    """

    def __init__(self, store: WritableStore, area: StagingArea, hello: Hello, clock: Callable[[], float]) -> None:
        self._store, self._catalog, self._area, self._hello, self._clock = store, store.catalog, area, hello, clock
        self._check = WriteCheck(self._catalog.path, hello.volumes)
        self._open: OpenIntervalWriter | None = None
        self._closing: Closing | None = None
        self._is_broken = self._is_fenced = False
        self._readable_at_s = clock() - READABLE_S  # when what had come was made readable last

    def recover(self) -> None:
        """Finishes closings that were cut off, and takes up what is open. Raises as `write`, and CorruptionError."""
        for record in self._catalog.open_intervals():
            if record.mark:
                log.info("%s: closing the interval of mark %d, which was cut off", self._catalog.path, record.mark)
                Closing(record, self._store, self._area).run()
                continue
            self._open = OpenIntervalWriter.recover(record, self._store)
            if self._open is None:
                path = self._store.objects.path_of(record.wal)
                with suppress(FileNotFoundError):
                    os.unlink(path)
                    fsync_directory(os.path.dirname(path))
                self._catalog.drop_open_interval(record.id)
            else:
                self._publish(0, durable=True)

    @property
    def end(self) -> tuple[int, int]:
        """Position of the last write that came; zeros in an empty store."""
        if self._open is not None:
            return self._open.end
        if self._closing is not None:
            return self._closing.record.to_seq, self._closing.record.to_time_ns
        last = self._catalog.last_snapshot()
        return (last.seq, last.time_ns) if last else (0, 0)

    @property
    def durable_end(self) -> tuple[int, int]:
        """Position of the last write that survives power loss, as of the last flush, mark or start."""
        return self._open.durable_end if self._open is not None else self.end

    @property
    def mark(self) -> int:
        """The last one that came, whether its snapshot is committed or not."""
        return self._closing.record.mark if self._closing is not None else self._catalog.meta("mark")

    def write(self, writes: Writes) -> None:
        """Takes the next writes.

        Raises:
            PositionMismatchError: they don't lead on from `end`.
            RemoteProtocolError: they are invalid.
            OSError, CapacityError: the disk refuses, or is full: then it goes on when the store is opened anew.
        """
        self._check_usable()
        if self._open is None and not self.mark:
            raise mismatch(self._catalog.path, "the store is empty and takes a full sync first")
        batch, body = self._check.take(writes, *self.end)
        with self._breaks():
            self._fence()
            writer = self._open or self._begin()
            writer.append(batch, body)
            if writer.pending_rows >= MAX_PENDING_ROWS:
                self._publish(0)

    def flush(self, protected_through_ns: int) -> Durable:
        """Makes all that came durable, and readable if that is due. Raises as `write`."""
        self._check_usable()
        if not 0 <= protected_through_ns < 1 << 62:
            raise RemoteProtocolError(f"a flush at {protected_through_ns} ns: a time out of range")
        with self._breaks():
            now_s = self._clock()
            if now_s - self._readable_at_s >= READABLE_S:
                self._publish(protected_through_ns)
                self._readable_at_s = now_s
            elif self._open is not None:
                self._open.sync()
            return self._durable()

    def take_mark(self, mark: StreamMark) -> Durable:
        """Closes the interval at its end. Raises as `write`."""
        self._check_usable()
        self._check_mark(mark)
        self.wait_for_closing()
        with self._breaks():
            self._fence()
            if self._open is None:
                position = mark.seq, mark.time_ns
                manifest = streamed_manifest(
                    mark.mark, position, position, mark.protected_through_ns, mark.bookmark
                )
                self._catalog.commit(Commit(msgspec.structs.replace(manifest, digests=mark.digests), None))
            else:
                numbers = mark.mark, mark.protected_through_ns
                self._close_open(self._open, *numbers, mark.bookmark, mark.digests).start()
            return self._durable()

    def close_here(self) -> None:
        """Closes what is open where it ends, under the mark before it: what follows comes as a transfer."""
        self.wait_for_closing()
        if self._open is not None:
            with self._breaks():
                self._close_open(self._open, self.mark, self._catalog.meta("protected_through_ns"), None).run()
                self._closing = None

    def wait_for_closing(self) -> None:
        """Returns when no closing is under way. Raises what a closing did."""
        self._check_usable()
        self._end_closing()

    def publish(self) -> None:
        """Makes readable what came: nothing else would, where no flush comes any more. Raises as `write`."""
        if self._open is not None and self._open.has_news:
            self._check_usable()
            with self._breaks():
                self._publish(0)

    def close(self) -> None:
        """Waits for the closing under way, and makes readable what came."""
        try:
            if not self._is_broken:
                self.publish()
        except (PitfsError, OSError) as error:
            log.warning(
                "%s: what came last is readable when the store is opened the next time: %s", self._catalog.path, error
            )
        finally:
            closing, writer, self._closing, self._open = self._closing, self._open, None, None
            if writer is not None:
                writer.close()
        if closing is not None:
            try:
                closing.join()
            except PitfsError as error:
                log.warning("%s: goes on when the store is opened the next time", error)

    def _fence(self) -> None:
        """Refuses senders of earlier epochs from here on; not before what came leads on, as with transfers."""
        if not self._is_fenced:
            self._catalog.fence(self._hello.epoch, self._hello.instance)
            self._is_fenced = True

    def _check_usable(self) -> None:
        """Raises what a closing did, and after an error of a disk that nothing goes on."""
        if self._is_broken:
            raise PitfsError(f"{self._catalog.path}: the stream can't go on after an error: begin the session anew")
        if self._closing is not None and self._closing.is_done:
            self._end_closing()

    def _end_closing(self) -> None:
        if self._closing is not None:
            with self._breaks():
                self._closing.join()
            self._closing = None

    def _check_mark(self, mark: StreamMark) -> None:
        if not self.mark or mark.mark != self.mark + 1:
            raise mismatch(self._catalog.path, f"production sends mark {mark.mark}, the store has {self.mark}")
        if (mark.seq, mark.time_ns) != self.end:
            problem = f"production's mark {mark.mark} is at seq {mark.seq}, the store is at seq {self.end[0]}"
            raise mismatch(self._catalog.path, problem)
        if not mark.time_ns <= mark.protected_through_ns < 1 << 62:
            raise RemoteProtocolError(f"mark {mark.mark}: times that don't go forward")
        if mark.bookmark is not None and not is_name(mark.bookmark):
            raise RemoteProtocolError(f"bookmark {mark.bookmark[:80]!r}: must be {NAME_RULE}")
        if not are_digests(mark.digests, len(self._hello.volumes)):
            raise RemoteProtocolError(f"mark {mark.mark}: digests that aren't one of each volume")

    def _begin(self) -> OpenIntervalWriter:
        """Opens an interval behind `end`: its WAL is durable before the catalog has it, that before the first write."""
        catalog, (seq, time_ns) = self._catalog, self.end
        last = catalog.last_snapshot()
        base = self._closing.record.end_snapshot_id if self._closing is not None else last.id if last is not None else 0
        number = catalog.next_snapshot_id()
        if number + 1 > self._store.layout.max_snapshot_id:
            raise no_more_ids(catalog.path, self._store.layout)
        for each in (number, number + 1):
            self._area.recover_transfer(each)
        self._area.clear(self._area.path)  # a transfer that was to follow `end`
        path = self._store.path_for(ObjectName(ObjectKind.JOURNAL_BLOCKS, number))
        wal = WriteAheadLog.create(path, number, self._store.history, self._store.layout)
        with closed_on_error(wal.fd):
            fsync_directory(os.path.dirname(path))
            record = OpenInterval(number, number + 1, base, seq, time_ns, seq, time_ns, None, wal.end)
            catalog.put_open_interval(record, {}, 0, durable=True)
        self._open = OpenIntervalWriter(record, wal, self._store)
        return self._open

    def _publish(self, protected_through_ns: int, durable: bool = False) -> None:
        """Makes all that came durable and readable."""
        protected_through_ns = max(protected_through_ns, self.end[1])  # all writes up to the last one are in
        if self._open is not None and self._open.has_news:
            minutes = self._open.make_readable()
            self._catalog.put_open_interval(self._open.record, minutes, protected_through_ns, durable)
        elif protected_through_ns > self._catalog.meta("protected_through_ns"):
            self._catalog.protect_through(protected_through_ns)

    def _close_open(
        self, writer: OpenIntervalWriter, mark: int, protected_through_ns: int, bookmark: str | None,
        digests: Digests = msgspec.UNSET,
    ) -> Closing:  # fmt: skip
        """The closing of what is open, which is marked as closed in the catalog, durably."""
        minutes = writer.make_readable()
        protected_ns = max(protected_through_ns, writer.end[1])
        record = replace(writer.record, mark=mark, protected_through_ns=protected_ns, bookmark=bookmark)
        self._catalog.put_open_interval(record, minutes, protected_ns, durable=True, digests=digests)
        writer.close()
        self._open, self._closing = None, Closing(record, self._store, self._area)
        return self._closing

    def _durable(self) -> Durable:
        return Durable(*self.end, self._catalog.meta("mark"), self._catalog.meta("protected_through_ns"))

    @contextmanager
    def _breaks(self) -> Iterator[None]:
        """After any error in it nothing goes on: what the WAL has then is found when the store is opened anew."""
        try:
            yield
        except BaseException:
            self._is_broken = True
            raise
