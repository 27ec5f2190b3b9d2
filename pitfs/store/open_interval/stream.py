"""The stream into a store: writes of the open interval as they come, and its closing while the next one fills.

    write → log (durable at the next flush) → pieces (readable at a commit, a few times a second)
    mark → the tail is closed: durable in the catalog → an interval is made of it in a thread → the log is removed

There are at most two tails: one that is being closed and one that takes writes; the next mark waits for the first.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Final

from pitfs.errors import CapacityError, PitfsError, PositionMismatchError, RemoteProtocolError
from pitfs.model.group import is_name
from pitfs.model.transfer import Bookmark, Durable, Hello, Manifest, StreamMark, TransferKind, Writes
from pitfs.storage.files import fsync_directory
from pitfs.store.catalog.catalog import Catalog
from pitfs.store.catalog.records import Commit, OpenInterval
from pitfs.store.index.block_maps import NodeReader
from pitfs.store.objects.format import MAX_SNAPSHOT_ID
from pitfs.store.objects.pool import ObjectPool
from pitfs.store.open_interval.closing import CAUSE, Closing
from pitfs.store.open_interval.wal import WriteAheadLog
from pitfs.store.open_interval.writer import MAX_PENDING_ROWS, OpenIntervalWriter, log_file
from pitfs.store.open_interval.writes import WriteCheck
from pitfs.store.transfer.recovery import StagingArea

log = logging.getLogger(__name__)

# What came becomes readable so often, or when MAX_PENDING_ROWS wait for it: it costs a commit and a sorted piece.
READABLE_S: Final = 0.25
_HINT: Final = "begin the session anew, so that production learns where the store stands"


class Stream:
    """Takes writes, flushes and marks; its methods are called one at a time.

    Args:
        catalog, objects, nodes, area: of the store.
        history: 16 bytes. hello: whose writes will come.
        clock: seconds that only go forward.
    """

    def __init__(
        self, catalog: Catalog, objects: ObjectPool, nodes: NodeReader, area: StagingArea, history: bytes,
        hello: Hello, clock: Callable[[], float],
    ) -> None:  # fmt: skip
        self._catalog, self._objects, self._nodes, self._area = catalog, objects, nodes, area
        self._history, self._hello, self._clock = history, hello, clock
        self._check = WriteCheck(hello.volumes)
        self._tail: OpenIntervalWriter | None = None
        self._closing: Closing | None = None
        self._durable_end = 0, 0
        self._is_broken = self._is_fenced = False
        self._readable_at_s = clock() - READABLE_S  # when what had come was made readable last

    def recover(self) -> None:
        """Finishes closings that were cut off, and takes up the open tail. Raises as `write`, and CorruptionError."""
        for tail in self._catalog.tails():
            if tail.mark:
                log.info("%s: closing the interval of mark %d, which was cut off", self._catalog.path, tail.mark)
                self._new_closing(tail).run()
                continue
            found = OpenIntervalWriter.recover(tail, self._objects.directory, self._objects, self._check.block_sizes)
            if found is None:
                self._remove_log(tail.id)
                self._catalog.drop_tail(tail.id)
                continue
            self._tail = found
            self._publish(0, durable=True)
            self._durable_end = found.end

    @property
    def end(self) -> tuple[int, int]:
        """Position of the last write that came; zeros in an empty store."""
        if self._tail is not None:
            return self._tail.end
        if self._closing is not None:
            return self._closing.tail.to_seq, self._closing.tail.to_time_ns
        last = self._catalog.last_snapshot()
        return (last.seq, last.time_ns) if last else (0, 0)

    @property
    def durable_end(self) -> tuple[int, int]:
        """Position of the last write that survives power loss, as of the last flush, mark or start."""
        return self._durable_end if self._tail is not None else self.end

    @property
    def mark(self) -> int:
        """The last one that came, whether its snapshot is committed or not."""
        return self._closing.tail.mark if self._closing is not None else self._catalog.meta("mark")

    def write(self, writes: Writes) -> None:
        """Takes the next writes.

        Raises:
            PositionMismatchError: they don't lead on from `end`.
            RemoteProtocolError: they can't be.
            OSError, CapacityError: the disk refuses, or is full: then it goes on when the store is opened anew.
        """
        self._check_usable()
        if self._tail is None and not self.mark:
            raise PositionMismatchError(
                f"{self._catalog.path}: the store is empty and takes a full copy first: {_HINT}"
            )
        batch = self._check.take(writes, *self.end)
        with self._breaks():
            self._fence()
            tail = self._tail or self._begin_tail()
            tail.append(batch)
            if tail.pending_rows >= MAX_PENDING_ROWS:
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
            elif self._tail is not None:
                self._tail.log.sync()
            return self._durable()

    def take_mark(self, mark: StreamMark) -> Durable:
        """Closes the interval at its end. Raises as `write`."""
        self._check_usable()
        self._check_mark(mark)
        self.wait_for_closing()
        with self._breaks():
            self._fence()
            if self._tail is None:
                self._catalog.commit(Commit(self._empty_manifest(mark), None))
            else:
                self._close_tail(mark.mark, mark.protected_through_ns, mark.bookmark).start()
            return self._durable()

    def close_here(self) -> None:
        """Closes a tail with writes where it ends, under the mark before it: what follows comes as a transfer."""
        self.wait_for_closing()
        if self._tail is not None:
            with self._breaks():
                self._close_tail(self.mark, self._catalog.meta("protected_through_ns"), None).run()
                self._closing = None

    def wait_for_closing(self) -> None:
        """Returns when no closing is under way. Raises what a closing did."""
        self._check_usable()
        if self._closing is not None:
            with self._breaks():
                self._closing.join()
            self._closing = None

    def publish(self) -> None:
        """Makes readable what came: nothing else would, where no flush comes any more. Raises as `write`."""
        if self._tail is not None and self._tail.has_news:
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
            closing, tail, self._closing, self._tail = self._closing, self._tail, None, None
            if tail is not None:
                tail.close()
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
            with self._breaks():
                self._closing.join()
            self._closing = None

    def _check_mark(self, mark: StreamMark) -> None:
        if not self.mark or mark.mark != self.mark + 1:
            raise PositionMismatchError(
                f"{self._catalog.path}: production sends mark {mark.mark}, the store has {self.mark}: {_HINT}"
            )
        if (mark.seq, mark.time_ns) != self.end:
            raise PositionMismatchError(
                f"{self._catalog.path}: production's mark {mark.mark} is at seq {mark.seq}, the store is at seq "
                f"{self.end[0]}: {_HINT}"
            )
        if not mark.time_ns <= mark.protected_through_ns < 1 << 62:
            raise RemoteProtocolError(f"mark {mark.mark}: times that don't go forward")
        if mark.bookmark is not None and not is_name(mark.bookmark):
            raise RemoteProtocolError(f"bookmark {mark.bookmark[:80]!r}: must be 1 to 64 of A-Z a-z 0-9 . _ -")

    def _begin_tail(self) -> OpenIntervalWriter:
        """A new tail behind `end`: its log is durable before the catalog has it, and that before the first write."""
        catalog, (seq, time_ns) = self._catalog, self.end
        last = catalog.last_snapshot()
        third = self._closing.tail.end_snapshot_id if self._closing is not None else last.id if last is not None else 0
        number = catalog.next_snapshot_id()
        if number + 1 > MAX_SNAPSHOT_ID:
            raise CapacityError(f"{catalog.path}: no more than {MAX_SNAPSHOT_ID} snapshots fit in a store")
        for each in (number, number + 1):
            self._area.settle_transfer(each)
        self._area.clear(self._area.path)  # a transfer that was to follow `end`
        tail_log = WriteAheadLog.create(
            os.path.join(self._objects.directory, log_file(number)), number, self._history
        )
        try:
            fsync_directory(self._objects.directory)
            facts = OpenInterval(number, number + 1, third, seq, time_ns, seq, time_ns, None, tail_log.end)
            catalog.put_tail(facts, {}, 0, durable=True)
        except BaseException:
            tail_log.close()
            raise
        self._tail = OpenIntervalWriter(facts, tail_log, self._objects, self._check.block_sizes)
        self._durable_end = self._tail.end
        return self._tail

    def _publish(self, protected_through_ns: int, durable: bool = False) -> None:
        """Makes all that came durable and readable."""
        tail = self._tail
        protected_through_ns = max(protected_through_ns, self.end[1])  # all writes up to the last one are in
        if tail is None or not tail.has_news:
            if protected_through_ns > self._catalog.meta("protected_through_ns"):
                self._catalog.protect_through(protected_through_ns)
            return
        minutes = tail.make_readable()
        self._catalog.put_tail(tail.facts, minutes, protected_through_ns, durable)
        self._durable_end = tail.end

    def _close_tail(self, mark: int, protected_through_ns: int, bookmark: str | None) -> Closing:
        """The closing of the tail, which is marked as closed in the catalog, durably."""
        tail = self._tail
        assert tail is not None
        minutes = tail.make_readable()
        protected_ns = max(protected_through_ns, tail.end[1])
        facts = replace(tail.facts, mark=mark, protected_through_ns=protected_ns, bookmark=bookmark)
        self._catalog.put_tail(facts, minutes, protected_ns, durable=True)
        tail.close()
        self._tail, self._closing = None, self._new_closing(facts)
        return self._closing

    def _new_closing(self, tail: OpenInterval) -> Closing:
        return Closing(
            tail, self._catalog, self._objects, self._nodes, self._area, self._history, self._hello.volumes
        )

    def _remove_log(self, tail: int) -> None:
        try:
            os.unlink(os.path.join(self._objects.directory, log_file(tail)))
        except FileNotFoundError:
            return
        fsync_directory(self._objects.directory)

    def _empty_manifest(self, mark: StreamMark) -> Manifest:
        position = mark.seq, mark.time_ns
        bookmarks = () if mark.bookmark is None else (Bookmark(mark.bookmark, *position),)
        return Manifest(
            mark.mark, TransferKind.INTERVAL, *position, *position, None, mark.protected_through_ns, None, CAUSE,
            0, 0, 0, f"stream-{mark.mark}", bookmarks=bookmarks,
        )  # fmt: skip

    def _durable(self) -> Durable:
        if self._tail is not None:
            self._durable_end = self._tail.end
        catalog = self._catalog
        return Durable(*self.end, catalog.meta("mark"), catalog.meta("protected_through_ns"))

    @contextmanager
    def _breaks(self) -> Iterator[None]:
        """After any error in it nothing goes on: what the log has then is found when the store is opened anew."""
        try:
            yield
        except BaseException:
            self._is_broken = True
            raise
