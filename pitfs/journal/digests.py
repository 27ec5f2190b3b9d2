"""The digest of each volume at a mark, without reading the volume: kept up from the checksums that the splitter took.

The group's state directory has `digests/`, with a file of each volume: the checksum of each block, 8 bytes, 0 for one
of zeros (0.2 % of a volume in blocks of 4 KiB, and sparse); and `position`, JSON: [seq, time_ns].

    unknown ──complete copy begins──► copying ──its last block──► known ──copy of changes, on that position──► copying
       └─background reading begins─► filling ──all read, and all that was written meanwhile is applied──► known

Setting the checksum of a block is idempotent. So the files may be ahead of `position`, and behind it never: what was
written since is applied again, from the journal where it has come to the replica already. Until then, to the last write
that the journal had at the start, no digest is given. The sums are made of the files once, and kept up from there.

Background reading has no need for a copy's before-images: a block that it read too new was written again meanwhile, and
that write is applied later. Whatever doesn't fit together leads back to unknown: a digest that is wrong never goes out.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from pitfs.errors import PitfsError
from pitfs.journal.checksum_files import ChecksumFiles
from pitfs.journal.reader import Copy, Interval, JournalReader
from pitfs.journal.search import Found
from pitfs.journal.stream_reader import StreamChunk, next_chunk
from pitfs.journal.writer import Location
from pitfs.model.difference import Columns, Rows, by_block
from pitfs.model.digest import DIGEST_BYTES, MAX_STREAMED_DIGESTS, Digests
from pitfs.model.transfer import MAX_BATCH_BYTES, VolumeInfo
from pitfs.storage.files import durable_replace, fsync_directory

log = logging.getLogger(__name__)

EVERY_S: Final = 600.0  # a mark has digests so often, and if somebody asked for it: they take a row of the catalog each
SAVE_S: Final = 60.0  # what is pending is applied so often: a page for many blocks then, and blocks once
FILL_BYTES: Final = 8 << 20  # read in the background at a time …
FILL_S: Final = 0.25  # … and so often: 32 MiB/s, some 3 % of a processor
RETRY_S: Final = 600.0  # after an error, until it begins again
MAX_PENDING_ROWS: Final = 1 << 18  # 7 MiB; more than that is applied at once
_MADE_OF_ROWS: Final = 64  # what the arrays of a few rows take, in rows

Position = tuple[int, int]  # (seq, time_ns)
MakeColumns = Callable[[], Columns]
ReadStretch = Callable[[int, int, int], tuple[int, bytearray] | None]


class VolumeDigests:
    """Follows what is shipped. Its methods wait for the disk, and may be called from several threads.

    Args:
        clock: seconds that only go forward.

    Attributes:
        wanted_mark: this one has digests, however long ago others had.
    """

    def __init__(
        self, journal_directory: str, volumes: Sequence[VolumeInfo], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._journal, self._volumes, self._clock = journal_directory, volumes, clock
        self._directory = os.path.join(os.path.dirname(journal_directory), "digests")
        self._path = os.path.join(self._directory, "position")
        self._files = ChecksumFiles(self._directory, volumes)
        self._lock = threading.Lock()
        self._is_resumed = False
        self._forgotten = 0  # how often `position` was removed
        self._position: Position | None = None  # all up to there is in the files, or pending
        self._exact_from = 0  # seq: before, files may have what came later
        self._copy: tuple[Location, Position] | None = None  # the one that is under way, from its first block on
        self._filling: tuple[int, int] | None = None  # (volume, block) that is read next
        self._pending: list[tuple[int, MakeColumns]] = []  # only the rows behind that seq
        self._pending_rows = 0
        self._due_s = self._save_s = self._retry_s = clock()
        self._given: Position | None = None  # those that were given last are of it
        self.wanted_mark = 0

    # -- what is shipped ---------------------------------------------------------------------------------

    def resume(self, journal_seq: int) -> None:
        """Takes up what an earlier process left, once; `journal_seq`: the last write that the journal has."""
        with self._guarded():
            if self._is_resumed:
                return
            self._is_resumed, self._exact_from = True, journal_seq
            with contextlib.suppress(FileNotFoundError), open(self._path, "rb") as file:
                position = msgspec.json.decode(file.read(), type=tuple[int, int])
                self._files.open()
                if position[0] > journal_seq:
                    raise PitfsError(f"{self._path}: seq {position[0]}, the journal has only {journal_seq}")
                self._position = position

    def of_interval(self, interval: Interval, rows: Rows) -> Digests:
        """Applies an interval; the digests at its end, if they are due and known.

        Args:
            rows: the last one of each block.
        """
        columns, end = interval.columns.picked(rows), (interval.to_seq, interval.to_time_ns)
        start = interval.from_seq, interval.from_time_ns
        self._take(start, end, interval.times, interval.start, lambda: columns, len(rows))
        return self._at_mark(end, interval.mark, interval.bookmark is not None)

    def of_chunk(self, chunk: StreamChunk, start: Position, location: Location) -> StreamChunk:
        """The same for what is streamed, which begins behind `start`, at `location`; with the digests in its mark."""
        if chunk.writes is not None:
            times, columns = chunk.writes.rows["time_ns"], _columns_of(chunk)
            self._take(start, chunk.position, times, location, columns, len(chunk.checksums) // 8)
        mark = chunk.mark
        if mark is None:
            return chunk
        if chunk.writes is None:
            self._take(start, start, np.zeros(0, np.int64), location, _no_columns, 0)
        digests = self._at_mark((mark.seq, mark.time_ns), mark.mark, mark.bookmark is not None)
        if digests and len(self._volumes) <= MAX_STREAMED_DIGESTS:
            return replace(chunk, mark=msgspec.structs.replace(mark, digests=digests))
        return chunk

    def _take(
        self, start: Position, end: Position, times: npt.NDArray[np.int64], location: Location, columns: MakeColumns,
        row_count: int,
    ) -> None:  # fmt: skip
        """Takes the writes in (start, end]; `times` are theirs, and `location` is where they begin."""
        with self._guarded():
            if self._position is None:
                self._position = start if self._filling is not None else None
            if self._position is None:
                return
            if start[0] > self._position[0]:
                self._catch_up(self._position, start, location)
            seq, time_ns = self._position
            if end[0] < seq:
                return
            known_ns = start[1] if start[0] == seq else int(times[seq - start[0] - 1])
            if known_ns != time_ns:
                raise PitfsError(f"{self._path}: write {seq} isn't the one that the journal has")
            self._add(columns, row_count, end)

    def _add(self, columns: MakeColumns, row_count: int, end: Position) -> None:
        assert self._position is not None
        if end[0] > self._position[0]:
            self._pending.append((self._position[0], columns))
            self._pending_rows += row_count + _MADE_OF_ROWS
        self._position = end
        if self._pending_rows > MAX_PENDING_ROWS:
            self._apply()

    def _catch_up(self, position: Position, end: Position, location: Location) -> None:
        """Applies what the journal has between two positions, the second one at `location`."""
        sizes = [volume.block_size for volume in self._volumes]
        with contextlib.closing(JournalReader(self._journal, sizes)) as reader:
            if reader.seek_writes_behind(position, location) is not Found.THERE:
                raise PitfsError(f"{self._journal}: it has no longer what came behind write {position[0]}")
            while (chunk := next_chunk(reader, location, MAX_BATCH_BYTES)) is not None and not chunk.begins_anew:
                if chunk.writes is not None:
                    self._add(_columns_of(chunk), len(chunk.checksums) // 8, chunk.position)
            if self._position != end:
                raise PitfsError(f"{self._journal}: write {end[0]} doesn't follow write {position[0]}")

    def _at_mark(self, position: Position, mark: int, is_named: bool) -> Digests:
        digests: Digests = msgspec.UNSET
        with self._guarded():
            digests = self._due_digests(position, mark, is_named)
        return digests  # noqa: RET504 (an error in the block leaves none)

    def _due_digests(self, position: Position, mark: int, is_named: bool) -> Digests:
        if self._position != position or self._filling is not None or position[0] < self._exact_from:
            return msgspec.UNSET
        now_s = self._clock()
        is_due = now_s >= self._due_s or is_named or mark == self.wanted_mark
        if not is_due and position != self._given:  # again, if the link broke
            return msgspec.UNSET
        self._apply()
        self._due_s, self._given = now_s + EVERY_S, position
        return b"".join(digest.to_bytes(DIGEST_BYTES, "big") for digest in self._files.digests())

    # -- copies, and reading in the background -----------------------------------------------------------

    def begin_copy(self, copy: Copy, cursor: tuple[int, ...]) -> None:
        """A copy begins, or goes on at `cursor`: its blocks come next."""
        with self._guarded():
            position = copy.seq, copy.time_ns
            if self._position == position or self._copy == (copy.location, position):
                return
            # A copy of changes has all blocks that were written behind its base, so it may be behind `position`.
            builds_on = self._position is not None and self._position[0] >= copy.start.from_seq
            if cursor or not (copy.start.is_complete or builds_on):
                raise PitfsError(f"{self._directory}: a copy builds on what isn't known here")
            if copy.start.is_complete:
                self._reset()
            else:
                self._apply()
                self._forget()
            self._copy, self._position = (copy.location, position), None

    def copied(self, volume: int, first: int, buffer: bytearray, picked: npt.NDArray[np.int64] | None) -> None:
        """A stretch of the copy: all of the blocks from `first` on, or those that are picked."""
        with self._guarded():
            if self._copy is not None:
                self._files.set_contents(volume, first, buffer, picked)

    def end_copy(self) -> None:
        """All of its blocks came."""
        with self._guarded():
            if self._copy is not None:
                self._position, self._copy = self._copy[1], None
                self._exact_from = max(self._exact_from, self._position[0])
                if self._filling is None:
                    self._save()

    @property
    def needs_reading(self) -> bool:
        """Whether `fill` has something to do."""
        is_unknown = self._is_resumed and self._position is None and self._copy is None
        return self._filling is not None or (is_unknown and self._clock() >= self._retry_s)

    def fill(self, read: ReadStretch, seq: Callable[[], int | None]) -> None:
        """Reads the next stretch in the background.

        Args:
            read: of (volume, block, bytes): the first block from there on that isn't in a hole, and the blocks from
                that one on; None behind the last.
            seq: of the last write now, None where writes aren't journalled or a copy is under way.
        """
        if seq() is None:
            return
        with self._guarded():
            if not self.needs_reading:
                return
            if self._filling is None:
                log.info("%s: the digests of the volumes are made anew, by reading them", self._directory)
                self._reset()
                self._filling, self._exact_from = (0, 0), 1 << 62
            (volume, block), changes = self._filling, self._files.changes
        stretch = read(volume, block, FILL_BYTES)  # without the lock: in mode sync, writes wait for what is shipped
        through = seq()  # after reading: all that was read is of this write, or came before
        with self._guarded():
            if through is None or self._files.changes != changes:  # newer checksums may have been set: it is read again
                return
            if stretch is not None:
                first, buffer = stretch
                self._files.set_contents(volume, first, buffer, None)
                self._filling = volume, first + len(buffer) // self._volumes[volume].block_size
            elif volume + 1 < len(self._volumes):
                self._filling = volume + 1, 0
            elif self._position is not None:
                self._filling, self._exact_from = None, through

    # -- the files ---------------------------------------------------------------------------------------

    def save(self) -> None:
        """Makes durable what came, now and then. Shipping, for which writes wait in mode sync, waits less for this."""
        failure: OSError | None = None
        position, forgotten = self._position, -1
        with self._guarded():
            if not self._is_known() or self._clock() < self._save_s:
                return
            self._apply()
            self._save_s = self._clock() + SAVE_S
            position, forgotten = self._position, self._forgotten
        try:
            self._files.sync()
        except OSError as error:
            failure = error
        with self._guarded():
            if forgotten != self._forgotten:
                return
            if failure is not None:
                raise failure
            durable_replace(self._path, msgspec.json.encode(position))

    def _is_known(self) -> bool:
        """Whether the files, with what is pending, have the state at `position`."""
        return self._position is not None and self._filling is None and self._position[0] >= self._exact_from

    def close(self) -> None:
        """Saves what there is."""
        with self._guarded():
            if self._is_known():
                self._save()
        self._position = None
        self._files.close()

    def _reset(self) -> None:
        """Begins anew, with files that say that all is zeros."""
        os.makedirs(self._directory, mode=0o700, exist_ok=True)
        self._forget()
        self._files.clear()
        self._position = self._copy = self._filling = None
        self._exact_from = 0
        self._drop_pending()

    def _forget(self) -> None:
        self._forgotten += 1
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)
            fsync_directory(self._directory)

    def _save(self) -> None:
        self._apply()
        self._files.sync()
        durable_replace(self._path, msgspec.json.encode(self._position))

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """One thread at a time; an error leads to unknown, and shipping goes on."""
        with self._lock:
            try:
                yield
            except (PitfsError, OSError, msgspec.MsgspecError) as error:
                log.warning("no digests until the volumes were read in the background: %s", error)
                self._position = self._copy = self._filling = self._files.sums = None
                self._files.changes += 1
                self._drop_pending()
                self._retry_s = self._clock() + RETRY_S
                with contextlib.suppress(OSError):
                    self._forget()

    def _drop_pending(self) -> None:
        self._pending.clear()
        self._pending_rows = 0

    def _apply(self) -> None:
        """Sets the checksums of what is pending: of each block the last."""
        if not self._pending:
            return
        made = [(after, make()) for after, make in self._pending]
        parts = [each.picked(np.flatnonzero(each.seq > after)) for after, each in made]
        names = "volume", "block", "seq", "checksum"
        columns = Columns(*(np.concatenate([getattr(each, name) for each in parts]) for name in names))
        order, followed = by_block(columns)
        last = columns.picked(order[~followed])
        self._drop_pending()
        for volume in np.unique(last.volume).tolist():
            here = last.volume == volume
            self._files.set(volume, last.block[here], last.checksum[here])


def _no_columns() -> Columns:
    return Columns(np.zeros(0, np.uint16), np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.uint64))


def _columns_of(chunk: StreamChunk) -> MakeColumns:
    """A row for each block of streamed writes; not made before they are applied, since in mode sync writes wait."""
    assert chunk.writes is not None
    rows, first_seq, checksums = chunk.writes.rows, chunk.writes.first_seq, chunk.checksums

    def columns() -> Columns:
        counts = rows["block_count"].astype(np.int64)
        within = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
        seqs = np.repeat(first_seq + np.arange(len(rows)), counts)
        blocks = np.repeat(rows["block"].astype(np.int64), counts) + within
        return Columns(np.repeat(rows["volume"], counts), blocks, seqs, np.frombuffer(checksums, dtype="<u8"))

    return columns
