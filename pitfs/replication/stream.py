"""The open interval's writes go to the replica as they come: modes async and sync, and dynamic on a good link."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

import trio

from pitfs.journal.digests import VolumeDigests
from pitfs.journal.reader import Durability, JournalReader
from pitfs.journal.stream_reader import NOTHING_DIGEST, StreamChunk, next_chunk
from pitfs.journal.writer import Location
from pitfs.model.record import MAX_BODY_BYTES
from pitfs.model.transfer import MAX_BATCH_BYTES, Durable, Flush, Welcome, Writes
from pitfs.replication.phases import Phase
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
        acks: hears what the replica has.
        digests: of the volumes, for marks.
        release: called with the segment before which nothing is needed for shipping any more.

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
        acks: AckReporter,
        digests: VolumeDigests,
        release: Callable[[int], Awaitable[None]],
    ) -> None:
        self._reader, self._splitter, self._sender, self._durability = reader, splitter, sender, durability
        self._acks, self._digests, self._release_segment = acks, digests, release
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
        self._busy_s = 0.0  # of the session, then
        self._answered_bytes = 0  # since then

    def begin(self, session: Session) -> None:
        """From where the reader is, behind the session's mark: what it has of the open interval is read once more."""
        self._sender.status.enter(Phase.STREAMING)
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

    def out_of_step(self, cause: str) -> None:
        """Mode sync: writes can't rely on the replica until it has what the journal has."""
        self._acks.report(self.durable_seq, False, cause)

    def behind_s(self) -> float:
        """For how long the replica has lacked the oldest write that it lacks."""
        while self._samples and self._samples[0][1] <= self.durable_seq:
            self._samples.popleft()
        return trio.current_time() - self._samples[0][0] if self._samples else 0.0

    async def pump(self, limit_s: float) -> bool:
        """Streams what has been written; True where a full sync begins behind it.

        Args:
            limit_s: it ends early where the replica is further behind than that.

        Raises:
            CorruptionError: the journal is damaged.
            PitfsError: of the session, or of the disk.
        """
        self.pumped_at = trio.current_time()
        splitter = await self._splitter.status()
        tail, self.journalled_lsn = splitter.tail, splitter.lsn
        self._journalled_seq = splitter.seq
        newest = self._samples[-1][0] if self._samples else -SAMPLE_S
        is_due = self.pumped_at - newest >= SAMPLE_S and len(self._samples) < MAX_SAMPLES
        if splitter.seq > self.durable_seq and is_due:
            self._samples.append((self.pumped_at, splitter.seq))
        if self._reader.location < tail:  # for all of them at once
            segments = self._reader.location.segment, tail.segment
            await trio.to_thread.run_sync(self._durability.make, *segments)
        while True:
            # What a batch may have, but for the write with which it gets there.
            batch_bytes = min(MAX_BATCH_BYTES - MAX_BODY_BYTES, self._window_bytes // 2)
            chunk = await trio.to_thread.run_sync(self._next_chunk, tail, batch_bytes)
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

    def _next_chunk(self, tail: Location, limit_bytes: int) -> StreamChunk | None:
        start, location = self._reader.position, self._reader.location
        chunk = next_chunk(self._reader, tail, limit_bytes)
        return None if chunk is None else self._digests.of_chunk(chunk, start, location)

    async def release(self) -> None:
        """Releases the segments that hold nothing but what the replica has durably."""
        if self._needed_segment > self._released_segment:
            self._released_segment = self._needed_segment
            await self._release_segment(self._released_segment)

    @property
    def _window_bytes(self) -> int:
        """What may be under way."""
        intake = self._sender.bandwidth.intake  # what isn't durable has to be waited for, whoever is slow
        if intake is None:
            return UNKNOWN_WINDOW_BYTES
        # With what is on its way on a long link, or waits for a slow disk: else a window that is too small for
        # the link would be measured as its rate, and made smaller still.
        ahead_s = AHEAD_S + (self._least_answer_s if self._least_answer_s < math.inf else 0.0)
        return int(min(max(intake * ahead_s, MIN_WINDOW_BYTES), MAX_WINDOW_BYTES))

    async def _send(self, chunk: StreamChunk, now_ns: int | None) -> None:
        assert self._session is not None
        self._segment = chunk.segment
        if chunk.writes is not None:
            if self._saturated_at is None:
                self._saturated_at, self._answered_bytes = trio.current_time(), 0
                self._busy_s = self._session.busy_s
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

    def _answered(self, durable: Durable) -> None:
        sent = self._unanswered.popleft()
        self.durable_seq = durable.seq
        self._least_answer_s = min(self._least_answer_s, trio.current_time() - sent.at_s)
        self._needed_segment, self._durable_mark = sent.segment, durable.mark
        welcome = Welcome(durable.mark, durable.seq, durable.time_ns, durable.protected_through_ns)
        self._sender.status.acknowledged(welcome, sent.location)
        if self._saturated_at is not None:  # it is the link that holds things up: its rate is measured
            self._answered_bytes += sent.size_bytes
            elapsed = trio.current_time() - self._saturated_at
            if elapsed >= MEASURE_S and self._answered_bytes >= MEASURE_BYTES:
                assert self._session is not None
                busy_s = self._session.busy_s
                self._sender.bandwidth.measured(self._answered_bytes, busy_s - self._busy_s, elapsed)
                self._saturated_at, self._answered_bytes, self._busy_s = trio.current_time(), 0, busy_s
        self._acks.reached(self.durable_seq, self.durable_seq >= self._journalled_seq)  # as of the last `pump`


class AckReporter:
    """Reports to the splitter what the replica durably has: in mode sync, where writes wait for it."""

    def __init__(self, splitter: SplitterClient, is_sync: bool) -> None:
        self._splitter, self._is_sync = splitter, is_sync
        self._last = Replicated(0, False, "")
        self._changed = trio.Event()

    def reached(self, seq: int, has_all: bool) -> None:
        """The replica has the writes up to `seq`; once it had all that were journalled, writes can rely on it."""
        self.report(seq, self._last.in_step or has_all)

    def report(self, seq: int, in_step: bool, cause: str = "") -> None:
        """Replaces what hasn't been sent yet."""
        if self._is_sync:
            self._last = Replicated(seq, in_step, cause)
            self._changed.set()

    async def run(self) -> None:
        """Sends reports, for ever. Raises trio.BrokenResourceError when the splitter has ended."""
        while True:
            await self._changed.wait()
            self._changed = trio.Event()
            await self._splitter.replicated(self._last.seq, self._last.in_step, self._last.cause)
