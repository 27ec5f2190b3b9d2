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
import itertools
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
from xxhash import xxh3_64_intdigest

from pitfs.errors import PitfsError
from pitfs.journal.reader import Copy, JournalReader
from pitfs.journal.search import Found
from pitfs.journal.stream_reader import StreamChunk, next_chunk
from pitfs.journal.writer import Location
from pitfs.model.difference import Columns, by_block
from pitfs.model.digest import DIGEST_BYTES, MASK, MAX_STREAMED_DIGESTS, Digests, digest_of, zero_checksum
from pitfs.model.transfer import MAX_BATCH_BYTES, VolumeInfo
from pitfs.replication.interval import PreparedInterval
from pitfs.storage.files import durable_replace, fsync_directory, write_all

log = logging.getLogger(__name__)

EVERY_S: Final = 600.0  # a mark has digests so often, and if somebody asked for it: they take a row of the catalog each
SAVE_S: Final = 10.0  # what a crash leaves to be applied again
FILL_BYTES: Final = 8 << 20  # read in the background at a time …
FILL_S: Final = 0.25  # … and so often: 32 MiB/s, some 3 % of a processor
RETRY_S: Final = 600.0  # after an error, until it begins again
MAX_PENDING_ROWS: Final = 1 << 18  # not applied yet; 7 MiB
PAGE_ROWS: Final = 512  # of a file: read and written whole, 4 KiB
BATCH_ROWS: Final = 4096  # applied at once, in as many pages at most: 16 MiB

Position = tuple[int, int]  # (seq, time_ns)
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
        self._zeros = np.array([zero_checksum(volume.block_size) for volume in volumes], dtype=np.uint64)
        self._lock = threading.Lock()
        self._fds: list[int] = []
        self._is_resumed = False
        self._position: Position | None = None  # all up to there is in the files, or pending
        self._exact_from = 0  # seq: before, files may have what came later
        self._copy: tuple[Location, Position] | None = None  # the one that is under way, from its first block on
        self._filling: tuple[int, int] | None = None  # (volume, block) that is read next
        self._pending: list[Columns] = []
        self._sums: list[int] | None = None  # of the files; None: not made yet
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
                self._open(os.O_RDWR)
                if position[0] > journal_seq:
                    raise PitfsError(f"{self._path}: seq {position[0]}, the journal has only {journal_seq}")
                self._position = position

    def of_interval(self, prepared: PreparedInterval) -> Digests:
        """Applies an interval; the digests at its end, if they are due and known."""
        interval, rows = prepared.interval, prepared.diff.rows
        all_rows = interval.columns
        columns = Columns(all_rows.volume[rows], all_rows.block[rows], all_rows.seq[rows], all_rows.checksum[rows])
        end = interval.to_seq, interval.to_time_ns
        self._take((interval.from_seq, interval.from_time_ns), end, interval.times, columns, interval.start)
        return self._at_mark(end, interval.mark, interval.bookmark is not None)

    def of_chunk(self, chunk: StreamChunk, start: Position, location: Location) -> StreamChunk:
        """The same for what is streamed, which begins behind `start`, at `location`; with the digests in its mark."""
        if chunk.writes is not None:
            columns = _columns_of(chunk)
            self._take(start, chunk.position, chunk.writes.rows["time_ns"], columns, location)
        mark = chunk.mark
        if mark is None:
            return chunk
        if chunk.writes is None:
            self._take(start, start, np.zeros(0, np.int64), _NOTHING, location)
        digests = self._at_mark((mark.seq, mark.time_ns), mark.mark, mark.bookmark is not None)
        if digests and len(self._volumes) <= MAX_STREAMED_DIGESTS:
            return replace(chunk, mark=msgspec.structs.replace(mark, digests=digests))
        return chunk

    def _take(
        self, start: Position, end: Position, times: npt.NDArray[np.int64], columns: Columns, location: Location
    ) -> None:
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
            self._add(columns, end)

    def _add(self, columns: Columns, end: Position) -> None:
        assert self._position is not None
        if end[0] > self._position[0]:
            new = columns.seq > self._position[0]
            arrays = columns.volume[new], columns.block[new], columns.seq[new], columns.checksum[new]
            self._pending.append(Columns(*arrays))
        self._position = end
        if sum(len(each.seq) for each in self._pending) > MAX_PENDING_ROWS:
            self._apply()

    def _catch_up(self, position: Position, end: Position, location: Location) -> None:
        """Applies what the journal has between two positions, the second one at `location`."""
        sizes = [volume.block_size for volume in self._volumes]
        with contextlib.closing(JournalReader(self._journal, sizes)) as reader:
            if reader.seek_writes_behind(position, location) is not Found.THERE:
                raise PitfsError(f"{self._journal}: it has no longer what came behind write {position[0]}")
            while (chunk := next_chunk(reader, location, MAX_BATCH_BYTES)) is not None and not chunk.begins_anew:
                if chunk.writes is not None:
                    self._add(_columns_of(chunk), chunk.position)
            if self._position != end:
                raise PitfsError(f"{self._journal}: write {end[0]} doesn't follow write {position[0]}")

    def _at_mark(self, position: Position, mark: int, is_named: bool) -> Digests:
        digests: Digests = msgspec.UNSET
        with self._guarded():
            digests = self._due_digests(position, mark, is_named)
        return digests  # noqa: RET504 (an error in the block leaves none)

    def _due_digests(self, position: Position, mark: int, is_named: bool) -> Digests:
        if self._position != position:
            return msgspec.UNSET
        self._apply()
        if self._filling is not None or position[0] < self._exact_from:
            return msgspec.UNSET
        now_s = self._clock()
        if now_s >= self._save_s:
            self._save()
        is_due = now_s >= self._due_s or is_named or mark == self.wanted_mark
        if not is_due and position != self._given:  # again, if the link broke
            return msgspec.UNSET
        if self._sums is None:
            self._sums = [self._sum_of(volume) for volume in range(len(self._volumes))]
        self._due_s, self._given = now_s + EVERY_S, position
        return b"".join(digest.to_bytes(DIGEST_BYTES, "big") for digest in self._sums)

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
                self._sums = [0] * len(self._volumes)
            else:
                self._apply()
                self._forget()
            self._copy, self._position = (copy.location, position), None

    def copied(self, volume: int, first: int, buffer: bytearray, picked: npt.NDArray[np.int64] | None) -> None:
        """A stretch of the copy: all of the blocks from `first` on, or those that are picked."""
        with self._guarded():
            if self._copy is not None:
                self._set_contents(volume, first, buffer, picked)

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
        with self._guarded():
            if not self.needs_reading or seq() is None:
                return
            if self._filling is None:
                log.info("%s: the digests of the volumes are made anew, by reading them", self._directory)
                self._reset()
                self._sums, self._filling, self._exact_from = [0] * len(self._volumes), (0, 0), 1 << 62
            volume, block = self._filling
            stretch = read(volume, block, FILL_BYTES)
            through = seq()  # after reading: all that was read is of this write, or came before
            if through is None:
                return
            if stretch is not None:
                first, buffer = stretch
                self._set_contents(volume, first, buffer, None)
                self._filling = volume, first + len(buffer) // self._volumes[volume].block_size
            elif volume + 1 < len(self._volumes):
                self._filling = volume + 1, 0
            elif self._position is not None:
                self._filling, self._exact_from = None, through

    # -- the files ---------------------------------------------------------------------------------------

    def close(self) -> None:
        """Saves what there is."""
        with self._guarded():
            if self._position is not None and self._filling is None and self._position[0] >= self._exact_from:
                self._apply()
                self._save()
        self._position = None
        self._close()

    def _close(self) -> None:
        while self._fds:
            os.close(self._fds.pop())

    def _open(self, flags: int) -> None:
        self._close()
        for volume in self._volumes:
            path = os.path.join(self._directory, f"{volume.name}.checksums")
            self._fds.append(os.open(path, flags | os.O_CLOEXEC, 0o600))

    def _reset(self) -> None:
        """Begins anew, with files that say that all is zeros."""
        os.makedirs(self._directory, mode=0o700, exist_ok=True)
        self._forget()
        self._open(os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        for fd, volume in zip(self._fds, self._volumes, strict=True):
            os.ftruncate(fd, -(-volume.block_count // PAGE_ROWS) * PAGE_ROWS * 8)
        self._position = self._copy = self._filling = None
        self._exact_from = 0
        self._pending.clear()

    def _forget(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)
            fsync_directory(self._directory)

    def _save(self) -> None:
        for fd in self._fds:
            os.fdatasync(fd)
        durable_replace(self._path, msgspec.json.encode(self._position))
        self._save_s = self._clock() + SAVE_S

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """One thread at a time; an error leads to unknown, and shipping goes on."""
        with self._lock:
            try:
                yield
            except (PitfsError, OSError, msgspec.MsgspecError) as error:
                log.warning("no digests until the volumes were read in the background: %s", error)
                self._position = self._copy = self._filling = self._sums = None
                self._pending.clear()
                self._retry_s = self._clock() + RETRY_S
                with contextlib.suppress(OSError):
                    self._forget()

    def _apply(self) -> None:
        """Sets the checksums of what is pending: of each block the last."""
        if not self._pending:
            return
        names = "volume", "block", "seq", "checksum"
        columns = Columns(*(np.concatenate([getattr(each, name) for each in self._pending]) for name in names))
        order, followed = by_block(columns)
        rows = order[~followed]
        volumes = columns.volume[rows]
        self._pending.clear()
        for volume in np.unique(volumes).tolist():
            here = rows[volumes == volume]
            self._set(volume, columns.block[here], columns.checksum[here])

    def _set_contents(
        self, volume: int, first: int, buffer: bytearray, picked: npt.NDArray[np.int64] | None
    ) -> None:
        """Sets the checksums of blocks in `buffer`, which begins with block `first`."""
        size, view = self._volumes[volume].block_size, memoryview(buffer)
        places = np.arange(len(buffer) // size) if picked is None else picked - first
        checksums = [xxh3_64_intdigest(view[at : at + size]) for at in (places * size).tolist()]
        self._set(volume, first + places, np.array(checksums, dtype=np.uint64))

    def _set(self, volume: int, blocks: npt.NDArray[np.int64], checksums: npt.NDArray[np.uint64]) -> None:
        """Sets checksums of blocks that ascend."""
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
            if self._sums is not None:
                change = digest_of(block, checksum) - digest_of(block, before)
                self._sums[volume] = (self._sums[volume] + change) & MASK

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


_NOTHING: Final = Columns(np.zeros(0, np.uint16), np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.uint64))


def _columns_of(chunk: StreamChunk) -> Columns:
    """A row for each block of streamed writes."""
    assert chunk.writes is not None
    rows = chunk.writes.rows
    counts = rows["block_count"].astype(np.int64)
    within = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    seqs = np.repeat(chunk.writes.first_seq + np.arange(len(rows)), counts)
    blocks = np.repeat(rows["block"].astype(np.int64), counts) + within
    return Columns(np.repeat(rows["volume"], counts), blocks, seqs, np.frombuffer(chunk.checksums, dtype="<u8"))
