"""The open interval's writes go to the replica as they come: modes async and sync, and dynamic on a good link."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

import trio

from pitfs.journal.reader import Durability, JournalReader
from pitfs.journal.stream_reader import NOTHING_DIGEST, StreamChunk, next_chunk
from pitfs.journal.writer import Location
from pitfs.model.record import MAX_BODY_BYTES
from pitfs.model.transfer import MAX_BATCH_BYTES, Durable, Flush, Welcome, Writes
from pitfs.replication.ports import Session
from pitfs.replication.sending import Sender
from pitfs.splitter.messages import Replicated, SplitterClient

POLL_S: Final = 0.15  # how often the journal is read: with the replica's 0.25 s until readable, well below 1 s
PULSE_S: Final = 0.25  # how often the replica hears that time passed where nothing is written
AHEAD_S: Final = 0.5  # of the link's rate: what may be under way, so that lag isn't made by our own queues
MIN_WINDOW_BYTES: Final = 256 << 10
UNKNOWN_WINDOW_BYTES: Final = 16 << 20  # while the rate isn't known
MAX_WINDOW_BYTES: Final = 32 << 20
MEASURE_S, MEASURE_BYTES = 1.0, 256 << 10  # the least over which a rate is measured
MAX_SAMPLES: Final = 1024
SAMPLE_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class _Sent:
    """A Flush or mark without answer: where the journal goes on, which segment has the last record, what it took."""

    location: Location
    segment: int
    size_bytes: int
    at_s: float


class Stream:
    """The stream of one group; of one connection from `begin` on, in phase STREAMING.

    Args:
        release: called with the segment before which nothing is needed for shipping any more.
        on_durable: called when the replica has more, or knows that it has all.

    Attributes:
        position: (seq, time_ns) of the last write streamed; mark: the last mark.
        durable_seq: of the replica.
        journalled_lsn: of the journal at the last `pump`; pumped_at: trio's clock then.
    """

    def __init__(
        self,
        reader: JournalReader,
        splitter: SplitterClient,
        sender: Sender,
        durability: Durability,
        release: Callable[[int], Awaitable[None]],
        on_durable: Callable[[], None],
    ) -> None:
        self._reader, self._splitter, self._sender, self._durability = reader, splitter, sender, durability
        self._release_segment, self._on_durable = release, on_durable
        self.position = (0, 0)
        self.mark = self.durable_seq = self._durable_mark = self._journalled_seq = 0
        self.journalled_lsn, self.pumped_at = 0, 0.0
        self._needed_segment = self._released_segment = self._segment = 0
        self._session: Session | None = None
        self._unanswered: deque[_Sent] = deque()
        self._samples: deque[tuple[float, int]] = deque()  # when the journal had which seq, not durable there yet
        self._flushed_at = -math.inf
        self._least_answer_s = math.inf  # between a Flush and its answer, on this connection
        self._saturated_at: float | None = None  # since when there was always more to send than had gone
        self._answered_bytes = 0  # since then

    def begin(self, session: Session) -> None:
        """From where the reader is, behind the session's mark: what it has of the open interval is read once more."""
        self._reader.restart()
        self.mark = self._durable_mark = session.welcome.mark
        self.position = self._reader.position
        self.durable_seq = self._journalled_seq = self.position[0]
        self._session = session
        session.on_durable = self._answered
        self._unanswered.clear()
        self._least_answer_s = math.inf
        self._samples.clear()
        self._saturated_at = None

    async def finish(self) -> None:
        """Ends the stream in order: transfers lead on from its last write. Raises the session's failure."""
        session = self._session
        assert session is not None
        await session.wait_durable()
        while self._durable_mark < self.mark:  # nothing else would tell who waits for it that it is committed
            await trio.sleep(POLL_S)
            await self._flush(None, self.position[1])
            await session.wait_durable()
        before = session.welcome
        session.welcome = Welcome(self.mark, *self.position, before.protected_through_ns)
        self.end()

    def end(self) -> None:
        """Lets go of the session, which holds the memory of its codec."""
        self._session = None

    @property
    def caught_up(self) -> bool:
        """Whether the replica had durably what was in the journal at the last `pump`."""
        return self.durable_seq >= self._journalled_seq

    def behind_s(self) -> float:
        """For how long the replica has lacked the oldest write that it lacks."""
        while self._samples and self._samples[0][1] <= self.durable_seq:
            self._samples.popleft()
        return trio.current_time() - self._samples[0][0] if self._samples else 0.0

    async def pump(self, limit_s: float) -> bool:
        """Streams what has been written; True where a complete copy begins behind it.

        Args:
            limit_s: it ends early where the replica is further behind than that.

        Raises:
            CorruptionError: the journal is damaged.
            PitfsError: of the session, or of the disk.
        """
        self.pumped_at = trio.current_time()
        splitter = await self._splitter.status()
        tail, self.journalled_lsn = splitter.tail, splitter.lsn
        self._sample(splitter.seq)
        if self._reader.location < tail:  # for all of them at once
            segments = self._reader.location.segment, tail.segment
            await trio.to_thread.run_sync(self._durability.make, *segments)
        while True:
            chunk = await trio.to_thread.run_sync(next_chunk, self._reader, tail, self._batch_bytes)
            if chunk is None:
                self._saturated_at = None
                break
            await self._send(chunk, splitter.now_ns if self._reader.location >= tail else None)
            # Within the loop: after a link that was down for long, it runs through the whole journal.
            await self.release()
            if chunk.begins_anew:
                return True
            if self.behind_s() > limit_s:
                return False
        if trio.current_time() - self._flushed_at >= PULSE_S:
            await self._flush(None, splitter.now_ns)
        return False

    async def release(self) -> None:
        """Releases the segments that hold nothing but what the replica has durably."""
        if self._needed_segment > self._released_segment:
            self._released_segment = self._needed_segment
            await self._release_segment(self._released_segment)

    @property
    def _window_bytes(self) -> int:
        """What may be under way."""
        rate = self._sender.bandwidth.rate
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

    async def _send(self, chunk: StreamChunk, now_ns: int | None) -> None:
        assert self._session is not None
        self._segment = chunk.segment
        if chunk.writes is not None:
            if self._saturated_at is None:
                self._saturated_at, self._answered_bytes = trio.current_time(), 0
            self.position = chunk.position
            await self._flush(chunk.writes, chunk.position[1] if now_ns is None else now_ns)
        if chunk.mark is not None:
            self.mark = chunk.mark.mark
            self._await_answer(0)
            await self._session.stream_mark(chunk.mark)

    async def _flush(self, writes: Writes | None, protected_through_ns: int) -> None:
        assert self._session is not None
        self._flushed_at = trio.current_time()
        self._await_answer(len(writes.contents) if writes is not None else 0)
        digest = writes.digest if writes is not None else NOTHING_DIGEST
        flush = Flush(self.position[0], digest, protected_through_ns)
        await self._session.stream(writes, flush, self._window_bytes)

    def _await_answer(self, size_bytes: int) -> None:
        self._unanswered.append(_Sent(self._reader.location, self._segment, size_bytes, trio.current_time()))

    def _sample(self, seq: int) -> None:
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
        status = self._sender.status
        welcome = Welcome(durable.mark, durable.seq, durable.time_ns, durable.protected_through_ns)
        status.acknowledged(welcome, sent.location)
        status.first_pass_done(durable.mark)
        self._measure(sent.size_bytes)
        self._on_durable()

    def _measure(self, size_bytes: int) -> None:
        """The link's rate, where it is the link that holds things up."""
        if self._saturated_at is None:
            return
        self._answered_bytes += size_bytes
        elapsed = trio.current_time() - self._saturated_at
        if elapsed >= MEASURE_S and self._answered_bytes >= MEASURE_BYTES:
            self._sender.bandwidth.rates.append(self._answered_bytes / elapsed)
            self._saturated_at, self._answered_bytes = trio.current_time(), 0


class AckReporter:
    """Reports to the splitter what the replica durably has (mode sync): writes wait for it."""

    def __init__(self, splitter: SplitterClient) -> None:
        self._splitter = splitter
        self._last = Replicated(0, False, "")
        self._changed = trio.Event()

    @property
    def in_step(self) -> bool:
        """Whether writes can rely on the replica, as was reported last."""
        return self._last.in_step

    def report(self, seq: int, in_step: bool, cause: str = "") -> None:
        """Replaces what hasn't been sent yet."""
        self._last = Replicated(seq, in_step, cause)
        self._changed.set()

    async def run(self) -> None:
        """Sends reports, for ever. Raises trio.BrokenResourceError when the splitter has ended."""
        while True:
            await self._changed.wait()
            self._changed = trio.Event()
            last = self._last
            await self._splitter.replicated(last.seq, last.in_step, last.cause)
