"""The open interval's writes go to the replica as they come: modes async and sync, and dynamic on a good link."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

import trio

from pitfs.journal.durability import Durability
from pitfs.journal.reader import JournalReader
from pitfs.journal.stream_reader import NOTHING_DIGEST, StreamChunk, next_chunk
from pitfs.journal.writer import Location
from pitfs.link.sessions.connect import SenderSession
from pitfs.model.record import MAX_BODY_BYTES
from pitfs.model.transfer import MAX_BATCH_BYTES, Durable, Flush, StreamMark, VolumeInfo, Welcome
from pitfs.replication.bandwidth import Budget
from pitfs.replication.status import ReplicationStatus
from pitfs.splitter.client import SplitterClient
from pitfs.splitter.messages import SplitterStatus

TURN_S: Final = 0.15  # how often the journal is looked at: with the replica's 0.25 s until readable, well below 1 s
PULSE_S: Final = 0.25  # how often time goes on where nothing is written
AHEAD_S: Final = 0.5  # of the link's rate: what may be under way, so that lag isn't made by our own queues
MIN_WINDOW_BYTES: Final = 256 << 10
UNKNOWN_WINDOW_BYTES: Final = 16 << 20  # while the rate isn't known
MAX_WINDOW_BYTES: Final = 32 << 20
MEASURE_S, MEASURE_BYTES = 1.0, 256 << 10  # the least over which a rate is measured
MAX_SAMPLES: Final = 1024
SAMPLE_S: Final = 0.1

ReadStatus = Callable[[], Awaitable[SplitterStatus]]
GiveBack = Callable[[int], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class _Sent:
    """A Flush or mark without answer: where the journal goes on, which segment has the last record, what it took."""

    location: Location
    segment: int
    size_bytes: int
    at_s: float


class Stream:
    """The stream of one group; of one connection between `begin` and `end`.

    Args:
        splitter_status: asks the splitter for its status.
        give_back: called with the segment before which nothing is needed for shipping any more.

    Attributes:
        active: whether the open interval is streamed.
        position: (seq, time_ns) of the last write streamed; mark: the last mark.
        durable_seq: of the replica.
        journalled_lsn: of the journal at the last turn.
        caught_up: whether the replica had durably what was in the journal at the last turn.
    """

    def __init__(
        self,
        reader: JournalReader,
        volumes: tuple[VolumeInfo, ...],
        standing: ReplicationStatus,
        budget: Budget,
        durability: Durability,
        splitter_status: ReadStatus,
        give_back: GiveBack,
    ) -> None:
        self._reader, self._standing, self._budget = reader, standing, budget
        self._splitter_status = splitter_status
        self._durability = durability
        self._give_back = give_back
        self._block_sizes = [volume.block_size for volume in volumes]
        self.active = False
        self.position = (0, 0)
        self.mark = 0
        self.journalled_lsn = 0
        self._needed_segment = self._given_back = self._segment = 0
        self.durable_seq = self._durable_mark = 0
        self.on_durable: Callable[[], None] = lambda: None
        self._journalled_seq = 0
        self._session: SenderSession | None = None
        self._unanswered: deque[_Sent] = deque()
        self._samples: deque[tuple[float, int]] = deque()  # when the journal had which seq, not durable there yet
        self._flushed_at = 0.0
        self._least_answer_s = math.inf  # between a Flush and its answer, on this connection
        self._saturated_at: float | None = None  # since when there was always more to send than had gone
        self._answered_bytes = 0  # since then

    def begin(self, session: SenderSession, mark: int) -> None:
        """From where the reader is, behind `mark`: what is gathered of the open interval is read once more."""
        self._reader.restart()
        self.active, self.mark, self.position = True, mark, self._reader.position
        self._durable_mark = mark
        self.durable_seq, self._journalled_seq = self.position[0], self.position[0]
        self._session = session
        session.on_durable = self._answered
        self._unanswered.clear()
        self._least_answer_s = math.inf
        self._samples.clear()
        self._saturated_at = None

    def end(self) -> None:
        self.active = False
        self._session = None

    async def leave(self) -> None:
        """Ends the stream in order: transfers lead on from its last write. Raises the session's failure."""
        session = self._session
        assert session is not None
        await session.wait_durable()
        while self._durable_mark < self.mark:  # nothing else would tell who waits for it that it is committed
            await trio.sleep(TURN_S)
            await self._flush(None, NOTHING_DIGEST, self.position[1])
            await session.wait_durable()
        before = session.welcome
        session.welcome = Welcome(self.mark, *self.position, before.protected_through_ns)
        self.end()

    @property
    def caught_up(self) -> bool:
        return self.durable_seq >= self._journalled_seq

    def behind_s(self) -> float:
        """For how long the replica has lacked the oldest write that it lacks."""
        while self._samples and self._samples[0][1] <= self.durable_seq:
            self._samples.popleft()
        return trio.current_time() - self._samples[0][0] if self._samples else 0.0

    async def turn(self, limit_s: float) -> bool:
        """Streams what has been written; True where a complete copy begins behind it.

        Args:
            limit_s: it ends early where the replica is further behind than that.

        Raises:
            CorruptionError: the journal is damaged.
            PitfsError: of the session, or of the disk.
        """
        status = await self._splitter_status()
        tail, self.journalled_lsn = status.tail, status.lsn
        self._note(status.seq)
        if self._reader.location < tail:  # for all of them at once
            segments = self._reader.location.segment, tail.segment
            await trio.to_thread.run_sync(self._durability.make, *segments)
        while True:
            piece = await trio.to_thread.run_sync(
                next_chunk, self._reader, tail, self._batch_bytes, self._block_sizes
            )
            if piece is None:
                self._saturated_at = None
                break
            await self._send(piece, status.now_ns if self._reader.location >= tail else None)
            # On the way: what is behind, after a link that was down for long, may be the whole journal.
            await self.give_back()
            if piece.begins_anew:
                return True
            if self.behind_s() > limit_s:
                return False
        if trio.current_time() - self._flushed_at >= PULSE_S:
            await self._flush(None, NOTHING_DIGEST, status.now_ns)
        return False

    async def give_back(self) -> None:
        """Gives back what holds nothing that the replica hasn't durably."""
        if self._needed_segment > self._given_back:
            self._given_back = self._needed_segment
            await self._give_back(self._given_back)

    @property
    def _window_bytes(self) -> int:
        """What may be under way."""
        rate = self._budget.rate
        if rate is None:
            return UNKNOWN_WINDOW_BYTES
        # With what is on its way on a long link, or waits for a slow disk: else a window that is too small for
        # the link would be measured as its rate, and made smaller still.
        ahead_s = AHEAD_S + (self._least_answer_s if self._least_answer_s < math.inf else 0.0)
        return int(min(max(rate * ahead_s, MIN_WINDOW_BYTES), MAX_WINDOW_BYTES))

    @property
    def _batch_bytes(self) -> int:
        """What a batch may have, but for the write with which it gets there."""
        return min(MAX_BATCH_BYTES - MAX_BODY_BYTES, self._window_bytes // 2)

    async def _send(self, piece: StreamChunk, now_ns: int | None) -> None:
        self._segment = piece.segment
        if piece.writes is not None:
            if self._saturated_at is None:
                self._saturated_at, self._answered_bytes = trio.current_time(), 0
            self.position = piece.position
            await self._flush(piece, piece.writes.digest, piece.position[1] if now_ns is None else now_ns)
        if piece.mark is not None:
            await self._send_mark(piece.mark)

    async def _flush(self, piece: StreamChunk | None, digest: int, protected_through_ns: int) -> None:
        assert self._session is not None
        writes = piece.writes if piece is not None else None
        size = len(writes.contents) if writes is not None else 0
        self._flushed_at = trio.current_time()
        self._unanswered.append(_Sent(self._reader.location, self._segment, size, trio.current_time()))
        flush = Flush(self.position[0], digest, protected_through_ns)
        await self._session.stream(writes, flush, self._window_bytes)

    async def _send_mark(self, mark: StreamMark) -> None:
        assert self._session is not None
        self.mark = mark.mark
        self._unanswered.append(_Sent(self._reader.location, self._segment, 0, trio.current_time()))
        await self._session.stream_mark(mark)

    def _note(self, seq: int) -> None:
        now = trio.current_time()
        self._journalled_seq = seq
        newest = self._samples[-1][0] if self._samples else -SAMPLE_S
        if seq > self.durable_seq and now - newest >= SAMPLE_S and len(self._samples) < MAX_SAMPLES:
            self._samples.append((now, seq))

    def _answered(self, durable: Durable) -> None:
        sent = self._unanswered.popleft()
        self.durable_seq = durable.seq
        self._least_answer_s = min(self._least_answer_s, trio.current_time() - sent.at_s)
        self._needed_segment, self._durable_mark = sent.segment, durable.mark
        standing = self._standing
        welcome = Welcome(durable.mark, durable.seq, durable.time_ns, durable.protected_through_ns)
        standing.arrived(welcome, sent.location)
        standing.settle(durable.mark)
        standing.getting_through()
        self._measure(sent.size_bytes)
        self.on_durable()

    def _measure(self, size_bytes: int) -> None:
        """The link's rate, where it is the link that holds things up."""
        if self._saturated_at is None:
            return
        self._answered_bytes += size_bytes
        elapsed = trio.current_time() - self._saturated_at
        if elapsed >= MEASURE_S and self._answered_bytes >= MEASURE_BYTES:
            self._standing.rates.append(self._answered_bytes / elapsed)
            self._saturated_at, self._answered_bytes = trio.current_time(), 0


class AckReporter:
    """Tells the splitter what the replica durably has (mode sync): writes wait for it.

    Attributes:
        in_step: whether writes can rely on the replica, as was told last.
    """

    def __init__(self, splitter: SplitterClient) -> None:
        self._splitter = splitter
        self._news: tuple[int, bool, str] | None = None
        self._told = trio.Event()
        self.in_step = False

    def tell(self, seq: int, in_step: bool, cause: str = "") -> None:
        """What comes before it was told is said in one."""
        self._news, self.in_step = (seq, in_step, cause), in_step
        self._told.set()

    async def run(self) -> None:
        """Tells, for ever. Raises trio.BrokenResourceError when the splitter has ended."""
        while True:
            await self._told.wait()
            self._told = trio.Event()
            assert self._news is not None
            seq, in_step, cause = self._news
            await self._splitter.replicated(seq, in_step, cause)
