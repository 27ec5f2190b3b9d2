"""Joins journal and link: what the local journal holds goes to the replica, mark by mark, or as a stream."""

from __future__ import annotations

import contextlib
import logging
import math
from functools import partial

import trio

from pitfs.errors import CorruptionError, PitfsError, RemoteProtocolError
from pitfs.journal.digests import FILL_S, VolumeDigests
from pitfs.journal.reader import Copy, Durability, Interval
from pitfs.journal.writer import Location, segment_bytes_for
from pitfs.model import schedule
from pitfs.model.schedule import MAX_INTERVAL_PART, MAX_INTERVAL_ROWS
from pitfs.replication.backfill import Backfill
from pitfs.replication.bandwidth import Bandwidth
from pitfs.replication.cursor import JournalCursor
from pitfs.replication.full_sync import FullSync, read_stretch
from pitfs.replication.heal import ContentFinder
from pitfs.replication.interval import PreparedInterval, diff_frames
from pitfs.replication.manifests import diff_manifest, waits_cause
from pitfs.replication.phases import Phase
from pitfs.replication.ports import Connect, Session, ShipperSettings
from pitfs.replication.sending import Sender
from pitfs.replication.status import ReplicationStatus
from pitfs.replication.stream import POLL_S, AckReporter, Stream
from pitfs.splitter.messages import Backings, SplitterClient, SplitterStatus
from pitfs.storage.files import storage_error

log = logging.getLogger(__name__)

class Shipper:
    """Ships a group. What it is doing is `status.phase`; see `phases.Phase` for the whole.

    Args:
        splitter, waiting_splitter: two clients; the second one waits for writes.
        connect: opens a session with the replica.

    Attributes:
        cursor, backfill, stream, full_sync, bandwidth, acks, digests: its parts.
        fitted: whether the link could have carried every write of the last interval in the interval's time, and
            didn't fall behind as a stream since.
        needed_segment: what is before it has been shipped, but for what is wanted for backfill.
    """

    def __init__(
        self,
        settings: ShipperSettings,
        splitter: SplitterClient,
        waiting_splitter: SplitterClient,
        connect: Connect,
    ) -> None:
        self.settings, self.splitter, self._waiting_splitter = settings, splitter, waiting_splitter
        self._connect, self.needed_segment = connect, 0
        self.fitted = True
        self.status = ReplicationStatus(settings.peer)
        self.bandwidth = Bandwidth(settings.rate_bytes_per_s)
        self._sender = sender = Sender(self.status, self.bandwidth)
        self.cursor = JournalCursor(settings, splitter, self.status, self.release)
        self.backfill = Backfill(settings, sender)
        self._durability = durability = Durability(settings.journal_directory)
        self._backings = Backings(splitter, settings.hello.volumes, settings.configured)
        self.digests = VolumeDigests(settings.journal_directory, settings.hello.volumes)
        self.full_sync = FullSync(settings, splitter, self.cursor, sender, self._backings, self.digests)
        self._contents = ContentFinder(settings, splitter, self._backings)
        self.acks = AckReporter(splitter, is_sync=settings.mode == "sync")
        self.stream = Stream(
            self.cursor.reader, splitter, sender, durability, self.acks, self.digests, self.release
        )

    def close(self) -> None:
        """Closes files. A shipper that was killed instead leaves nothing behind either."""
        self.cursor.reader.close()
        self.backfill.close()
        self.digests.close()

    # -- marks -------------------------------------------------------------------------------------------

    async def mark(self, bookmark: str | None = None) -> SplitterStatus:
        """Closes the interval now. Raises CapacityError while writes bypass the journal."""
        splitter = await self.splitter.mark(bookmark)
        self.cursor.wake.set()
        return splitter

    async def tick(self) -> None:
        """Closes an interval each `interval`, for ever."""
        while True:
            self.bandwidth.next_diff_at = trio.current_time() + self.settings.interval_s
            await trio.sleep(self.settings.interval_s)
            try:
                await self.mark()
            except PitfsError as error:
                log.debug("no mark: %s", error)

    async def tend_digests(self) -> None:
        """Saves the digests now and then, and has them made by reading the volumes slowly; for ever."""

        def seq() -> int | None:
            splitter = trio.from_thread.run(self.splitter.status)
            return None if splitter.bypass_cause or splitter.copy is not None else splitter.seq

        while True:
            await trio.sleep(FILL_S)
            await trio.to_thread.run_sync(self.digests.save)
            if self.digests.needs_reading:
                with contextlib.suppress(PitfsError, OSError), contextlib.ExitStack() as stack:
                    fds = await self._backings.open(stack)
                    read = partial(read_stretch, self.settings.hello.volumes, fds)
                    await trio.to_thread.run_sync(self.digests.fill, read, seq)

    def bytes_between(self, start: Location, end: Location) -> int:
        """Of the journal."""
        segment_bytes = segment_bytes_for(self.settings.capacity_bytes)
        return (end.segment - start.segment) * segment_bytes + end.offset - start.offset

    # -- the link ----------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Ships for ever; reconnects with backoff."""
        while True:
            try:
                await self._run_session()
            except PitfsError as error:
                self.status.link_failed(error)
            except OSError as error:  # where no full sync would help: it reads the same
                where = error.filename or f"{self.settings.hello.group}: a backing volume or the journal"
                self.status.link_failed(storage_error(error, where, "reading"))
            await self.status.back_off()

    async def _run_session(self) -> None:
        self.status.enter(Phase.CONNECTING)
        await self._backings.check()
        async with self._connect(self.bandwidth.queue_bytes) as session:
            log.debug("connected to %s, which has mark %d", session.peer, session.welcome.mark)
            session.on_progress = self.status.got_through
            session.answer_wants(self._contents.find)
            await self.locate(session)
            try:
                while True:
                    await self.step(session)
            finally:
                self.stream.end()
                self.stream.out_of_step("the link to the replica is down")

    async def locate(self, session: Session) -> None:
        """Finds the replica's place in the journal, and what it lacks of intervals that it has."""
        self.status.enter(Phase.LOCATING)
        self.status.connected(session.welcome)
        await trio.to_thread.run_sync(self.digests.resume, (await self.splitter.status()).seq)
        await self.cursor.locate(session.welcome)
        if self.settings.mode != "snapshot":
            await self.backfill.restore(session.welcome, await self.splitter.status())
        await self.release(self.cursor.reader.start.segment)  # a splitter that was restarted doesn't know

    async def step(self, session: Session) -> None:
        """Streams once; or ships the next diff or copy, else layers that wait; else waits for a mark."""
        if session.failure is not None:  # nothing else would tell while there is nothing to send
            raise session.failure
        await self.backfill.report_lost(session)
        if self.status.phase is Phase.WAITING:
            tail = (await self.splitter.status()).tail
            if self._choose_mode(self.bytes_between(self.cursor.reader.start, tail)).streams:
                log.info("streaming behind mark %d: %s", session.welcome.mark, self.status.mode.reason)
                self.stream.begin(session)
        if self.status.phase is Phase.STREAMING:
            await self._step_stream(session)
            return
        item = await self.cursor.next_item(session, wait=not self.backfill.waiting)
        if isinstance(item, Copy):
            await self.full_sync.ship(session, item)
        elif isinstance(item, Interval):
            await self.ship_interval(session, item)
        else:
            await self.ship_layers(session)

    def _choose_mode(self, backlog_bytes: int) -> schedule.ShippingMode:
        self.status.mode = schedule.choose_shipping_mode(
            mode=self.settings.mode,
            streaming=self.status.phase is Phase.STREAMING,
            behind_s=self.stream.behind_s(),
            backlog_bytes=backlog_bytes,
            interval_s=self.settings.interval_s,
            rate_bytes_per_s=self.bandwidth.intake,
            fitted=self.fitted,
        )
        return self.status.mode

    # -- the stream --------------------------------------------------------------------------------------

    async def _step_stream(self, session: Session) -> None:
        """Streams once; then sends layers of a journal that waits, or waits for writes."""
        self.cursor.wake = trio.Event()
        if await self._pump_stream(session):
            return
        await self.stream.release()
        if self.backfill.waiting:
            await self.ship_layers(session)
        elif self.settings.mode == "sync":
            await self._waiting_splitter.wait_for_writes(self.stream.journalled_lsn)
        else:
            with trio.move_on_at(self.stream.pumped_at + POLL_S):
                await self.cursor.wake.wait()

    async def _pump_stream(self, session: Session) -> bool:
        """Streams once; True where the stream ended: the replica was too far behind, or a copy has to come."""
        dynamic = self.settings.mode == "dynamic"
        limit_s = schedule.behind_limit_s(self.settings.interval_s) if dynamic else math.inf
        damage, copy_follows = None, False
        try:
            copy_follows = await self.stream.pump(limit_s)
        except CorruptionError as error:
            if error is session.failure:
                raise
            damage = error
        if damage is None and not copy_follows and self._choose_mode(0).streams:
            return False
        cause = "a copy goes first" if copy_follows else str(damage or self.status.mode.reason)
        log.info("no longer streaming: %s", cause)
        self.stream.out_of_step(cause)
        self.fitted = damage is not None or copy_follows
        await self.stream.finish()
        if damage is not None:
            await self.cursor.rescan(str(damage))
        else:
            self.status.enter(Phase.AWAITING_COPY if copy_follows else Phase.WAITING)
        return True

    async def _interrupts_layers(self, session: Session) -> bool:
        """Between two frames of layers: whether something else goes first. What was written is streamed at once."""
        if self.status.phase is not Phase.STREAMING:
            return self.cursor.wake.is_set()
        if self.settings.mode != "sync" and trio.current_time() - self.stream.pumped_at < POLL_S:
            return False
        return await self._pump_stream(session)

    # -- transfers ---------------------------------------------------------------------------------------

    async def ship_interval(self, session: Session, interval: Interval) -> None:
        """The interval's snapshot diff; its difference journal waits then."""
        self.status.enter(Phase.SHIPPING_INTERVAL)
        wants_journal = self.settings.mode != "snapshot"
        segments = interval.start.segment, interval.end.segment
        await trio.to_thread.run_sync(self._durability.make, *segments)
        try:
            prepared = await self.backfill.prepare(interval, wants_journal)
            fitted, decision = self._fits(prepared), schedule.Decision(None, waits_cause(prepared.journal_bytes))
            if not wants_journal:
                decision = schedule.Decision(None, "mode is snapshot")
            elif prepared.journal is None:
                decision = schedule.Decision(schedule.EVERY_WRITE, "nothing was written")
            digests = await trio.to_thread.run_sync(self.digests.of_interval, interval, prepared.diff.rows)
            resume = await self._sender.begin(session, diff_manifest(prepared, decision.reason, digests))
            await self._sender.send(session, diff_frames(prepared, resume, self.bandwidth.payload_bytes))
            said, sent = session.welcome, (interval.mark, interval.to_seq, interval.to_time_ns)
            if (said.mark, said.seq, said.time_ns) != sent:  # what it has is released here
                raise RemoteProtocolError(
                    f"{session.peer}: it acknowledges mark {said.mark} at seq {said.seq}, mark {sent[0]} at seq "
                    f"{sent[1]} was sent: is that a replica of pitfs?"
                )
        except CorruptionError as error:
            await self.cursor.give_up(interval, error)
        self.fitted, self.status.last_decision = fitted, decision
        self.backfill.add(prepared)
        await self.release(interval.end.segment)
        self.status.acknowledged(session.welcome, interval.end, layers_follow=prepared.journal is not None)
        self.status.enter(Phase.WAITING)
        log.debug("interval committed, mark %d, %d writes", interval.mark, len(interval.times))

    def _fits(self, prepared: PreparedInterval) -> bool:
        """Whether the link carries every write of the interval in the interval's time."""
        interval, committed = prepared.interval, self.status.committed
        # An interval that became longer, since nothing was shipped for a while, had as much more time.
        before_ns = committed.protected_through_ns if committed is not None else interval.mark_time_ns
        # One that the splitter closed for its size has its own time only: else each part had the whole one's room.
        is_large = (
            len(interval.columns.seq) > MAX_INTERVAL_ROWS
            or self.bytes_between(interval.start, interval.end) > self.settings.capacity_bytes // MAX_INTERVAL_PART
        )
        least_ns = 0 if is_large else self.settings.interval_ns
        time_ns = max(least_ns, interval.mark_time_ns - before_ns)
        return self.bandwidth.carries(prepared.diff_bytes + prepared.journal_bytes, time_ns)

    async def ship_layers(self, session: Session) -> None:
        """What goes next of the journals that wait, by figure 7's decision; a diff that is due interrupts it."""
        streaming = self.status.phase is Phase.STREAMING
        step = schedule.next_step(
            diff_due=self.cursor.wake.is_set() and not streaming,
            waiting=self.backfill.waiting,
            room_bytes=self.bandwidth.room_bytes(),
        )
        if step.kind in (schedule.StepKind.DIFF, schedule.StepKind.WAIT):
            return
        log.debug("next: %s", step)
        phase = self.status.phase
        if not streaming:
            self.status.enter(Phase.BACKFILLING)
        mark = self.backfill.mark_of(step.seq)
        if not step.fits:
            self.status.first_pass_done(mark)
        try:
            await self.backfill.build(step.seq, (await self.splitter.status()).tail)
            if step.kind is schedule.StepKind.LAYERS:
                await self.backfill.ship(session, step, lambda: self._interrupts_layers(session))
                self.status.first_pass_done(mark)
        except CorruptionError as error:
            if error is session.failure:
                raise
            await self.backfill.give_up(session, step.seq, error, await self.splitter.status())
            self.status.first_pass_done(mark)
        await self.release(self.needed_segment)
        if not streaming:
            self.status.enter(phase)

    async def release(self, segment: int) -> None:
        """Segments before that one aren't needed for shipping any more; some are wanted for backfill."""
        self.needed_segment = max(self.needed_segment, segment)
        await self.splitter.release(self.needed_segment, self.backfill.wanted_segment(self.needed_segment))
